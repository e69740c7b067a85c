//! The mounted tree against containerd's unpack, and against what the odd and hostile layers expect.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use serde::Deserialize;

use crate::support::containerd::Containerd;
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, TAG, sha256};
use crate::support::instance::Lazyrun;
use crate::support::tree::{assert_equal, differences, from_json_lines, scan};

/// Mounts an image by a plan; by plan `fuse` writable, for only then there is a union.
fn mount_by<'a>(plan: &'a str, image: &'a str, dir: &'a str) -> Vec<&'a str> {
    let mut command = vec!["mount", "--union", plan];
    command.extend((plan == "fuse").then_some("--rw"));
    command.extend([image, dir]);
    command
}

/// Compares a mount by the given plan with containerd's overlayfs.
fn compare_with_containerd(plan: &str) {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let registry = DockerRegistry::start();
    let image = registry.push(fixture.layout(), TAG, "fixture");
    let mut containerd = Containerd::start();
    let theirs = lazyrun.scratch("containerd");
    containerd.pull(&image);
    containerd.mount(&image, &theirs);
    let ours = lazyrun.scratch("ours");
    lazyrun.ok(&mount_by(plan, &image, ours.to_str().unwrap()));
    let (expected, actual) = (scan(&theirs), scan(&ours));
    assert!(expected.len() > 350, "only {} entries in containerd's tree", expected.len());
    lazyrun.ok(&["umount", ours.to_str().unwrap()]);
    assert_equal(&expected, &actual);
}

#[test]
fn plan_erofs_equals_containerd() {
    compare_with_containerd("erofs");
}

#[test]
fn plan_overlay_equals_containerd() {
    compare_with_containerd("overlay");
}

#[test]
fn plan_fuse_equals_containerd() {
    compare_with_containerd("fuse");
}

#[test]
fn a_mount_is_read_only_unless_asked() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let (image, dir) = (fixture.image(), lazyrun.scratch("mount"));
    let dir_text = dir.to_str().unwrap();
    lazyrun.ok(&["mount", &image, dir_text]);
    let root = fs::metadata(&dir).unwrap();
    assert_eq!((root.permissions().mode() & 0o7777, root.uid(), root.gid()), (0o755, 0, 0));
    let error = fs::write(dir.join("data/new"), "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    lazyrun.ok(&["umount", dir_text]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);

    lazyrun.ok(&["mount", "--rw", &image, dir_text]);
    fs::write(dir.join("data/last"), "changed").unwrap();
    assert_eq!(fs::read_to_string(dir.join("data/last")).unwrap(), "changed");
    lazyrun.ok(&["umount", dir_text]);
    lazyrun.ok(&["mount", &image, dir_text]);
    assert_eq!(fs::read_to_string(dir.join("data/last")).unwrap(), "behind the big file\n");
    lazyrun.ok(&["umount", dir_text]);
}

#[derive(Deserialize)]
struct Case {
    expect: String,
    big: bool,
}

/// Files that an escaping layer would have made or changed.
fn host_guard() -> Vec<String> {
    let made = ["/etc/evil", "/tmp/lazyrun-EVIL1", "/tmp/lazyrun-EVIL2", "/inside"];
    let mut state: Vec<String> = made.iter().map(|path| Path::new(path).exists().to_string()).collect();
    let passwd = fs::read("/etc/passwd").unwrap();
    state.push(format!("{} {}", sha256(&passwd), fs::metadata("/etc/passwd").unwrap().nlink()));
    state
}

/// Mounts every case of tests/oddlayers by a plan; returns what went wrong.
fn judge_odd_layers(plan: &str) -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oddlayers");
    let cases = fs::read_to_string(dir.join("cases.json")).expect("read tests/oddlayers/cases.json");
    let cases: BTreeMap<String, Case> = serde_json::from_str(&cases).expect("cases.json");
    assert!(cases.len() > 80, "only {} cases", cases.len());
    let lazyrun = Lazyrun::new();
    let registry = Registry::serve(&dir.join("layout"), Shape::default()).expect("serve the odd layers");
    let before = host_guard();
    let mut wrong = Vec::new();
    for (tag, case) in cases.iter().filter(|(_, case)| !case.big) {
        let mount = lazyrun.scratch(&format!("odd/{tag}"));
        let (image, mount_text) = (registry.reference("odd", tag), mount.to_str().unwrap());
        let finished = lazyrun.run(&mount_by(plan, &image, mount_text));
        let mounted = finished.code == Some(0);
        if !mounted && (finished.code != Some(125) || finished.stderr.contains("panicked")) {
            wrong.push(format!("{tag}: a refusal exits with 125: {finished:?}"));
        }
        match (case.expect.as_str(), mounted) {
            ("ok", false) => wrong.push(format!("{tag}: refused: {}", finished.stderr.trim())),
            ("reject", true) => wrong.push(format!("{tag}: accepted")),
            ("ok", true) => {
                let expected = fs::read_to_string(dir.join(format!("expected/{tag}.jsonl")));
                let expected = from_json_lines(&expected.expect("an expected tree"));
                let found = differences(&expected, &scan(&mount));
                wrong.extend(found.iter().take(4).map(|difference| format!("{tag}: {difference}")));
            }
            // Real tools disagree: any result will do, as long as it can be read.
            (_, true) => drop(scan(&mount)),
            (_, false) => {}
        }
        if mounted {
            let finished = lazyrun.run(&["umount", mount_text]);
            if finished.code != Some(0) {
                wrong.push(format!("{tag}: not unmounted: {finished:?}"));
            }
        }
        assert_eq!(host_guard(), before, "{tag} escaped");
    }
    wrong
}

#[test]
fn odd_layers_by_plan_erofs() {
    let wrong = judge_odd_layers("erofs");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn odd_layers_by_plan_overlay() {
    let wrong = judge_odd_layers("overlay");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn odd_layers_by_plan_fuse() {
    let wrong = judge_odd_layers("fuse");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
