//! What the root tests of mounts share: an isolated mount namespace, layer files in memory, children.

#![allow(unreachable_pub)]

#[path = "../../src/plan/tiny.rs"]
mod tiny;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lazyrun_fs::fuse::{LayerFiles, ReadReply};
use lazyrun_fs::mounter::Mounter;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

pub const TINY_FILE: &str = tiny::FILE;

/// A mount namespace for one test; in the end its mount table must be what it was.
pub struct Isolated {
    before: String,
}

impl Isolated {
    pub fn enter() -> Self {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
            .expect("this test mounts filesystems and needs root (CAP_SYS_ADMIN)");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        Self { before: mount_table() }
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.before, mount_table(), "a mount was left behind");
        }
    }
}

fn mount_table() -> String {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

type NamedFile = (String, Arc<Vec<u8>>);

/// Layer files in memory. Reads whose offset is in `held` are kept unanswered in `parked`.
#[derive(Default)]
pub struct MemoryFiles {
    pub files: Mutex<HashMap<u64, NamedFile>>,
    pub hold_from: Mutex<Option<u64>>,
    pub parked: Mutex<Vec<Box<dyn ReadReply>>>,
    /// A file made when a read is parked, to tell other processes.
    pub parked_mark: Mutex<Option<PathBuf>>,
}

impl MemoryFiles {
    pub fn with(name: &str, bytes: Vec<u8>) -> Arc<Self> {
        let files = Arc::new(Self::default());
        files.add(2, name, bytes);
        files
    }

    pub fn add(&self, ino: u64, name: &str, bytes: Vec<u8>) {
        self.files.lock().unwrap().insert(ino, (name.to_owned(), Arc::new(bytes)));
    }
}

impl LayerFiles for MemoryFiles {
    fn by_name(&self, name: &[u8]) -> Option<u64> {
        let files = self.files.lock().unwrap();
        files.iter().find(|(_, (n, _))| n.as_bytes() == name).map(|(&ino, _)| ino)
    }

    fn size(&self, ino: u64) -> Option<u64> {
        self.files.lock().unwrap().get(&ino).map(|(_, bytes)| bytes.len() as u64)
    }

    fn read(&self, ino: u64, offset: u64, len: u32, reply: Box<dyn ReadReply>) {
        if self.hold_from.lock().unwrap().is_some_and(|from| offset >= from) {
            self.parked.lock().unwrap().push(reply);
            if let Some(mark) = &*self.parked_mark.lock().unwrap() {
                File::create(mark).unwrap();
            }
            return;
        }
        let Some((_, bytes)) = self.files.lock().unwrap().get(&ino).cloned() else {
            return reply.error(libc::EIO);
        };
        // Answered from another thread, as the real ones are.
        std::thread::spawn(move || {
            let start = (offset as usize).min(bytes.len());
            let end = (start + len as usize).min(bytes.len());
            reply.data(&bytes[start..end]);
        });
    }
}

/// Bytes that differ everywhere.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend(state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Path of what is at `name` in a mount that is attached nowhere.
pub fn inside(tree: &impl AsFd, name: &str) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", tree.as_fd().as_raw_fd())).join(name)
}

/// Writes an EROFS image whose only file shows the first `size` bytes of its device.
pub fn write_tiny_image(path: &Path, size: u32) {
    fs::write(path, tiny::image(size)).unwrap();
}

/// A mounter whose helper is this test binary, in [`child_mounter`].
pub fn mounter() -> Mounter {
    Mounter::new(std::env::current_exe().unwrap()).with_args(child_args("fuse_support::child_mounter"))
}

/// Arguments that make a test binary run one of its ignored tests and nothing else.
pub fn child_args(test: &str) -> Vec<String> {
    ["--exact", test, "--ignored", "--nocapture", "--test-threads=1"].map(str::to_owned).into_iter().collect()
}

/// Waits for a condition that another process or thread brings about.
pub fn wait_for(what: &str, condition: impl FnMut() -> bool) {
    assert!(until(condition), "timed out waiting for {what}");
}

/// The same for who must not fail: whether it came about in time.
pub fn until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Not a test: the process that [`mounter`] starts. It is one if standard input is a socket.
#[test]
#[ignore = "a helper process of the other tests"]
fn child_mounter() {
    use std::os::unix::fs::FileTypeExt;
    if fs::metadata("/proc/self/fd/0").is_ok_and(|m| m.file_type().is_socket()) {
        let _ = lazyrun_fs::mounter::main();
        std::process::exit(0);
    }
}

/// Ends a FUSE connection with the test, also when it fails: a process with a read that nobody answers
/// could not even be killed.
pub struct AbortAtEnd(pub std::os::fd::OwnedFd);

impl Drop for AbortAtEnd {
    fn drop(&mut self) {
        let _ = lazyrun_fs::fuse::abort(self.0.as_fd());
    }
}

/// A duplicate that a child can be given.
pub fn dup(fd: BorrowedFd<'_>) -> std::os::fd::OwnedFd {
    fd.try_clone_to_owned().unwrap()
}
