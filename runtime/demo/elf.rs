//! Which shared libraries an ELF file asks for, read from its dynamic section (System V ABI, chapter 5). Only
//! 64-bit little-endian files: what every host that runs this program has.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What the dynamic loader would look for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Needs {
    /// The loader itself (`PT_INTERP`); programs have one, libraries do not.
    pub(super) interpreter: Option<PathBuf>,
    /// Library names (`DT_NEEDED`).
    pub(super) libraries: Vec<OsString>,
    /// Where to look first (`DT_RPATH`, `DT_RUNPATH`), `$ORIGIN` not yet replaced.
    pub(super) paths: Vec<OsString>,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// Reads the needs of an ELF file; `None` for anything that is none or is malformed.
pub(super) fn needs(file: &[u8]) -> Option<Needs> {
    // e_ident: magic, ELFCLASS64, ELFDATA2LSB.
    if file.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let headers = program_headers(file)?;
    let mut needs = Needs::default();
    if let Some(header) = headers.iter().find(|header| header.kind == PT_INTERP) {
        needs.interpreter = Some(PathBuf::from(text(file, header.offset)?));
    }
    let Some(dynamic) = headers.iter().find(|header| header.kind == PT_DYNAMIC) else { return Some(needs) };
    let entries = dynamic_entries(file, dynamic)?;
    let Some((_, table)) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB) else { return Some(needs) };
    // The string table is named by its address in memory; the loaded segments say where that is in the file.
    let load = headers.iter().find(|header| {
        header.kind == PT_LOAD
            && table.checked_sub(header.address).is_some_and(|distance| distance < header.size)
    })?;
    let strings = load.offset.checked_add(table - load.address)?;
    for (tag, value) in &entries {
        let string = || text(file, strings.checked_add(*value)?);
        match *tag {
            DT_NEEDED => needs.libraries.push(string()?),
            DT_RPATH | DT_RUNPATH => {
                let joined = string()?.into_vec();
                needs
                    .paths
                    .extend(joined.split(|b| *b == b':').map(|path| OsString::from_vec(path.to_vec())));
            }
            _ => {}
        }
    }
    Some(needs)
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

fn program_headers(file: &[u8]) -> Option<Vec<ProgramHeader>> {
    let table = u64_at(file, 32)?;
    let entry_size = u64::from(u16_at(file, 54)?);
    let count = u64::from(u16_at(file, 56)?);
    (0..count)
        .map(|i| {
            let at = table.checked_add(entry_size.checked_mul(i)?)?;
            Some(ProgramHeader {
                kind: u32::from_le_bytes(array(file, at)?),
                offset: u64_at(file, at.checked_add(8)?)?,
                address: u64_at(file, at.checked_add(16)?)?,
                size: u64_at(file, at.checked_add(32)?)?,
            })
        })
        .collect()
}

fn dynamic_entries(file: &[u8], dynamic: &ProgramHeader) -> Option<Vec<(u64, u64)>> {
    let mut entries = Vec::new();
    for i in 0..dynamic.size / 16 {
        let at = dynamic.offset.checked_add(i * 16)?;
        let tag = u64_at(file, at)?;
        if tag == 0 {
            break;
        }
        entries.push((tag, u64_at(file, at.checked_add(8)?)?));
    }
    Some(entries)
}

fn array<const N: usize>(file: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u64_at(file: &[u8], at: u64) -> Option<u64> {
    array(file, at).map(u64::from_le_bytes)
}

fn u16_at(file: &[u8], at: u64) -> Option<u16> {
    array(file, at).map(u16::from_le_bytes)
}

/// The NUL-terminated string at an offset.
fn text(file: &[u8], at: u64) -> Option<OsString> {
    let rest = file.get(usize::try_from(at).ok()?..)?;
    let len = rest.iter().position(|byte| *byte == 0)?;
    Some(OsString::from_vec(rest[..len].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_very_program() {
        let needs = needs(&std::fs::read("/proc/self/exe").unwrap()).unwrap();
        assert!(needs.interpreter.is_some_and(|path| path.exists()));
        assert!(needs.libraries.iter().any(|name| name.to_string_lossy().starts_with("libc.")));
    }

    #[test]
    fn refuses_what_is_no_elf_or_cut_short() {
        assert_eq!(needs(b"#!/bin/sh\n"), None);
        assert_eq!(needs(b""), None);
        let file = std::fs::read("/proc/self/exe").unwrap();
        for len in [4, 16, 63, 100] {
            assert_eq!(needs(&file[..len]), None, "{len} bytes");
        }
    }
}
