//! Every odd layer that is not refused, through the kernel: the mounted image equals the view, which
//! `view_oddlayers` compares with the expected trees.

/// These mount, so they need root.
mod root_oddlayers {
    use std::os::fd::AsRawFd;
    use std::path::Path;

    use lazyrun_fs::view::View;
    use lazyrun_index::LayerIndex;

    use crate::common::layer::TestLayer;
    use crate::common::oddlayers::{self, Case};
    use crate::common::{mount, tree};

    /// `None` if the case is refused.
    fn written(case: &Case) -> Option<(mount::Written, tree::Tree)> {
        let layers = oddlayers::index(case).ok()?;
        let view = View::merge(&layers.indexes.iter().collect::<Vec<&LayerIndex>>()).ok()?;
        let written = mount::write(&view, &layers.files).unwrap_or_else(|e| panic!("{}: {e}", case.tag));
        Some((written, tree::of_view(&view, &layers.files)))
    }

    #[test]
    fn the_kernel_shows_the_view() {
        mount::need_root();
        let mut mounted = 0;
        for case in oddlayers::cases() {
            let Some((written, of_view)) = written(&case) else { continue };
            let differences = tree::compare_strictly(&of_view, &mount::kernel_tree(&written));
            assert!(differences.is_empty(), "{}: {differences:#?}", case.tag);
            // fsck would read all nine gigabytes of the one, and takes its time over the files of the other.
            if !["sparse-9g", "dir-100k"].contains(&case.tag.as_str()) {
                mount::fsck(&written);
            }
            mounted += 1;
        }
        assert!(mounted >= 70, "only {mounted} cases were mounted");
    }

    /// An image's own overlayfs attributes neither act nor vanish below an overlay mount.
    #[test]
    fn overlay_attributes_do_not_act() {
        mount::need_root();
        let cases = oddlayers::cases();
        let case = cases.iter().find(|c| c.tag == "xattr-trusted-overlay").expect("the case");
        let (image, of_view) = written(case).expect("accepted");
        let empty = TestLayer::default();
        let below = View::merge(&[&empty]).expect("merges");
        let below = mount::write(&below, &crate::common::layer::Files::of(&[empty])).expect("written");
        let lowers = [
            mount::erofs(&image.image, &image.devices).expect("mounts"),
            mount::erofs(&below.image, &below.devices).expect("mounts"),
        ];
        let overlay = mount::overlay(&lowers).expect("overlay mounts");
        let got = tree::of_dir(Path::new(&format!("/proc/self/fd/{}", overlay.as_raw_fd())));
        let differences = tree::compare(case.expected.as_ref().expect("expected tree"), &got);
        assert!(differences.is_empty(), "{differences:#?}");
        assert_eq!(got["d"]["xattrs"]["trusted.overlay.opaque"], "79", "overlayfs takes the escape away");
        assert_eq!(tree::compare(&of_view, &got), [] as [String; 0]);
    }
}
