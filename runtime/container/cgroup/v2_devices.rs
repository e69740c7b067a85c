//! The v2 device filter: a small BPF program on the group, since v2 has no devices controller.

use super::devices::Rule;
use crate::container::error::{Attempt, Result};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Insn {
    code: u8,
    /// dst in the low, src in the high half (little-endian bit fields).
    regs: u8,
    off: i16,
    imm: i32,
}

const R0: u8 = 0;
const R1: u8 = 1;
/// Device type (1 block, 2 character), wanted access (1 mknod, 2 read, 4 write), major, minor.
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, regs: dst | src << 4, off, imm }
}
const fn load(dst: u8, off: i16) -> Insn {
    insn(0x61, dst, R1, off, 0) // BPF_LDX | BPF_MEM | BPF_W
}
const fn mov(dst: u8, imm: i32) -> Insn {
    insn(0xb7, dst, 0, 0, imm) // BPF_ALU64 | BPF_MOV | BPF_K
}
const fn jne(dst: u8, imm: i32) -> Insn {
    insn(0x55, dst, 0, 0, imm) // BPF_JMP | BPF_JNE | BPF_K; the offset is filled in later
}
/// Instructions of a verdict.
const VERDICT: usize = 2;
const EXIT: Insn = insn(0x95, 0, 0, 0, 0);

/// The program for `rules`, the last matching rule deciding, and "no" when none matches.
pub(super) fn program(rules: &[Rule]) -> Vec<Insn> {
    // struct bpf_cgroup_dev_ctx { u32 access_type /* access << 16 | type */, major, minor }
    let mut out = vec![
        load(TYPE, 0),
        insn(0x54, TYPE, 0, 0, 0xffff), // BPF_ALU | BPF_AND | BPF_K
        load(ACCESS, 0),
        insn(0x74, ACCESS, 0, 0, 16), // BPF_ALU | BPF_RSH | BPF_K
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let block = block(rule);
        out.extend(&block);
        if block.len() == VERDICT {
            // It matches everything: the verifier refuses code that cannot be reached.
            return out;
        }
    }
    out.extend([mov(R0, 0), EXIT]);
    out
}

/// One rule: tests that jump past it, then its verdict.
fn block(rule: &Rule) -> Vec<Insn> {
    let mut tests = Vec::new();
    match rule.kind {
        'b' => tests.push(jne(TYPE, 1)),
        'c' => tests.push(jne(TYPE, 2)),
        _ => {}
    }
    let mask = i32::from(rule.mknod) | i32::from(rule.read) << 1 | i32::from(rule.write) << 2;
    if mask != 7 {
        // An allowing rule must cover all that is wanted; a denying one need only touch it.
        tests.push(insn(0xbc, R1, ACCESS, 0, 0)); // BPF_ALU | BPF_MOV | BPF_X
        tests.push(insn(0x54, R1, 0, 0, if rule.allow { !mask & 7 } else { mask }));
        let jump = if rule.allow { 0x55 } else { 0x15 }; // JNE, JEQ
        tests.push(insn(jump, R1, 0, 0, 0));
    }
    if let Some(major) = rule.major {
        tests.push(jne(MAJOR, major as i32));
    }
    if let Some(minor) = rule.minor {
        tests.push(jne(MINOR, minor as i32));
    }
    let len = tests.len();
    for (i, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, 0x55 | 0x15) {
            test.off = (len - i - 1 + VERDICT) as i16;
        }
    }
    tests.extend([mov(R0, i32::from(rule.allow)), EXIT]);
    tests
}

/// Loads the program and attaches it to the group.
pub(super) fn attach(dir: &Path, rules: &[Rule]) -> Result<()> {
    let what = || format!("attach the device filter to cgroup {}", dir.display());
    let group = File::open(dir).attempt(what)?;
    let program = load_program(&program(rules)).attempt(what)?;
    #[repr(C)]
    struct AttachAttr {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
    }
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attr = AttachAttr {
        target_fd: group.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attr` is the leading part of union bpf_attr for this command, its size is passed with it.
    let ret =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>()) };
    if ret < 0 { Err(io::Error::last_os_error()).attempt(what) } else { Ok(()) }
}

fn load_program(insns: &[Insn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct LoadAttr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the instruction array and the licence string live until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}
