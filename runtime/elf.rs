//! Which shared libraries an ELF file asks for, read from its dynamic section (System V ABI, chapter 5). Only
//! 64-bit little-endian files: what every host that runs this program has.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What the dynamic loader would look for.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Needs {
    /// The loader itself (`PT_INTERP`); programs have one, libraries do not.
    pub(crate) interpreter: Option<PathBuf>,
    /// Library names (`DT_NEEDED`).
    pub(crate) libraries: Vec<OsString>,
    /// Where to look first (`DT_RPATH`, `DT_RUNPATH`), `$ORIGIN` not yet replaced.
    pub(crate) paths: Vec<OsString>,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// Most program headers of a file that is looked at; linkers make a dozen.
const MAX_HEADERS: u16 = 256;
/// Most bytes of a dynamic section that are looked at.
const MAX_DYNAMIC: u64 = 64 << 10;
/// Most libraries and most directories that count: real programs have some dozens, foreign ones may repeat one long list.
const MAX_LIBRARIES: usize = 256;
const MAX_DIRS: usize = 64;
/// Most bytes of a name: what a path may have.
const MAX_TEXT: usize = 4096;

/// Where an ELF file's bytes come from: those at an offset, all or fewer of the number asked for. `None` when none are
/// to be had.
pub(crate) trait Bytes {
    /// Bytes at `offset`, at most `len` of them.
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>>;
}

impl Bytes for &[u8] {
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let rest = self.get(usize::try_from(offset).ok()?..)?;
        Some(rest[..len.min(rest.len())].to_vec())
    }
}

/// Reads the needs of an ELF file; `None` for anything that is none, is malformed, or is not all there.
pub(crate) fn needs(file: &impl Bytes) -> Option<Needs> {
    let head: [u8; 64] = array(file, 0)?;
    // e_ident: magic, ELFCLASS64, ELFDATA2LSB.
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = program_headers(file, &head)?;
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
            DT_NEEDED if needs.libraries.len() < MAX_LIBRARIES => needs.libraries.push(string()?),
            DT_RPATH | DT_RUNPATH => {
                let (joined, room) = (string()?.into_vec(), MAX_DIRS.saturating_sub(needs.paths.len()));
                let dirs = joined.split(|b| *b == b':').take(room);
                needs.paths.extend(dirs.map(|path| OsString::from_vec(path.to_vec())));
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

/// Bytes of a program header of a 64-bit file.
const HEADER: u16 = 56;

fn program_headers(file: &impl Bytes, head: &[u8; 64]) -> Option<Vec<ProgramHeader>> {
    let (table, size, count) = (u64_in(head, 32)?, u16_in(head, 54)?, u16_in(head, 56)?);
    if count > MAX_HEADERS || (count > 0 && size != HEADER) {
        return None;
    }
    let bytes = file.at(table, usize::from(HEADER) * usize::from(count))?;
    let header = |header: &[u8]| {
        Some(ProgramHeader {
            kind: u32::from_le_bytes(header.get(..4)?.try_into().ok()?),
            offset: u64_in(header, 8)?,
            address: u64_in(header, 16)?,
            size: u64_in(header, 32)?,
        })
    };
    let headers: Option<Vec<_>> = bytes.chunks(HEADER.into()).map(header).collect();
    // Fewer where the file ends too early.
    headers.filter(|headers| headers.len() == usize::from(count))
}

fn dynamic_entries(file: &impl Bytes, dynamic: &ProgramHeader) -> Option<Vec<(u64, u64)>> {
    let bytes = file.at(dynamic.offset, dynamic.size.min(MAX_DYNAMIC) as usize)?;
    let entries = bytes.chunks_exact(16).map(|entry| Some((u64_in(entry, 0)?, u64_in(entry, 8)?)));
    entries.take_while(|entry| entry.is_none_or(|(tag, _)| tag != 0)).collect()
}

fn array<const N: usize>(file: &impl Bytes, at: u64) -> Option<[u8; N]> {
    file.at(at, N)?.try_into().ok()
}

fn u64_in(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn u16_in(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// The NUL-terminated string at an offset.
fn text(file: &impl Bytes, at: u64) -> Option<OsString> {
    // Names are short; only for an odd one is more than this looked at.
    [256, MAX_TEXT].into_iter().find_map(|most| {
        let bytes = file.at(at, most)?;
        let len = bytes.iter().position(|byte| *byte == 0)?;
        Some(OsString::from_vec(bytes[..len].to_vec()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_very_program() {
        let needs = needs(&std::fs::read("/proc/self/exe").unwrap().as_slice()).unwrap();
        assert!(needs.interpreter.is_some_and(|path| path.exists()));
        assert!(needs.libraries.iter().any(|name| name.to_string_lossy().starts_with("libc.")));
    }

    #[test]
    fn what_is_repeated_without_end_is_bounded() {
        // A header, one loaded segment over everything, and a dynamic section of nothing but run paths and libraries.
        let mut file = vec![0; 64 + 2 * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        (file[54], file[56]) = (56, 2);
        let strings = file.len() as u64;
        file.extend(b":".repeat(4000));
        file.push(0);
        let dynamic = file.len() as u64;
        let entries = [(DT_STRTAB, strings), (DT_RUNPATH, 0), (DT_NEEDED, 0)];
        for (tag, value) in entries.into_iter().chain([(DT_RUNPATH, 0), (DT_NEEDED, 0)].repeat(2000)) {
            file.extend(tag.to_le_bytes());
            file.extend(value.to_le_bytes());
        }
        let len = file.len() as u64;
        for (at, kind, offset, size) in [(64, PT_LOAD, 0, len), (120, PT_DYNAMIC, dynamic, len - dynamic)] {
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            file[at + 8..at + 16].copy_from_slice(&u64::to_le_bytes(offset));
            file[at + 32..at + 40].copy_from_slice(&u64::to_le_bytes(size));
        }
        let needs = needs(&file.as_slice()).expect("well-formed");
        assert_eq!((needs.libraries.len(), needs.paths.len()), (MAX_LIBRARIES, MAX_DIRS));
    }

    #[test]
    fn refuses_what_is_no_elf_or_cut_short() {
        assert_eq!(needs(&b"#!/bin/sh\n".as_slice()), None);
        assert_eq!(needs(&b"".as_slice()), None);
        let file = std::fs::read("/proc/self/exe").unwrap();
        for len in [4, 16, 63, 100] {
            assert_eq!(needs(&&file[..len]), None, "{len} bytes");
        }
    }
}
