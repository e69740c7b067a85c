//! The container's log: one JSON object per line, as docker's json-file driver writes them.

use crate::container::error::{Attempt, Result};
use crate::container::time::rfc3339;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

/// A line without an end is written out in pieces of this many bytes.
const LONGEST_LINE: usize = 16 * 1024;

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) log: String,
    pub(crate) stream: String,
    pub(crate) time: String,
}

/// Appends to the log; holds back unfinished lines of each stream.
#[derive(Debug, Default)]
pub(super) struct Log {
    file: Option<File>,
    pending: [Vec<u8>; 2],
}

impl Log {
    /// `None` keeps no log.
    pub(super) fn open(path: Option<&Path>) -> Result<Self> {
        let open = |p: &Path| OpenOptions::new().create(true).append(true).open(p);
        let file = path.map(|p| open(p).attempt(|| format!("open the log {}", p.display()))).transpose()?;
        Ok(Self { file, pending: [Vec::new(), Vec::new()] })
    }

    /// Takes bytes of standard output (`error` false) or standard error.
    pub(super) fn append(&mut self, error: bool, mut bytes: &[u8]) {
        if self.file.is_none() {
            return;
        }
        let mut out = Vec::new();
        let pending = &mut self.pending[usize::from(error)];
        while !bytes.is_empty() {
            let room = LONGEST_LINE - pending.len().min(LONGEST_LINE);
            let end = bytes.iter().take(room).position(|b| *b == b'\n').map(|i| i + 1);
            let (piece, rest) = bytes.split_at(end.unwrap_or(room.min(bytes.len())));
            pending.extend_from_slice(piece);
            bytes = rest;
            if end.is_some() || pending.len() >= LONGEST_LINE {
                encode(error, pending, &mut out);
                pending.clear();
            }
        }
        self.write(&out);
    }

    /// Writes what is held back.
    pub(super) fn flush(&mut self) {
        let mut out = Vec::new();
        for error in [false, true] {
            let pending = std::mem::take(&mut self.pending[usize::from(error)]);
            if !pending.is_empty() {
                encode(error, &pending, &mut out);
            }
        }
        self.write(&out);
    }

    /// What of a stream is not in the file yet.
    pub(super) fn held_back(&self, error: bool) -> &[u8] {
        &self.pending[usize::from(error)]
    }

    /// A full disk must not stop the container: lines that cannot be written are lost.
    fn write(&mut self, bytes: &[u8]) {
        if let Some(file) = self.file.as_mut().filter(|_| !bytes.is_empty()) {
            let _ = file.write_all(bytes);
        }
    }
}

fn encode(error: bool, line: &[u8], out: &mut Vec<u8>) {
    let entry = Entry {
        log: String::from_utf8_lossy(line).into_owned(),
        stream: if error { "stderr" } else { "stdout" }.to_owned(),
        time: rfc3339(SystemTime::now()),
    };
    if serde_json::to_writer(&mut *out, &entry).is_ok() {
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_where_docker_cuts_them() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log.json");
        let mut log = Log::open(Some(&path)).unwrap();
        log.append(false, b"one\ntw");
        log.append(true, b"err\n");
        log.append(false, b"o\n");
        log.append(false, &vec![b'x'; LONGEST_LINE + 5]);
        assert_eq!(log.held_back(false).len(), 5);
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let entries: Vec<Entry> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let seen: Vec<_> = entries.iter().map(|e| (e.stream.as_str(), e.log.len())).collect();
        let (long, short) = (("stdout", LONGEST_LINE), ("stdout", 5));
        assert_eq!(seen, [("stdout", 4), ("stderr", 4), ("stdout", 4), long, short]);
        assert_eq!(entries[2].log, "two\n");
    }
}
