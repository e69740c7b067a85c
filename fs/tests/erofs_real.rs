//! A piece of this system, packed by GNU tar, comes back from the kernel as it is on disk.

/// These mount, so they need root.
mod root_real {
    use std::path::Path;
    use std::process::Command;

    use lazyrun_fs::view::View;

    use crate::common::layer::Files;
    use crate::common::{mount, oddlayers, tree};

    /// Programs: large and small files, hard links, symlinks, setuid bits, capabilities.
    const PIECES: [&str; 2] = ["usr/bin", "usr/sbin"];

    #[test]
    fn programs_of_this_system() {
        mount::need_root();
        let tar = Command::new("tar")
            .args(["-C", "/", "-c", "--format=pax", "--xattrs", "--acls", "--numeric-owner"])
            .args(PIECES)
            .output()
            .expect("tar runs");
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        let (index, file) = oddlayers::index_blob(&tar.stdout).expect("indexed");
        let view = View::merge(&[&index]).expect("merges");
        let written = mount::write(&view, &Files(vec![file])).expect("written");
        assert_eq!(written.summary.appendix_size, 0);
        mount::fsck(&written);
        let mut got = mount::kernel_tree(&written);
        // Links may lead from one piece to the other, so names of groups and counts are compared apart.
        for piece in PIECES {
            let mut expected = tree::Tree::new();
            for (path, mut e) in tree::of_dir(&Path::new("/").join(piece)) {
                let path = if path == "." { piece.to_owned() } else { format!("{piece}/{path}") };
                let linked = e.remove("link").is_some();
                let same = got.get(&path).is_some_and(|g| g.contains_key("link") == linked);
                assert!(same, "{path}: link groups differ");
                e.remove("nlink");
                e.insert("path".into(), path.clone().into());
                expected.insert(path, e);
            }
            let prefix = format!("{piece}/");
            let mut of_piece = tree::Tree::new();
            for (path, e) in &mut got {
                if path == piece || path.starts_with(&prefix) {
                    e.remove("link");
                    e.remove("nlink");
                    of_piece.insert(path.clone(), e.clone());
                }
            }
            let differences = tree::compare_strictly(&expected, &of_piece);
            assert!(differences.is_empty(), "{differences:#?}");
            assert!(expected.len() > 50, "{piece} holds next to nothing");
        }
    }
}
