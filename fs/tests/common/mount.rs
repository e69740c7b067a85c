//! Mounts an EROFS image for a test, detached: it is nowhere in the mount table and goes with its descriptor.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use lazyrun_fs::erofs::{self, ErofsSummary};
use lazyrun_fs::view::View;

use super::layer::Files;

pub fn need_root() {
    // SAFETY: takes and touches nothing.
    let euid = unsafe { libc::geteuid() };
    assert_eq!(euid, 0, "this test mounts EROFS images and must run as root");
}

fn check(result: libc::c_long) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    // SAFETY: the system call just made this descriptor.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set(fs: &OwnedFd, key: &CStr, value: &Path) -> io::Result<i32> {
    const SET_STRING: libc::c_uint = 1;
    let value = CString::new(value.as_os_str().as_bytes())?;
    // SAFETY: both strings are NUL-terminated and outlive the call.
    check(unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), SET_STRING, key.as_ptr(), value.as_ptr(), 0)
    })
}

/// Mounts `image` with its devices.
pub fn erofs(image: &Path, devices: &[PathBuf]) -> io::Result<OwnedFd> {
    const CREATE: libc::c_uint = 6;
    // SAFETY: the name is NUL-terminated.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, c"erofs".as_ptr(), 1) })?;
    set(&fs, c"source", image)?;
    for device in devices {
        set(&fs, c"device", device)?;
    }
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: the command takes neither key nor value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), CREATE, null, null, 0) })?;
    // SAFETY: plain numbers.
    own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), 1, 0) })
}

/// A view written to files.
pub struct Written {
    pub dir: tempfile::TempDir,
    pub image: PathBuf,
    pub devices: Vec<PathBuf>,
    pub summary: ErofsSummary,
}

/// Writes the view and its layer files into a temporary directory.
pub fn write(view: &View, files: &Files) -> Result<Written, erofs::ErofsError> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let image = dir.path().join("image");
    let appendix = dir.path().join("appendix");
    let summary = erofs::write(
        view,
        &files.devices(),
        files,
        File::create(&image).expect("image"),
        File::create(&appendix).expect("appendix"),
    )?;
    let mut devices = Vec::new();
    for (i, data) in files.0.iter().enumerate() {
        let path = dir.path().join(format!("layer{i}"));
        std::fs::write(&path, data).expect("layer file");
        devices.push(path);
    }
    if summary.appendix_size > 0 {
        assert_eq!(std::fs::metadata(&appendix).expect("appendix").len(), summary.appendix_size);
        devices.push(appendix);
    }
    assert_eq!(std::fs::metadata(&image).expect("image").len(), summary.image_size);
    Ok(Written { dir, image, devices, summary })
}

/// The tree that the kernel shows of a written view.
pub fn kernel_tree(written: &Written) -> super::tree::Tree {
    let mount = erofs(&written.image, &written.devices)
        .unwrap_or_else(|e| panic!("the kernel refuses the image: {e}; its log says why"));
    super::tree::of_dir(Path::new(&format!("/proc/self/fd/{}", mount.as_raw_fd())))
}

/// Runs fsck.erofs of erofs-utils >= 1.8 over the image, contents included. It does so on a copy without the
/// flag for the superblock's checksum: with blocks smaller than 1 KiB erofs-utils 1.8 computes a negative length
/// to sum over and dies of it. The kernel has checked the sum by then.
pub fn fsck(written: &Written) {
    let copy = written.dir.path().join("unsummed");
    let mut bytes = std::fs::read(&written.image).expect("image");
    assert_eq!(bytes[1024 + 8] & 1, 1, "the image has no checksum");
    bytes[1024 + 8] &= !1;
    std::fs::write(&copy, bytes).expect("copy of the image");
    let out = tool("fsck.erofs").arg("--extract").args(device_options(written)).arg(&copy).output();
    let out = out.expect("fsck.erofs runs");
    assert!(
        out.status.success(),
        "fsck.erofs: {}: {}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

pub fn device_options(written: &Written) -> Vec<String> {
    written.devices.iter().map(|d| format!("--device={}", d.display())).collect()
}

/// A program of erofs-utils.
pub fn tool(name: &str) -> std::process::Command {
    use std::sync::OnceLock;
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tools/erofs-utils.sh");
        let out = std::process::Command::new(&script).output().expect("erofs-utils.sh runs");
        assert!(out.status.success(), "erofs-utils.sh: {}", String::from_utf8_lossy(&out.stderr));
        PathBuf::from(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    });
    std::process::Command::new(dir.join(name))
}

/// A read-only overlay of detached mounts, the first on top.
pub fn overlay(lowers: &[OwnedFd]) -> io::Result<OwnedFd> {
    const SET_FD: libc::c_uint = 5;
    const CREATE: libc::c_uint = 6;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: the name is NUL-terminated.
    let fs = own(unsafe { libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), 1) })?;
    for lower in lowers {
        let key = c"lowerdir+".as_ptr();
        // SAFETY: the key is NUL-terminated, the rest are numbers.
        check(unsafe {
            libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), SET_FD, key, null, lower.as_raw_fd())
        })?;
    }
    // SAFETY: the command takes neither key nor value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), CREATE, null, null, 0) })?;
    // SAFETY: plain numbers.
    own(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), 1, 0) })
}
