//! What a union does when its upper layer can't take what is written: full, read-only, gone.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use lazyrun_fs::union::UnionConfig;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::fuse_support::wait_for;
use crate::union_support::{Case, Mounted, case, set_xattr};

const BIG: usize = 12 << 20;

/// The filesystem of an upper layer of its own.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tmpfs,
    Ext4,
}

/// A filesystem of a few MiB that goes when this is dropped.
struct Small(PathBuf);

impl Small {
    fn new(case: &Case, kind: Kind) -> Small {
        let at = case.site.path("small");
        fs::create_dir(&at).unwrap();
        match kind {
            Kind::Tmpfs => {
                mount(Some("small"), &at, Some("tmpfs"), MsFlags::empty(), Some("size=8m")).unwrap();
            }
            Kind::Ext4 => {
                let image = case.site.path("image");
                File::create(&image).unwrap().set_len(8 << 20).unwrap();
                run(Command::new("mkfs.ext4").args(["-q", "-m0", "-O^has_journal"]).arg(&image));
                run(Command::new("mount").args(["-o", "loop"]).args([&image, &at]));
            }
        }
        for name in ["upper", "work"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        Small(at)
    }

    fn union(&self, case: &Case) -> Mounted {
        let (upper, work) = (Some(self.0.join("upper")), Some(self.0.join("work")));
        case.site.ours(UnionConfig { upper, work, ..case.config() })
    }

    fn names(&self, dir: &str) -> Vec<String> {
        let list = fs::read_dir(self.0.join(dir)).unwrap();
        list.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Contents that differ from block to block.
fn contents() -> Vec<u8> {
    (0..BIG).map(|i| (i / 4096 * 31 + i) as u8).collect()
}

fn fill(lower: &Path) {
    fs::write(lower.join("big"), contents()).unwrap();
    fs::write(lower.join("small"), "small").unwrap();
    fs::create_dir(lower.join("d")).unwrap();
    fs::write(lower.join("d/deep"), contents()).unwrap();
}

fn code(result: std::io::Result<()>) -> i32 {
    result.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0)
}

fn append(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(b"+")
}

/// Copy-up that does not fit leaves the lower file as it is.
fn full(kind: Kind) {
    let case = case(fill);
    let small = Small::new(&case, kind);
    let union = small.union(&case);
    let at = |name: &str| union.at.join(name);
    let facts = |name: &str| {
        let m = fs::metadata(at(name)).unwrap();
        (m.ino(), m.size(), m.mode(), m.mtime(), m.nlink())
    };
    for name in ["big", "d/deep"] {
        let before = facts(name);
        let mut reader = File::open(at(name)).unwrap();
        assert_eq!(code(append(&at(name))), libc::ENOSPC, "{kind:?}: {name}");
        let chmod = fs::set_permissions(at(name), fs::Permissions::from_mode(0o600));
        assert_eq!(code(chmod), libc::ENOSPC, "{kind:?}: {name}");
        assert_eq!(set_xattr(&at(name), "user.x", b"x", 0), Err(libc::ENOSPC), "{kind:?}: {name}");
        assert_eq!(facts(name), before);
        assert!(fs::read(at(name)).unwrap() == contents(), "{kind:?}: {name} is whole");
        let mut read = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut read).unwrap();
        assert!(read == contents(), "{kind:?}: {name} is whole for who has it open");
    }
    assert!(small.names("upper").iter().all(|name| name == "d"), "{:?}", small.names("upper"));
    assert!(small.names("upper/d").is_empty());
    assert!(
        !small.names("work/work").iter().any(|name| name != "#whiteout"),
        "{:?}",
        small.names("work/work")
    );

    // Full to the last block: what is reserved for late allocation comes free when that is done, and what was removed
    // when the journal is written.
    let mut filler = File::create(at("filler")).unwrap();
    let upper = File::open(small.0.join("upper")).unwrap();
    let (mut written, mut in_vain) = (0, 0);
    while in_vain < 4 {
        let before = written;
        let error = loop {
            match filler.write(&[7; 512]) {
                Ok(n) => written += n as u64,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        in_vain = if written == before { in_vain + 1 } else { 0 };
        filler.sync_all().unwrap();
        nix::unistd::syncfs(&upper).unwrap();
    }
    assert!(written > 1 << 20);
    assert_eq!(fs::metadata(at("filler")).unwrap().size(), written);
    assert_eq!(code(append(&at("small"))), libc::ENOSPC, "{kind:?}");
    assert_eq!(fs::read(at("small")).unwrap(), b"small");
    drop(filler);
    fs::remove_file(at("filler")).unwrap();
    // The kernel tells us some time later that it was closed.
    let free = || nix::sys::statvfs::statvfs(&union.at).unwrap().blocks_available() > 100;
    wait_for("the space of a removed file", free);

    // There is room for what is not copied, and for what fits.
    append(&at("small")).unwrap();
    assert_eq!(fs::read(at("small")).unwrap(), b"small+");
    OpenOptions::new().write(true).open(at("d/deep")).unwrap_err();
    File::create(at("d/deep")).unwrap().write_all(b"short").unwrap();
    assert_eq!(fs::read(at("d/deep")).unwrap(), b"short");
    fs::remove_file(at("big")).unwrap();
    assert_eq!(code(fs::metadata(at("big")).map(drop)), libc::ENOENT);
    assert!(fs::read(case.lower.join("big")).unwrap() == contents());
}

#[test]
fn a_file_too_large_for_the_upper_stays_whole() {
    full(Kind::Tmpfs);
}

/// Here space is only found missing when the blocks are allocated, behind the write.
#[test]
fn a_file_too_large_for_an_upper_that_allocates_late_stays_whole() {
    full(Kind::Ext4);
}

#[test]
fn an_upper_that_became_read_only_can_still_be_read() {
    let case = case(fill);
    let small = Small::new(&case, Kind::Tmpfs);
    // Not through the union: the kernel closes files there some time later, and one open for writing is in the way.
    fs::write(small.0.join("upper/new"), "new").unwrap();
    let union = small.union(&case);
    let at = |name: &str| union.at.join(name);
    let remount =
        |flags| mount(None::<&str>, &small.0, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>);
    remount(MsFlags::MS_RDONLY).unwrap();
    let answers = [
        ("create", code(fs::write(at("other"), "x"))),
        ("append to an upper file", code(append(&at("new")))),
        ("copy up", code(append(&at("small")))),
        ("chmod", code(fs::set_permissions(at("small"), fs::Permissions::from_mode(0o600)))),
        ("mkdir", code(fs::create_dir(at("dir")))),
        ("unlink in the upper", code(fs::remove_file(at("new")))),
        ("unlink in the lower", code(fs::remove_file(at("small")))),
        ("rename", code(fs::rename(at("new"), at("newer")))),
        ("link", code(fs::hard_link(at("new"), at("newer")))),
        ("xattr", set_xattr(&at("new"), "user.x", b"x", 0).err().unwrap_or(0)),
    ];
    for (what, answer) in answers {
        assert_eq!(answer, libc::EROFS, "{what}");
    }
    assert_eq!(fs::read(at("new")).unwrap(), b"new");
    assert_eq!(fs::read(at("small")).unwrap(), b"small");
    assert!(fs::read(at("big")).unwrap() == contents());
    remount(MsFlags::empty()).unwrap();
    append(&at("small")).unwrap();
    fs::remove_file(at("new")).unwrap();
    assert_eq!(code(fs::metadata(at("new")).map(drop)), libc::ENOENT);
}

#[test]
fn lower_files_are_there_when_the_upper_directory_is_gone() {
    let case = case(fill);
    let union = case.mount();
    let at = |name: &str| union.at.join(name);
    for name in ["upper", "work"] {
        fs::remove_dir_all(case.site.path(name)).unwrap();
    }
    assert_eq!(fs::read(at("small")).unwrap(), b"small");
    assert!(fs::read(at("d/deep")).unwrap() == contents());
    for answer in [code(fs::write(at("other"), "x")), code(append(&at("small"))), code(append(&at("d/deep")))]
    {
        assert_eq!(answer, libc::ENOENT);
    }
    assert_eq!(code(fs::create_dir(at("dir"))), libc::ENOENT);
    assert_eq!(fs::read(at("small")).unwrap(), b"small");
}
