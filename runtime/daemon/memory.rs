//! How the daemon's memory is had from the C library.

/// Buffers of this size and more are given back to the kernel as soon as they are freed, in bytes.
#[cfg(target_env = "gnu")]
const GIVE_BACK: libc::c_int = 512 << 10;
/// Arenas of the allocator.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;

/// Has freed memory leave the process. Spans of up to 16 MiB are decoded by whichever of many threads is idle. glibc has
/// an arena for each few threads and, once it has freed a large buffer, keeps as much as that was in each of them: with
/// its defaults hydration had 67 MiB where 52 were enough.
#[cfg(target_env = "gnu")]
pub(super) fn stay_small() {
    // SAFETY: mallopt takes two integers; it is called before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVE_BACK);
        libc::mallopt(libc::M_TRIM_THRESHOLD, GIVE_BACK);
    }
}

/// Other C libraries have no arenas.
#[cfg(not(target_env = "gnu"))]
pub(super) fn stay_small() {}
