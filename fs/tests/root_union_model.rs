//! The union against its model, kernel overlayfs: random operations give the same answers, the same tree and an
//! upper directory in the same format, which the other can take over.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::union_support::{
    Mounted, Seens, Site, differences, get_flags, link_open, remove_xattr, set_flags, set_xattr, walk,
};
use lazyrun_fs::union::{RedirectDir, UnionConfig};
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Gid, Uid, fchownat, linkat};

/// `FS_NODUMP_FL`: the inode flag that means nothing to the kernel.
const NO_DUMP: u32 = 0x40;

/// A small generator of numbers: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Few names and little depth, so that operations meet.
    fn path(&mut self) -> PathBuf {
        let mut path = PathBuf::new();
        for _ in 0..=self.below(3) {
            path.push(["a", "b", "c", "d", "e"][self.below(5) as usize]);
        }
        path
    }
}

#[derive(Clone, Debug)]
enum Op {
    Create(PathBuf, u32),
    Append(PathBuf, Vec<u8>),
    Truncate(PathBuf, u64),
    OpenTruncate(PathBuf),
    Mkdir(PathBuf, u32),
    Mknod(PathBuf, bool),
    Symlink(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Unlink(PathBuf),
    Rmdir(PathBuf),
    Rename(PathBuf, PathBuf, u32),
    Chmod(PathBuf, u32),
    Chown(PathBuf, u32, u32),
    SetXattr(PathBuf, Vec<u8>, i32),
    RemoveXattr(PathBuf),
    NoDump(PathBuf, bool),
    /// A file that is made without a name in the first, written, and linked to the second.
    Nameless(PathBuf, PathBuf, u32),
    List(PathBuf),
    Stat(PathBuf),
}

fn random_op(r: &mut Random) -> Op {
    let mode = |r: &mut Random| [0o644, 0o600, 0o755, 0o711, 0o4755, 0o2750, 0o666][r.below(7) as usize];
    match r.below(26) {
        0 | 1 => Op::Create(r.path(), mode(r)),
        2 => Op::Append(r.path(), r.next().to_string().into_bytes()),
        3 => Op::Truncate(r.path(), r.below(20)),
        4 => Op::OpenTruncate(r.path()),
        5 | 6 => Op::Mkdir(r.path(), mode(r)),
        7 => Op::Mknod(r.path(), r.below(2) == 0),
        8 => Op::Symlink(r.path(), r.path()),
        9 | 10 => Op::Link(r.path(), r.path()),
        11 | 12 => Op::Unlink(r.path()),
        13 | 14 => Op::Rmdir(r.path()),
        15..=17 => Op::Rename(r.path(), r.path(), [0, 0, 0, 1, 2, 4][r.below(6) as usize]),
        18 => Op::Chmod(r.path(), mode(r)),
        19 => Op::Chown(r.path(), r.below(3) as u32, r.below(3) as u32),
        20 => Op::SetXattr(r.path(), r.next().to_string().into_bytes(), r.below(3) as i32),
        21 => Op::RemoveXattr(r.path()),
        22 => Op::NoDump(r.path(), r.below(2) == 0),
        23 => Op::Nameless(r.path(), r.path(), mode(r)),
        24 => Op::List(r.path()),
        _ => Op::Stat(r.path()),
    }
}

/// What an operation answers: an errno, or what there is to see.
type Answer = Result<String, i32>;

fn io(result: std::io::Result<()>) -> Answer {
    result.map(|()| String::new()).map_err(|e| e.raw_os_error().unwrap_or(-1))
}

fn nix(result: nix::Result<()>) -> Answer {
    result.map(|()| String::new()).map_err(|e| e as i32)
}

fn apply(root: &Path, op: &Op) -> Answer {
    let at = |p: &PathBuf| root.join(p);
    match op {
        Op::Create(p, mode) => {
            io(OpenOptions::new().write(true).create_new(true).mode(*mode).open(at(p)).map(drop))
        }
        Op::Append(p, data) => io(OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(at(p))
            .and_then(|mut f| f.write_all(data))),
        Op::Truncate(p, size) => {
            let path = CString::new(at(p).as_os_str().as_bytes()).expect("path");
            // Symlinks lead to paths that depend on the root.
            if at(p).is_symlink() {
                return Ok("link".into());
            }
            // SAFETY: NUL-terminated.
            nix(nix::errno::Errno::result(unsafe { libc::truncate(path.as_ptr(), *size as i64) }).map(drop))
        }
        Op::OpenTruncate(p) => {
            let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
            io(OpenOptions::new().write(true).truncate(true).custom_flags(flags).open(at(p)).map(drop))
        }
        Op::Mkdir(p, mode) => nix(nix::unistd::mkdir(&at(p), Mode::from_bits_truncate(*mode))),
        Op::Mknod(p, fifo) => {
            let (kind, rdev) =
                if *fifo { (SFlag::S_IFIFO, 0) } else { (SFlag::S_IFCHR, libc::makedev(1, 3)) };
            nix(mknod(&at(p), kind, Mode::from_bits_truncate(0o640), rdev))
        }
        Op::Symlink(p, target) => io(std::os::unix::fs::symlink(target, at(p))),
        Op::Link(from, to) => nix(linkat(AT_FDCWD, &at(from), AT_FDCWD, &at(to), AtFlags::empty())),
        Op::Unlink(p) => nix(nix::unistd::unlink(&at(p))),
        Op::Rmdir(p) => io(std::fs::remove_dir(at(p))),
        Op::Rename(from, to, flags) => {
            let flags = RenameFlags::from_bits_retain(*flags);
            nix(renameat2(AT_FDCWD, &at(from), AT_FDCWD, &at(to), flags))
        }
        Op::Chmod(p, mode) => {
            if at(p).is_symlink() {
                return Ok("link".into());
            }
            io(std::fs::set_permissions(at(p), std::fs::Permissions::from_mode(*mode)))
        }
        Op::Chown(p, uid, gid) => nix(fchownat(
            AT_FDCWD,
            &at(p),
            Some(Uid::from_raw(*uid)),
            Some(Gid::from_raw(*gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )),
        Op::SetXattr(p, value, flags) => {
            set_xattr(&at(p), "user.test", value, *flags).map(|()| String::new())
        }
        Op::RemoveXattr(p) => remove_xattr(&at(p), "user.test").map(|()| String::new()),
        Op::NoDump(p, on) => {
            if !at(p).is_symlink() && !at(p).is_dir() && !at(p).is_file() {
                return Ok("special".into());
            }
            let flags = get_flags(&at(p)).map_err(|e| e as i32)? & !NO_DUMP;
            nix(set_flags(&at(p), flags | if *on { NO_DUMP } else { 0 }))?;
            get_flags(&at(p)).map(|flags| (flags & NO_DUMP).to_string()).map_err(|e| e as i32)
        }
        Op::Nameless(dir, to, mode) => {
            let made = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(*mode).open(at(dir));
            let mut file = made.map_err(|e| e.raw_os_error().unwrap_or(-1))?;
            io(file.write_all(b"nameless"))?;
            nix(link_open(&file, &at(to)))
        }
        Op::List(p) => {
            let list = std::fs::read_dir(at(p)).map_err(|e| e.raw_os_error().unwrap_or(-1))?;
            let mut names: Vec<String> = list
                .map(|e| e.expect("entry"))
                .filter(|e| e.metadata().is_ok())
                .map(|e| format!("{:?} {:?}", e.file_name(), e.file_type().expect("type")))
                .collect();
            names.sort();
            Ok(names.join(", "))
        }
        Op::Stat(p) => {
            use std::os::unix::fs::MetadataExt;
            let m = std::fs::symlink_metadata(at(p)).map_err(|e| e.raw_os_error().unwrap_or(-1))?;
            let size = if m.is_dir() { 0 } else { m.size() };
            let links = if m.is_dir() { 0 } else { m.nlink() };
            Ok(format!("{:o} {}:{} {size} {links} {}", m.mode(), m.uid(), m.gid(), m.rdev()))
        }
    }
}

/// Fills a directory as a layer, with whiteouts and opaque directories.
fn fill_layer(dir: &Path, r: &mut Random) {
    std::fs::create_dir(dir).expect("layer");
    for _ in 0..60 {
        let op = random_op(r);
        // Sockets and the like are as good as files; only what makes something.
        if !matches!(op, Op::Unlink(_) | Op::Rmdir(_) | Op::Rename(..)) {
            let _ = apply(dir, &op);
        }
        let path = dir.join(r.path());
        match r.below(8) {
            0 => drop(mknod(&path, SFlag::S_IFCHR, Mode::empty(), 0)),
            1 if path.is_dir() && !path.is_symlink() => {
                set_xattr(&path, "trusted.overlay.opaque", b"y", 0).expect("opaque");
            }
            _ => {}
        }
    }
}

/// An upper directory without what only the kernel keeps (where a file came from), and without opaque marks: where
/// nothing lies below they mean nothing, and the kernel sets some there to spare itself a look. Where they do mean
/// something, the trees after each has taken over the other's upper directory would differ.
fn upper(site: &Site) -> Seens {
    let mut seen = walk(&site.path("upper"), false);
    for (path, file) in &mut seen {
        // Of a rename that failed after the mark was set, or was taken back, nothing else is left.
        let itself = [path.file_name().map(OsStr::to_owned), Some(Path::new("/").join(path).into())];
        let redirect = file.xattrs.get(&b"trusted.overlay.redirect"[..]);
        if redirect.is_some_and(|to| itself.iter().flatten().any(|name| name.as_bytes() == to)) {
            file.xattrs.remove(&b"trusted.overlay.redirect"[..]);
        }
        // Nor of one in which the kernel has written the whole path, before the directory moved within its own: it
        // keeps that, and the name alone says the same.
        if let Some(to) = file.xattrs.get_mut(&b"trusted.overlay.redirect"[..]) {
            let beside = Path::new("/").join(path).with_file_name(OsStr::from_bytes(to));
            *to = beside.into_os_string().into_vec();
        }
        file.xattrs.retain(|name, _| {
            !matches!(
                name.as_slice(),
                b"trusted.overlay.origin"
                    | b"trusted.overlay.impure"
                    | b"trusted.overlay.uuid"
                    | b"trusted.overlay.opaque"
            )
        });
        if file.mode & libc::S_IFMT == libc::S_IFCHR && file.rdev == 0 {
            // Whiteouts may be links of each other.
            file.links = 1;
        }
    }
    seen.remove(Path::new(""));
    seen
}

fn same(what: &str, seed: u64, log: &[Op], left: &Seens, right: &Seens) {
    let different = differences(left, right);
    assert!(
        different.is_empty(),
        "{what} differ (seed {seed}), kernel's first:\n{}\nafter {log:#?}",
        different.join("\n")
    );
}

/// Whether directories of lower layers can be renamed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Redirects {
    No,
    Yes,
}

impl Redirects {
    fn kernel(self, site: &Site, lower: &[PathBuf]) -> Mounted {
        site.kernel(lower, if self == Redirects::Yes { "on" } else { "off" })
    }

    fn ours(self, site: &Site, lower: &[PathBuf]) -> Mounted {
        let redirect_dir = if self == Redirects::Yes { RedirectDir::On } else { RedirectDir::Follow };
        site.ours(UnionConfig { redirect_dir, ..site.config(lower) })
    }
}

/// Makes layers that have renamed directories in them: what overlayfs leaves in its upper directories.
fn rename_in_layers(lower: &mut Vec<PathBuf>, sites: &mut Vec<Site>, r: &mut Random) {
    for _ in 0..r.below(3) {
        let site = Site::new();
        let kernel = Redirects::Yes.kernel(&site, lower);
        for _ in 0..100 {
            let _ = apply(&kernel.at, &random_op(r));
        }
        drop(kernel);
        lower.insert(0, site.path("upper"));
        sites.push(site);
    }
}

fn run(seed: u64, steps: usize, redirects: Redirects) {
    let mut r = Random(seed);
    let layers = tempfile::tempdir().expect("temporary directory");
    let mut lower: Vec<PathBuf> = (0..1 + r.below(3)).map(|i| layers.path().join(format!("l{i}"))).collect();
    for layer in &lower {
        fill_layer(layer, &mut r);
    }
    let mut sites = Vec::new();
    if redirects == Redirects::Yes {
        rename_in_layers(&mut lower, &mut sites, &mut r);
    }
    let (kernel_site, our_site) = (Site::new(), Site::new());
    let (kernel, ours) = (redirects.kernel(&kernel_site, &lower), redirects.ours(&our_site, &lower));
    same("fresh trees", seed, &[], &walk(&kernel.at, true), &walk(&ours.at, true));
    let mut log = Vec::new();
    for _ in 0..steps {
        let op = random_op(&mut r);
        let (k, o) = (apply(&kernel.at, &op), apply(&ours.at, &op));
        log.push(op);
        assert_eq!(k, o, "answers differ (seed {seed}), kernel's first, at the last of {log:#?}");
    }
    same("trees", seed, &log, &walk(&kernel.at, false), &walk(&ours.at, false));
    let shown: Seens = walk(&ours.at, true);
    drop((kernel, ours));
    same("upper directories", seed, &log, &upper(&kernel_site), &upper(&our_site));
    // Each takes over what the other has left.
    let kernel = redirects.kernel(&our_site, &lower);
    same("trees after the kernel took over", seed, &log, &shown, &walk(&kernel.at, true));
    drop(kernel);
    let ours = redirects.ours(&kernel_site, &lower);
    let kernels: BTreeMap<_, _> = walk(&ours.at, false);
    drop(ours);
    let kernel = redirects.kernel(&kernel_site, &lower);
    same("trees after we took over", seed, &log, &walk(&kernel.at, false), &kernels);
}

#[test]
fn random_operations_do_what_overlayfs_does() {
    for seed in 0..40 {
        run(seed, 300, Redirects::No);
    }
}

#[test]
fn directories_of_lower_layers_are_renamed_as_overlayfs_does() {
    for seed in 100..140 {
        run(seed, 300, Redirects::Yes);
    }
}

/// More of the same, for a longer look: `make soak SEEDS=1000`.
#[test]
#[ignore = "takes as long as one likes: make soak"]
fn many_random_operations_do_what_overlayfs_does() {
    let seeds = std::env::var("UNION_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(500);
    for seed in 1000..1000 + seeds {
        run(seed, 400, Redirects::No);
        run(seed, 400, Redirects::Yes);
    }
}

#[test]
fn the_generator_makes_all_sorts() {
    let mut r = Random(1);
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut kinds = Vec::new();
    for i in 0..20 {
        let layer = dir.path().join(format!("l{i}"));
        fill_layer(&layer, &mut r);
        kinds.extend(walk(&layer, false).into_values().map(|s| s.mode & libc::S_IFMT));
    }
    for kind in [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK, libc::S_IFCHR] {
        assert!(kinds.contains(&kind), "no {kind:o}");
    }
}
