//! What single operations on a union promise, one test a promise. The comparison with overlayfs is
//! `root_union_model`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use lazyrun_fs::union::{RedirectDir, UnionConfig};

use crate::union_support::{case, set_xattr, xattrs};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::sys::stat::{Mode, SFlag, mknod};

/// Runs a shell line as somebody without rights; true if it succeeds.
fn as_nobody(line: &str) -> bool {
    Command::new("sh").args(["-c", line]).uid(65534).gid(65534).status().unwrap().success()
}

#[test]
fn a_reader_of_a_lower_file_sees_what_is_written_later() {
    let case = case(|l| fs::write(l.join("f"), "old").unwrap());
    let union = case.mount();
    let mut reader = File::open(union.at.join("f")).unwrap();
    let number = reader.metadata().unwrap().ino();
    fs::write(union.at.join("f"), "newer").unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "newer");
    assert_eq!(fs::metadata(union.at.join("f")).unwrap().ino(), number, "copy-up keeps the number");
    assert_eq!(fs::read(case.lower.join("f")).unwrap(), b"old");
}

#[test]
fn files_without_a_name_stay_usable() {
    let case = case(|l| {
        fs::write(l.join("low"), "lower").unwrap();
        fs::write(l.join("over"), "x").unwrap();
    });
    let union = case.mount();
    let at = |name: &str| union.at.join(name);
    fs::write(at("up"), "upper").unwrap();
    for name in ["low", "up"] {
        let mut file = OpenOptions::new().read(true).write(true).open(at(name)).unwrap();
        fs::remove_file(at(name)).unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(b"+").unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!((file.metadata().unwrap().nlink(), file.metadata().unwrap().mode() & 0o777), (0, 0o600));
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("er+"), "{text}");
    }
    // A lower file that nobody has opened for writing.
    let reader = File::open(at("over")).unwrap();
    fs::write(at("new"), "y").unwrap();
    fs::rename(at("new"), at("over")).unwrap();
    let mut byte = [0];
    reader.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!((&byte, fs::read(at("over")).unwrap()), (b"x", b"y".to_vec()));
}

#[test]
fn shared_mappings_reach_the_file() {
    let case = case(|l| fs::write(l.join("f"), [b'.'; 8192]).unwrap());
    let union = case.mount();
    let file = OpenOptions::new().read(true).write(true).open(union.at.join("f")).unwrap();
    let len = NonZeroUsize::new(8192).unwrap();
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file that nobody truncates, used as bytes only and unmapped below.
    unsafe {
        let map = mmap(None, len, prot, MapFlags::MAP_SHARED, file.as_fd(), 0).unwrap();
        map.cast::<u8>().add(5000).write(b'!');
        msync(map, 8192, MsFlags::MS_SYNC).unwrap();
        munmap(map, 8192).unwrap();
    }
    assert_eq!(fs::read(union.at.join("f")).unwrap()[5000], b'!');
    assert_eq!(fs::read(case.site.path("upper").join("f")).unwrap()[5000], b'!');
}

#[test]
fn names_of_a_lower_link_group_part() {
    let case = case(|l| {
        fs::write(l.join("a"), "1").unwrap();
        fs::hard_link(l.join("a"), l.join("b")).unwrap();
    });
    let union = case.mount();
    let number = |n: &str| fs::metadata(union.at.join(n)).unwrap().ino();
    assert_eq!(number("a"), number("b"), "one file as long as nothing is changed");
    OpenOptions::new().append(true).open(union.at.join("a")).unwrap().write_all(b"2").unwrap();
    assert_eq!(fs::read(union.at.join("a")).unwrap(), b"12");
    assert_eq!(fs::read(union.at.join("b")).unwrap(), b"1");
    fs::hard_link(union.at.join("a"), union.at.join("c")).unwrap();
    OpenOptions::new().append(true).open(union.at.join("c")).unwrap().write_all(b"3").unwrap();
    assert_eq!(fs::read(union.at.join("a")).unwrap(), b"123", "links of the upper layer hold");
    assert_eq!(number("a"), number("c"));
}

#[test]
fn copy_up_keeps_everything() {
    let acl = acl();
    let case = case(|l| {
        let path = l.join("f");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", 10 << 20).unwrap();
        set_xattr(&path, "user.colour", b"green", 0).unwrap();
        set_xattr(&path, "system.posix_acl_access", &acl, 0).unwrap();
        std::os::unix::fs::chown(&path, Some(7), Some(8)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    });
    let union = case.mount();
    let (path, upper) = (union.at.join("f"), case.site.path("upper/f"));
    let before = (fs::metadata(&path).unwrap(), xattrs(&path));
    set_xattr(&path, "user.new", b"1", 0).unwrap();
    let after = (fs::metadata(&upper).unwrap(), xattrs(&upper));
    let facts = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.size(), m.mtime(), m.mtime_nsec());
    assert_eq!(facts(&before.0), facts(&after.0));
    assert!(after.0.blocks() < 1000, "the hole stays a hole");
    for (name, value) in &before.1 {
        assert_eq!(after.1.get(name), Some(value), "{}", String::from_utf8_lossy(name));
    }
    assert_eq!(before.1.len() + 1, after.1.len());
    assert_eq!(fs::read(&path).unwrap(), fs::read(case.lower.join("f")).unwrap());
}

/// `u::rwx u:5:r-- g::r-x m::r-x o::---`, as the kernel keeps it.
fn acl() -> Vec<u8> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1u16, 7u16, u32::MAX), (2, 4, 5), (4, 5, u32::MAX), (0x10, 5, u32::MAX), (0x20, 0, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

#[test]
fn new_files_inherit_default_acls_also_where_a_whiteout_was() {
    let case = case(|l| {
        fs::create_dir(l.join("d")).unwrap();
        fs::write(l.join("d/f"), "").unwrap();
        set_xattr(&l.join("d"), "system.posix_acl_default", &acl(), 0).unwrap();
    });
    let union = case.mount();
    let dir = union.at.join("d");
    fs::remove_file(dir.join("f")).unwrap();
    for name in ["f", "g"] {
        fs::write(dir.join(name), "").unwrap();
        let has = xattrs(&dir.join(name));
        assert!(has.contains_key(&b"system.posix_acl_access"[..]), "{name}: {has:?}");
    }
}

#[test]
fn directories_of_lower_layers_do_not_move_but_new_ones_do() {
    let case = case(|l| {
        fs::create_dir_all(l.join("low/sub")).unwrap();
        fs::create_dir(l.join("target")).unwrap();
        fs::write(l.join("target/f"), "").unwrap();
    });
    let union = case.mount();
    let at = |name: &str| union.at.join(name);
    let error = fs::rename(at("low"), at("other")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
    fs::create_dir_all(at("new/sub")).unwrap();
    fs::write(at("new/sub/f"), "deep").unwrap();
    let inside = File::open(at("new/sub/f")).unwrap();
    fs::remove_file(at("target/f")).unwrap();
    fs::rename(at("new"), at("target")).unwrap();
    assert_eq!(fs::read(at("target/sub/f")).unwrap(), b"deep");
    fs::write(at("target/sub/g"), "made after the move").unwrap();
    assert_eq!(fs::read_dir(at("target")).unwrap().count(), 1, "nothing shines through");
    assert_eq!(inside.metadata().unwrap().size(), 4);
}

#[test]
fn set_id_bits_go_when_others_write() {
    let case = case(|l| {
        for name in ["w", "t", "c"] {
            fs::write(l.join(name), "program").unwrap();
            fs::set_permissions(l.join(name), fs::Permissions::from_mode(0o6777)).unwrap();
        }
    });
    fs::set_permissions(case.site.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let union = case.mount();
    let at = union.at.display();
    let mode = |n: &str| fs::metadata(union.at.join(n)).unwrap().mode() & 0o7777;
    assert!(as_nobody(&format!("echo x >> {at}/w && : > {at}/t")));
    assert_eq!((mode("w"), mode("t")), (0o777, 0o777));
    std::os::unix::fs::chown(union.at.join("c"), Some(5), None).unwrap();
    assert_eq!(mode("c"), 0o777, "chown takes them");
}

#[test]
fn permissions_are_checked() {
    let case = case(|l| {
        fs::create_dir(l.join("d")).unwrap();
        fs::write(l.join("d/secret"), "").unwrap();
        fs::set_permissions(l.join("d/secret"), fs::Permissions::from_mode(0o600)).unwrap();
    });
    fs::set_permissions(case.site.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let union = case.mount();
    fs::create_dir(union.at.join("open")).unwrap();
    fs::set_permissions(union.at.join("open"), fs::Permissions::from_mode(0o3777)).unwrap();
    let at = union.at.display();
    assert!(!as_nobody(&format!("cat {at}/d/secret 2>/dev/null")));
    assert!(!as_nobody(&format!("touch {at}/d/new 2>/dev/null")));
    assert!(as_nobody(&format!("umask 027; echo x > {at}/open/mine; mkdir {at}/open/sub")));
    let facts = |name: &str| {
        let m = fs::metadata(union.at.join(name)).unwrap();
        (m.mode() & 0o7777, m.uid(), m.gid())
    };
    assert_eq!(facts("open/mine"), (0o640, 65534, 0), "group of the directory");
    assert_eq!(facts("open/sub"), (0o2750, 65534, 0));
}

/// The kernel lets everybody ask then; who may is checked here.
#[test]
fn with_allow_root_nobody_else_may_ask() {
    let case = case(|l| fs::write(l.join("f"), "text").unwrap());
    fs::set_permissions(case.site.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (option, may) in [("allow_root", false), ("allow_other", true)] {
        let union = case.site.ours(UnionConfig { mount_options: vec![option.to_owned()], ..case.config() });
        let file = union.at.join("f");
        assert_eq!(fs::read(&file).unwrap(), b"text");
        assert_eq!(as_nobody(&format!("cat {} >/dev/null 2>&1", file.display())), may, "{option}");
    }
}

#[test]
fn special_files_and_their_attributes() {
    let case = case(|l| {
        mknod(&l.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), libc::makedev(1, 3)).unwrap();
        symlink("null", l.join("link")).unwrap();
    });
    let union = case.mount();
    let at = |name: &str| union.at.join(name);
    fs::write(at("null"), "swallowed").unwrap();
    fs::set_permissions(at("null"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(fs::metadata(case.site.path("upper/null")).unwrap().rdev(), libc::makedev(1, 3));
    std::os::unix::fs::lchown(at("link"), Some(3), None).unwrap();
    assert_eq!(fs::symlink_metadata(at("link")).unwrap().uid(), 3);
    assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("null"));
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    assert!(fs::metadata(at("socket")).unwrap().file_type().is_socket());
    let whiteout = mknod(&at("wh"), SFlag::S_IFCHR, Mode::empty(), 0);
    assert_eq!(whiteout, Err(nix::errno::Errno::EPERM), "as on overlayfs");
}

#[test]
fn marks_are_hidden_and_nest() {
    let case = case(|l| {
        fs::create_dir(l.join("d")).unwrap();
        fs::write(l.join("d/f"), "").unwrap();
    });
    let union = case.mount();
    let dir = union.at.join("d");
    fs::remove_dir_all(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    assert_eq!(xattrs(&case.site.path("upper/d"))[&b"trusted.overlay.opaque"[..]], b"y");
    assert_eq!(xattrs(&dir).len(), 0, "not seen from within");
    set_xattr(&dir, "trusted.overlay.opaque", b"n", 0).unwrap();
    assert_eq!(xattrs(&dir)[&b"trusted.overlay.opaque"[..]], b"n");
    assert_eq!(xattrs(&case.site.path("upper/d"))[&b"trusted.overlay.overlay.opaque"[..]], b"n");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_large_directory_can_be_emptied_while_it_is_read() {
    let case = case(|l| {
        fs::create_dir(l.join("d")).unwrap();
        (0..3000).for_each(|i| fs::write(l.join(format!("d/lower{i}")), "").unwrap());
    });
    let union = case.mount();
    let dir = union.at.join("d");
    (0..3000).for_each(|i| fs::write(dir.join(format!("upper{i}")), "").unwrap());
    let mut count = 0;
    for entry in fs::read_dir(&dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        count += 1;
    }
    assert_eq!(count, 6000);
    fs::remove_dir(&dir).unwrap();
    assert!(!dir.exists());
    let whiteout = fs::symlink_metadata(case.site.path("upper/d")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

#[test]
fn numbers_tell_files_apart_and_listings_agree_with_stat() {
    let case = case(|l| {
        fs::create_dir(l.join("d")).unwrap();
        (0..20).for_each(|i| fs::write(l.join(format!("d/{i}")), "").unwrap());
    });
    let union = case.mount();
    let dir = union.at.join("d");
    (0..10).for_each(|i| fs::write(dir.join(i.to_string()), "up").unwrap());
    (20..30).for_each(|i| fs::write(dir.join(i.to_string()), "new").unwrap());
    let mut seen = std::collections::HashSet::new();
    for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        use std::os::unix::fs::DirEntryExt;
        let stat = fs::symlink_metadata(entry.path()).unwrap();
        assert_eq!(entry.ino(), stat.ino(), "{}", entry.path().display());
        assert!(seen.insert(stat.ino()));
    }
    assert_eq!(seen.len(), 30);
}

#[test]
fn renamed_directories_of_lower_layers_keep_their_numbers_and_all_that_is_below() {
    let case = case(|l| {
        fs::create_dir_all(l.join("a/deep/er")).unwrap();
        fs::create_dir(l.join("b")).unwrap();
        fs::write(l.join("a/deep/er/f"), "far down").unwrap();
    });
    let config = || UnionConfig { redirect_dir: RedirectDir::On, ..case.config() };
    let union = case.site.ours(config());
    let at = |path: &str| union.at.join(path);
    let number = |path: &str| fs::metadata(at(path)).unwrap().ino();
    let (before, open) = ((number("a"), number("a/deep")), File::open(at("a/deep/er/f")).unwrap());
    let text = |file: &File| std::io::read_to_string(file).unwrap();
    fs::rename(at("a/deep"), at("b/moved")).unwrap();
    fs::rename(at("a"), at("z")).unwrap();
    fs::rename(at("b/moved"), at("b/again")).unwrap();
    assert_eq!((number("z"), number("b/again")), before);
    assert_eq!(text(&open), "far down");
    fs::write(at("b/again/er/new"), "").unwrap();
    fs::create_dir(at("a")).unwrap();
    assert_eq!(fs::read_dir(at("a")).unwrap().count(), 0, "a new one has nothing of the old one");
    assert_eq!(fs::read_dir(at("z")).unwrap().count(), 0);
    drop(open);
    drop(union);
    let union = case.site.ours(config());
    assert_eq!(fs::read_to_string(union.at.join("b/again/er/f")).unwrap(), "far down");
    for dir in ["", "b", "b/again"] {
        for entry in fs::read_dir(union.at.join(dir)).unwrap().map(Result::unwrap) {
            use std::os::unix::fs::DirEntryExt;
            let stat = fs::symlink_metadata(entry.path()).unwrap();
            assert_eq!(entry.ino(), stat.ino(), "{}", entry.path().display());
        }
    }
    drop(union);
    // Without the option what was renamed stays so, and no more is.
    let union = case.mount();
    assert_eq!(fs::read_to_string(union.at.join("b/again/er/f")).unwrap(), "far down");
    let error = fs::rename(union.at.join("z"), union.at.join("y")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
    drop(union);
    let config = UnionConfig { redirect_dir: RedirectDir::NoFollow, ..case.config() };
    let union = case.site.ours(config);
    assert_eq!(fs::read_dir(union.at.join("b/again")).unwrap().count(), 1, "er, made by the copy-up of new");
    assert!(!union.at.join("b/again/er/f").exists());
}

#[test]
fn a_directory_that_says_nonsense_about_itself_is_refused() {
    let case = case(|l| {
        fs::create_dir_all(l.join("a/b")).unwrap();
        std::os::unix::fs::symlink("/", l.join("root")).unwrap();
    });
    for (name, mark) in [("dots", "/a/../../b"), ("slash", "/"), ("nothing", ""), ("two", "a/b")] {
        let dir = case.site.path("upper").join(name);
        fs::create_dir(&dir).unwrap();
        set_xattr(&dir, "trusted.overlay.redirect", mark.as_bytes(), 0).unwrap();
    }
    let out = case.site.path("upper").join("out");
    fs::create_dir(&out).unwrap();
    set_xattr(&out, "trusted.overlay.redirect", b"/root/etc", 0).unwrap();
    let union = case.mount();
    for name in ["dots", "slash", "nothing", "two"] {
        let error = fs::metadata(union.at.join(name)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
    }
    assert_eq!(fs::read_dir(union.at.join("out")).unwrap().count(), 0, "symlinks are not followed");
}

#[test]
fn files_whose_contents_are_elsewhere_are_not_shown_empty() {
    let case = case(|l| fs::write(l.join("f"), "contents").unwrap());
    let upper = case.site.path("upper/f");
    File::create(&upper).unwrap().set_len(8).unwrap();
    set_xattr(&upper, "trusted.overlay.metacopy", b"", 0).unwrap();
    let union = case.mount();
    assert_eq!(fs::read(union.at.join("f")).unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn locks_space_and_seeking() {
    let case = case(|l| fs::write(l.join("f"), "x").unwrap());
    let union = case.mount();
    let open = || OpenOptions::new().read(true).write(true).open(union.at.join("f")).unwrap();
    let lock = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
    assert!(Flock::lock(open(), FlockArg::LockExclusiveNonblock).is_err());
    drop(lock);
    let file = open();
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 1 << 20);
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, hole, 0, 1 << 19).unwrap();
    file.sync_all().unwrap();
    file.set_len(10).unwrap();
    assert_eq!(fs::read(union.at.join("f")).unwrap(), [0; 10]);
    let mut copy = File::create(union.at.join("copy")).unwrap();
    assert_eq!(std::io::copy(&mut File::open(union.at.join("f")).unwrap(), &mut copy).unwrap(), 10);
}

#[test]
fn a_union_without_an_upper_cannot_be_written() {
    let case = case(|l| fs::write(l.join("f"), "x").unwrap());
    let mut config = case.site.config(std::slice::from_ref(&case.lower));
    (config.upper, config.work) = (None, None);
    let union = case.site.ours(config);
    assert_eq!(fs::read(union.at.join("f")).unwrap(), b"x");
    let error = fs::write(union.at.join("g"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn symlinks_of_layers_are_never_followed_by_us() {
    let secret = tempfile::tempdir().unwrap();
    fs::write(secret.path().join("f"), "secret").unwrap();
    let case = case(|l| symlink(secret.path(), l.join("d")).unwrap());
    let upper = case.site.path("upper");
    fs::create_dir(upper.join("d")).unwrap();
    let union = case.mount();
    assert_eq!(
        fs::read_dir(union.at.join("d")).unwrap().count(),
        0,
        "a directory over a symlink does not merge"
    );
}

#[test]
fn what_a_crash_left_in_the_work_directory_is_swept() {
    let case = case(|_| {});
    let left = case.site.path("work/work/#1/deep");
    fs::create_dir_all(&left).unwrap();
    let union = case.mount();
    assert!(!left.exists());
    let again = lazyrun_fs::union::Union::open(case.site.config(std::slice::from_ref(&case.lower)));
    assert!(again.unwrap_err().to_string().contains("in use by another union"));
    drop(union);
}
