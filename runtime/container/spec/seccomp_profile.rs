//! The default seccomp profile: what docker's default lets a container call, as of Linux 6.16.
//!
//! Everything not listed fails with EPERM. `clone3` fails with ENOSYS, so that the C library falls back to
//! `clone`, whose flags a filter can see. Like current docker, io_uring is not allowed.

use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

/// Allowed to every container, on any architecture that has them (names of 32-bit programs included, for
/// other runtimes that filter those).
const ALWAYS: &str = "
    _llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod
    chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range
    creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate
    fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync
    fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64
    fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake
    futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32
    geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid
    getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
    io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen
    listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack
    membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap
    mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
    mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall
    munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2
    prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace
    pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom recvmmsg
    recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send
    sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid
    setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority
    setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid
    setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack
    signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64
    statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill
    truncate truncate64 ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes
    vfork vmsplice wait4 waitid waitpid write writev
";

/// Allowed to whoever holds the capability.
const BY_CAPABILITY: [(&str, &str); 13] = [
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns statmount syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
];

/// Allowed on one architecture.
#[cfg(target_arch = "x86_64")]
const BY_ARCHITECTURE: &str = "arch_prctl modify_ldt";
#[cfg(target_arch = "aarch64")]
const BY_ARCHITECTURE: &str =
    "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const BY_ARCHITECTURE: &str = "";

/// personality(2) values that only make a program older or 32-bit: Linux, Linux32, UNAME26 with either, query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Flags of clone(2) that make namespaces.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

/// VM sockets reach the hypervisor past every network namespace.
const AF_VSOCK: u64 = 40;

/// The profile for a container with these capabilities (`CAP_…`).
pub(super) fn profile(capabilities: &[String]) -> Option<LinuxSeccomp> {
    let has = |cap: &str| capabilities.iter().any(|c| c == cap);
    let split = |s: &str| s.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut always = split(ALWAYS);
    always.extend(split(BY_ARCHITECTURE));
    for (cap, names) in BY_CAPABILITY {
        if has(cap) {
            always.extend(split(names));
        }
    }
    let allow =
        |names: &[&str], args: Value| json!({"names": names, "action": "SCMP_ACT_ALLOW", "args": args});
    let mut syscalls = vec![
        json!({"names": always, "action": "SCMP_ACT_ALLOW"}),
        allow(&["socket"], json!([{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE"}])),
    ];
    for value in PERSONALITIES {
        syscalls.push(allow(&["personality"], json!([{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}])));
    }
    if !has("CAP_SYS_ADMIN") {
        let no_namespaces =
            json!([{"index": 0, "value": NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]);
        syscalls.push(allow(&["clone"], no_namespaces));
        syscalls.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}));
    }
    let mut profile =
        json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": libc::EPERM, "syscalls": syscalls});
    if let Some(map) = profile.as_object_mut() {
        let architectures = match std::env::consts::ARCH {
            "x86_64" => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
            "aarch64" => json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
            _ => Value::Null,
        };
        if !architectures.is_null() {
            map.insert("architectures".to_owned(), architectures);
        }
    }
    serde_json::from_value(profile).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_is_a_valid_one_and_grows_with_capabilities() {
        let plain = profile(&[]).unwrap();
        let names = |p: &LinuxSeccomp| -> Vec<String> {
            p.syscalls().iter().flatten().flat_map(|s| s.names().clone()).collect()
        };
        for absent in
            ["mount", "unshare", "bpf", "io_uring_setup", "keyctl", "kexec_load", "userfaultfd", "setns"]
        {
            assert!(!names(&plain).contains(&absent.to_owned()), "{absent}");
        }
        for present in ["read", "execve", "ptrace", "clone3", "personality", "fchmodat2"] {
            assert!(names(&plain).contains(&present.to_owned()), "{present}");
        }
        assert!(names(&profile(&["CAP_SYS_ADMIN".to_owned()]).unwrap()).contains(&"mount".to_owned()));
    }
}
