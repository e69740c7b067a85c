//! What programs do to the contents of files, and with many or long-named ones.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, SpliceFFlags, copy_file_range, fallocate, splice};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Whence, lseek64};

use crate::union_support::{case, set_xattr};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Two runs of data, a hole between, and one at the end.
fn sparse(path: &Path) {
    let file = File::create(path).unwrap();
    file.write_all_at(&[1; 70_000], 0).unwrap();
    file.write_all_at(&[2; 70_000], 1 << 20).unwrap();
    file.set_len(2 << 20).unwrap();
}

/// Does the same to a union of ours and to overlayfs, over a layer that `fill` makes, and says what each answered.
fn both<T>(fill: impl Fn(&Path), act: impl Fn(&Path) -> T) -> (T, T) {
    let (ours, kernels) = (case(&fill), case(&fill));
    (act(&ours.mount().at), act(&kernels.kernel().at))
}

#[test]
fn holes_are_found_where_overlayfs_finds_them() {
    let seek = |file: &File, at| [Whence::SeekData, Whence::SeekHole].map(|whence| lseek64(file, at, whence));
    let look = |root: &Path| {
        let lower = File::open(root.join("f")).unwrap();
        [0, 80_000, 1 << 20, 2 << 20].map(|at| seek(&lower, at))
    };
    let (ours, kernels) = both(|l| sparse(&l.join("f")), look);
    assert_eq!(ours, kernels);
    assert_eq!(ours[1][0], Ok(1 << 20), "the hole is one");
    // Overlayfs fills them when it copies up.
    let case = case(|l| sparse(&l.join("f")));
    let union = case.mount();
    let file = open(&union.at.join("f"));
    assert_eq!([0, 80_000, 1 << 20, 2 << 20].map(|at| seek(&file, at)), ours);
    assert!(fs::read(union.at.join("f")).unwrap() == fs::read(case.lower.join("f")).unwrap());
}

#[test]
fn space_is_taken_and_given_back_as_on_overlayfs() {
    let (keep, block) = (FallocateFlags::FALLOC_FL_KEEP_SIZE, 4096);
    let modes = [
        FallocateFlags::empty(),
        keep,
        keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
        keep | FallocateFlags::FALLOC_FL_ZERO_RANGE,
    ];
    let act = |root: &Path| {
        let file = open(&root.join("f"));
        let mut seen = Vec::new();
        for (i, mode) in modes.into_iter().enumerate() {
            let answer = fallocate(&file, mode, i as i64 * 10_000 + 100, 3 * block);
            let meta = file.metadata().unwrap();
            seen.push((answer, meta.size(), fs::read(root.join("f")).unwrap()));
        }
        seen.push((fallocate(&file, modes[0], 2 << 20, block), file.metadata().unwrap().size(), Vec::new()));
        seen
    };
    let (ours, kernels) = both(|l| sparse(&l.join("f")), act);
    for (i, (ours, kernel)) in ours.iter().zip(&kernels).enumerate() {
        assert!(ours == kernel, "step {i}: {:?} {} and {:?} {}", ours.0, ours.1, kernel.0, kernel.1);
    }
    assert!(ours.iter().all(|step| step.0.is_ok()));
    // FUSE has no word for those that move what is behind them.
    let case = case(|l| sparse(&l.join("f")));
    let union = case.mount();
    let before = fs::read(union.at.join("f")).unwrap();
    for mode in [FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, FallocateFlags::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(fallocate(open(&union.at.join("f")), mode, 0, 4096), Err(Errno::EOPNOTSUPP));
    }
    assert!(fs::read(union.at.join("f")).unwrap() == before);
}

#[test]
fn ranges_are_copied_between_layers_and_within_a_file() {
    let act = |root: &Path| {
        let from = File::open(root.join("f")).unwrap();
        let to = File::create(root.join("new")).unwrap();
        to.set_len(100).unwrap();
        let (mut at, mut to_at) = (60_000, 50);
        let mut answers = vec![copy_file_range(&from, Some(&mut at), &to, Some(&mut to_at), 30_000)];
        // Within one file: apart, and overlapping, which is not allowed.
        let file = open(&root.join("f"));
        for (from, to) in [(0, 300_000), (0, 10)] {
            let (mut from, mut to) = (from, to);
            answers.push(copy_file_range(&file, Some(&mut from), &file, Some(&mut to), 1000));
        }
        (answers, at, to_at, fs::read(root.join("new")).unwrap(), fs::read(root.join("f")).unwrap())
    };
    let (ours, kernels) = both(|l| sparse(&l.join("f")), act);
    assert_eq!((&ours.0, ours.1, ours.2), (&kernels.0, kernels.1, kernels.2));
    assert!(ours.3 == kernels.3 && ours.4 == kernels.4, "contents");
    assert_eq!(ours.0, [Ok(30_000), Ok(1000), Err(Errno::EINVAL)]);
}

#[test]
fn pipes_are_spliced_from_and_into_files() {
    let case = case(|l| fs::write(l.join("f"), [b'x'; 20_000]).unwrap());
    let union = case.mount();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let from = File::open(union.at.join("f")).unwrap();
    let to = File::create(union.at.join("new")).unwrap();
    let (mut at, mut to_at) = (0, 0);
    while at < 20_000 {
        let n = splice(&from, Some(&mut at), &writer, None, 8192, SpliceFFlags::empty()).unwrap();
        assert!(n > 0, "the end at {at}");
        let mut left = n;
        while left > 0 {
            left -= splice(&reader, None, &to, Some(&mut to_at), left, SpliceFFlags::empty()).unwrap();
        }
    }
    assert!(fs::read(union.at.join("new")).unwrap() == [b'x'; 20_000]);
    assert!(fs::read(case.site.path("upper/new")).unwrap() == [b'x'; 20_000]);
}

/// Tries to lock the first bytes of a file, from another process or with `F_OFD_SETLK` from here.
fn lock(file: &File, command: i32) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: a plain structure; all zeros is a valid one.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_len) = (libc::F_WRLCK as i16, 10);
    // SAFETY: an open descriptor, and the structure that these commands read.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }).map(drop)
}

#[test]
fn locks_of_records_hold_between_processes_and_over_copy_up() {
    let case = case(|l| fs::write(l.join("f"), [0; 100]).unwrap());
    let union = case.mount();
    let (holder, other) = (open(&union.at.join("f")), open(&union.at.join("f")));
    lock(&holder, libc::F_SETLK).unwrap();
    assert_eq!(lock(&other, libc::F_OFD_SETLK), Err(Errno::EAGAIN), "the kinds know each other");
    let elsewhere = || {
        let file = other.try_clone().unwrap();
        let mut command = Command::new("true");
        // SAFETY: one fcntl, which is async-signal-safe.
        unsafe { command.pre_exec(move || Ok(lock(&file, libc::F_SETLK)?)) };
        command.status().map(|status| assert!(status.success())).map_err(|e| e.raw_os_error())
    };
    assert_eq!(elsewhere(), Err(Some(libc::EAGAIN)));
    // POSIX: closing any descriptor of the file gives this process's locks up.
    drop(holder);
    assert_eq!(elsewhere(), Ok(()));
}

#[test]
fn mappings_of_a_lower_file_show_what_is_written_after_copy_up() {
    let case = case(|l| fs::write(l.join("f"), [b'.'; 8192]).unwrap());
    let union = case.mount();
    let file = File::open(union.at.join("f")).unwrap();
    let len = NonZeroUsize::new(8192).unwrap();
    // SAFETY: a new mapping of a file that nobody truncates, read as bytes only and unmapped below.
    unsafe {
        let map = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file.as_fd(), 0).unwrap();
        // The mapping holds the file open.
        drop(file);
        let byte = || map.cast::<u8>().add(5000).read_volatile();
        assert_eq!(byte(), b'.');
        open(&union.at.join("f")).write_all_at(b"!", 5000).unwrap();
        assert_eq!(byte(), b'!');
        munmap(map, 8192).unwrap();
    }
    assert_eq!(fs::read(case.site.path("upper/f")).unwrap()[5000], b'!');
}

#[test]
fn open_files_without_a_name_can_be_truncated() {
    let case = case(|l| fs::write(l.join("low"), "lower").unwrap());
    let union = case.mount();
    fs::write(union.at.join("up"), "upper").unwrap();
    for name in ["low", "up"] {
        let mut reader = File::open(union.at.join(name)).unwrap();
        let file = open(&union.at.join(name));
        fs::remove_file(union.at.join(name)).unwrap();
        file.set_len(3).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o400)).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!((meta.size(), meta.nlink(), meta.mode() & 0o777), (3, 0, 0o400));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, if name == "low" { "low" } else { "upp" });
    }
}

/// Another process opens the files, so that theirs and ours are not counted together.
const OPEN_MANY: &str = r#"
import os, sys
files = [open(f"{sys.argv[1]}/{i}", "a+b", buffering=0) for i in range(10000)]
for i, file in enumerate(files):
    file.write(str(i).encode())
for i, file in enumerate(files):
    size = len(str(i)) + (i < 5000)
    assert os.fstat(file.fileno()).st_size == size, i
    assert os.stat(f"{sys.argv[1]}/{i}").st_size == size, i
"#;

#[test]
fn ten_thousand_files_can_be_open() {
    let case = case(|l| (0..5000).for_each(|i| fs::write(l.join(i.to_string()), "x").unwrap()));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let hard = hard.max(12_000);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let union = case.mount();
    let status = Command::new("python3").args(["-c", OPEN_MANY]).arg(&union.at).status().unwrap();
    assert!(status.success());
    assert_eq!(fs::read(case.site.path("upper/4999")).unwrap(), b"x4999");
    assert_eq!(fs::read(case.site.path("upper/9999")).unwrap(), b"9999");
}

#[test]
fn names_are_as_long_as_overlayfs_has_them() {
    let name = |letter: &str| letter.repeat(255);
    let fill = |l: &Path| {
        for letter in ["f", "g", "h"] {
            fs::write(l.join(name(letter)), "x").unwrap();
        }
        fs::create_dir(l.join(name("d"))).unwrap();
    };
    let act = |root: &Path| {
        let at = |letter: &str| root.join(name(letter));
        let code = |r: std::io::Result<()>| r.map_err(|e| e.raw_os_error());
        let answers = [
            code(fs::write(at("f"), "copied up")),
            code(fs::remove_file(at("g"))),
            code(fs::write(at("g"), "over a whiteout")),
            code(fs::rename(at("h"), at("i"))),
            code(fs::write(at("d").join(name("n")), "new")),
            code(fs::remove_dir(at("d"))),
            code(fs::write(root.join("x".repeat(256)), "")),
            code(fs::metadata(root.join("x".repeat(256))).map(drop)),
            code(std::os::unix::fs::symlink("t".repeat(4095), root.join("link"))),
        ];
        (answers, crate::union_support::walk(root, false))
    };
    let (ours, kernels) = both(fill, act);
    assert_eq!(ours, kernels);
    assert_eq!(ours.0[6], Err(Some(libc::ENAMETOOLONG)));
}

#[test]
fn attributes_are_as_large_as_overlayfs_has_them() {
    let act = |root: &Path| {
        let path = root.join("f");
        let name = |n: usize| format!("user.{}", "n".repeat(n));
        [
            set_xattr(&path, "user.empty", b"", 0),
            set_xattr(&path, "user.some", &[1; 3000], 0),
            set_xattr(&path, "user.large", &[1; 65_536], 0),
            set_xattr(&path, "user.larger", &[1; 65_537], 0),
            set_xattr(&path, &name(250), b"x", 0),
            set_xattr(&path, &name(251), b"x", 0),
            set_xattr(&path, "user.", b"x", 0),
            set_xattr(&path, "unknown.x", b"x", 0),
        ]
        .map(|answer| (answer, crate::union_support::xattrs(&path)))
    };
    let (ours, kernels) = both(|l| fs::write(l.join("f"), "x").unwrap(), act);
    assert_eq!(ours, kernels);
    assert!(ours[1].0.is_ok() && ours[3].0 == Err(libc::E2BIG));
}
