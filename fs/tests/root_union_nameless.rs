//! Files of a union that are made without a name (`O_TMPFILE`).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use lazyrun_fs::union::{Caller, ROOT, Union};
use nix::errno::Errno;

use crate::union_support::{Mounted, case, link_open};

const CALLER: Caller = Caller { uid: 7, gid: 8, pid: 0 };

fn nameless(dir: &Path, flags: i32) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o640).custom_flags(libc::O_TMPFILE | flags);
    options.open(dir).expect("a file without a name")
}

fn names(dir: &Path) -> Vec<String> {
    let list = fs::read_dir(dir).expect("directory");
    let mut names: Vec<_> = list.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn they_are_files_that_nothing_lists() {
    let case = case(|l| fs::create_dir(l.join("d")).unwrap());
    let union = case.mount();
    let mut file = nameless(&union.at.join("d"), 0);
    file.write_all(b"some text").unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "some text");
    file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    file.set_len(4).unwrap();
    let seen = file.metadata().unwrap();
    assert_eq!((seen.nlink(), seen.len(), seen.mode() & 0o7777), (0, 4, 0o600));
    for dir in [union.at.join("d"), case.site.path("upper/d"), case.site.path("work/work")] {
        assert_eq!(names(&dir), [""; 0], "{}", dir.display());
    }
}

/// Reads a file by its name, in the union and in the upper directory.
fn both(union: &Mounted, upper: &Path, name: &str) -> (String, String) {
    (fs::read_to_string(union.at.join(name)).unwrap(), fs::read_to_string(upper.join(name)).unwrap())
}

#[test]
fn they_get_a_name_when_they_are_linked() {
    let case = case(|l| fs::write(l.join("old"), "old").unwrap());
    let union = case.mount();
    let upper = case.site.path("upper");
    let mut file = nameless(&union.at, 0);
    file.write_all(b"whole").unwrap();
    assert_eq!(link_open(&file, &union.at.join("old")), Err(Errno::EEXIST), "of a lower file");
    link_open(&file, &union.at.join("new")).unwrap();
    assert_eq!(both(&union, &upper, "new"), ("whole".into(), "whole".into()));
    let (open, named) = (file.metadata().unwrap(), fs::metadata(union.at.join("new")).unwrap());
    assert_eq!((open.ino(), open.nlink()), (named.ino(), 1));
    // Over a whiteout, and a second name.
    fs::remove_file(union.at.join("old")).unwrap();
    link_open(&file, &union.at.join("old")).unwrap();
    file.write_all(b" again").unwrap();
    assert_eq!(both(&union, &upper, "old"), ("whole again".into(), "whole again".into()));
    assert_eq!(file.metadata().unwrap().nlink(), 2);
    // It is like any other from here on: names move and go, what is open stays.
    fs::rename(union.at.join("new"), union.at.join("moved")).unwrap();
    assert_eq!(names(&union.at), ["moved", "old"]);
    fs::remove_file(union.at.join("moved")).unwrap();
    fs::remove_file(union.at.join("old")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "whole again");
}

#[test]
fn those_that_may_not_be_linked_are_not() {
    let case = case(|_| {});
    let union = case.mount();
    let file = nameless(&union.at, libc::O_EXCL);
    assert_eq!(link_open(&file, &union.at.join("new")), Err(Errno::ENOENT));
    assert_eq!(names(&case.site.path("upper")), [""; 0]);
}

#[test]
fn they_belong_to_who_makes_them_and_are_forgotten_with_them() {
    let case = case(|l| {
        fs::create_dir(l.join("group")).unwrap();
        std::os::unix::fs::chown(l.join("group"), None, Some(9)).unwrap();
        fs::set_permissions(l.join("group"), fs::Permissions::from_mode(0o2775)).unwrap();
    });
    let union = Union::open(case.config()).unwrap();
    let root = union.node(ROOT).unwrap();
    let (dir, _) = union.lookup(&root, c"group").unwrap().unwrap();
    let known = union.known();
    let flags = libc::O_TMPFILE | libc::O_RDWR;
    let make = |dir, mode| union.create_nameless(dir, (mode, 0o022), flags, CALLER).unwrap();
    for (dir, gid) in [(&root, 8), (&dir, 9)] {
        let (node, attr, file) = make(dir, 0o666);
        assert_eq!((attr.stat.st_uid, attr.stat.st_gid, attr.stat.st_mode & 0o7777), (7, gid, 0o644));
        file.write(b"x", 0, None).unwrap();
        assert_eq!(union.attr(&node).unwrap().stat.st_size, 1);
        let id = node.id();
        drop((node, file));
        union.forget([(id, 1)]);
        assert_eq!(union.known(), known);
    }
}
