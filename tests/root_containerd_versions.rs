//! What only newer versions of containerd do than Debian 12's 1.6: `make test-containerd` runs these tests with them.

use std::fs;
use std::process::Command;

use lazyrun::demo::shaper::Shape;
use lazyrun_index::Digest;

use crate::support::containerd::{Containerd, PROXY, version};
use crate::support::fixture::{Fixture, big, sha256};
use crate::support::indexed::Indexed;
use crate::support::snapshotter::{Snapshotter, pull};
use crate::support::tree::{assert_equal, scan};

/// Whether the containerd that is found first is as new as that; where it is not, it is said. One that is older than
/// `LAZYRUN_EXPECT_CONTAINERD` says is not the one that was to be tested.
fn at_least(wanted: (u32, u32)) -> bool {
    let found = version();
    if let Ok(expected) = std::env::var("LAZYRUN_EXPECT_CONTAINERD") {
        let (major, minor) = expected.split_once('.').expect("MAJOR.MINOR");
        let expected = (major.parse().expect("a number"), minor.parse().expect("a number"));
        assert!(
            found >= expected,
            "containerd is {found:?}, not {expected:?} as LAZYRUN_EXPECT_CONTAINERD says"
        );
    }
    if found < wanted {
        eprintln!("not tested: containerd is {found:?}, and this needs {wanted:?}");
    }
    found >= wanted
}

#[test]
#[ignore = "needs containerd 1.7.4: make test-containerd"]
fn a_commit_goes_to_our_differ() {
    if !at_least((1, 7)) {
        return;
    }
    let indexed = Indexed::behind(Shape::default());
    let (image, snapshotter) = (&indexed.image, Snapshotter::start());
    snapshotter.lazyrun.ok(&["hydrate", "--pause"]);
    let mut containerd = snapshotter.containerd_with_differ();
    let plugins = containerd.output(["plugins", "ls"]);
    let differ = plugins.lines().find(|line| line.contains("lazyrun-diff")).expect("the differ");
    assert!(differ.trim_end().ends_with("ok"), "{differ}");
    pull(&containerd, image);
    let script = "mkdir /work && echo by the container >/work/file && rm /etc/passwd";
    containerd.run(["run", "--snapshotter", PROXY, image, "work", "sh", "-c", script]);
    let work = snapshotter.lazyrun.scratch("work");
    let target = work.to_str().unwrap();
    let mounts = containerd.output(["snapshots", "--snapshotter", PROXY, "mounts", target, "work"]);
    assert!(Command::new("sh").args(["-ec", &mounts]).status().unwrap().success(), "{mounts}");
    // Only root may set such, and images may carry them.
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(work.join("work/file"), "trusted.note", b"kept", flags).unwrap();
    rustix::fs::setxattr(work.join("work/file"), "user.note", b"kept", flags).unwrap();
    let ours = scan(&work.join("work"));
    nix::mount::umount2(&work, nix::mount::MntFlags::MNT_DETACH).unwrap();

    let before = indexed.shaper.traffic().bytes_down;
    let args =
        ["snapshots", "--snapshotter", PROXY, "diff", "--keep", "--label", "containerd.io/gc.root=1", "work"];
    let output = containerd.ctr(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(indexed.shaper.traffic().bytes_down, before, "no byte of the image is read for a commit");
    let digest = Digest::of(&output.stdout).to_string();
    let listed = containerd.output(["content", "ls"]);
    assert!(listed.contains(&digest), "{listed}");
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(output.stdout.as_slice()), &mut tar)
        .unwrap();
    let mut archive = tar::Archive::new(tar.as_slice());
    let entries = archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned());
    let names: Vec<String> =
        entries.map(|path| path.to_string_lossy().trim_end_matches('/').to_owned()).collect();
    for name in ["work/file", "etc/.wh.passwd"] {
        assert!(names.iter().any(|known| known == name), "{name}: {names:?}");
    }
    assert!(!names.iter().any(|name| name.starts_with("data")), "{names:?}");

    // Committed as an image is, it is the container's tree again.
    let top = containerd.top_committed();
    let layer = snapshotter.lazyrun.scratch("layer").join("tar");
    fs::write(&layer, &tar).unwrap();
    let again = snapshotter.lazyrun.scratch("again");
    containerd.mount_snapshot("prepare", "again", &top, &again);
    let unpacked = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "-xpf"])
        .arg(&layer)
        .arg("-C")
        .arg(&again)
        .status();
    assert!(unpacked.unwrap().success());
    fs::remove_file(again.join("etc/passwd")).unwrap();
    let kept = |name: &str| {
        let mut value = [0; 16];
        let len = rustix::fs::getxattr(again.join("work/file"), name, &mut value).unwrap_or(0);
        value[..len].to_vec()
    };
    assert_eq!((kept("trusted.note"), kept("user.note")), (b"kept".to_vec(), b"kept".to_vec()));
    assert_equal(&ours, &scan(&again.join("work")));
}

#[test]
#[ignore = "needs containerd 1.7: make test-containerd"]
fn images_are_mounted_measured_and_unmounted() {
    if !at_least((1, 7)) {
        return;
    }
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd());
    pull(&containerd, &image);
    let dir = snapshotter.lazyrun.scratch("mounted");
    let target = dir.to_str().unwrap();
    containerd.run(["images", "mount", "--snapshotter", PROXY, &image, target]);
    let sum = sha256(&fs::read(dir.join("data/big.bin")).unwrap());
    assert_eq!(sum, sha256(&big()));
    let usage = containerd.output(["images", "usage", "--snapshotter", PROXY, &image]);
    assert!(usage.contains("MiB"), "{usage}");
    containerd.run(["images", "unmount", "--snapshotter", PROXY, "--rm", target]);
    assert!(!dir.join("data").exists());
    containerd.remove(&image);
    assert_eq!(snapshotter.mounts(), Vec::<String>::new());
}

#[test]
#[ignore = "needs containerd 2.1: make test-containerd"]
fn the_transfer_service_pulls_lazily() {
    if !at_least((2, 1)) {
        return;
    }
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let containerd = Containerd::with_annotations(snapshotter.socket());
    let image = fixture.image();
    containerd.run(["images", "pull", "--plain-http", "--snapshotter", PROXY, &image]);
    let content = containerd.output(["content", "ls", "-q"]);
    for layer in &fixture.layers {
        assert!(!content.contains(&layer.digest), "a layer was downloaded: {content}");
    }
    let args = ["run", "--rm", "--snapshotter", PROXY, &image, "once", "cat", "/data/first"];
    assert_eq!(containerd.output(args), "replaced\n");
}
