//! The protocol of a shim's socket: one JSON line from the client, then frames both ways.
//!
//! A frame is a type byte, the payload's length as u32 little-endian, and the payload.

use serde::{Deserialize, Serialize};

/// Longest payload a frame may have, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Longest request line, in bytes.
pub const MAX_REQUEST: usize = 8 << 20;
const HEADER: usize = 5;

/// The first line a client sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// Follow the container's streams.
    Attach {
        /// Frames of type stdin are for the container.
        #[serde(default)]
        stdin: bool,
        /// First what the log holds already, then what comes.
        #[serde(default)]
        logs: bool,
    },
    /// Run one more process in the container.
    Exec {
        /// What to run.
        process: ExecProcess,
    },
    /// Send a signal to the container's first process. Answered by an exit frame with code 0, or an error.
    Kill {
        /// Signal number; SIGKILL reaches every process of the container.
        signal: i32,
    },
    /// Set the size of the container's terminal. Answered as kill is.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// Ask how the container is. Answered by a JSON line ([`State`]), no frames.
    State,
}

/// A process to run in a running container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecProcess {
    /// Command and arguments.
    pub args: Vec<String>,
    /// Environment on top of the container's own.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; the container's when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// `name|uid[:name|gid]`; the container's user when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// With a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// With standard input from this client.
    #[serde(default)]
    pub stdin: bool,
    /// With all capabilities and no seccomp filter.
    #[serde(default)]
    pub privileged: bool,
    /// First size of the terminal: rows, columns.
    #[serde(default)]
    pub size: Option<(u16, u16)>,
}

/// Answer to [`Request::State`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `created`, `running` or `stopped`.
    pub status: String,
    /// Pid of the container's first process, 0 when there is none.
    pub pid: i32,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Type 0: bytes for standard input.
    Stdin(Vec<u8>),
    /// Type 1: bytes of standard output (all bytes, with a terminal).
    Stdout(Vec<u8>),
    /// Type 2: bytes of standard error.
    Stderr(Vec<u8>),
    /// Type 3: new size of the terminal; rows and columns as u16.
    Resize(u16, u16),
    /// Type 4: no more input.
    StdinEof,
    /// Type 5: the process ended; its code as i32.
    Exit(i32),
    /// Type 6: it failed; code as i32, then a sentence.
    Error(i32, String),
    /// Type 7: it runs; its pid on the host as u32.
    Started(u32),
    /// Type 8: send this signal (u32) to the process.
    Signal(u32),
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Unknown type byte.
    #[error("frame type {0} is unknown")]
    Kind(u8),
    /// Payload longer than allowed.
    #[error("a frame of {0} bytes is longer than allowed")]
    Length(usize),
    /// Payload of the wrong size for its type.
    #[error("a frame of type {0} has a payload of the wrong size")]
    Payload(u8),
}

impl Frame {
    /// Appends the encoded frame. Payloads longer than [`MAX_PAYLOAD`] must be split by the caller.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Stdin(b) => put(out, 0, &[b]),
            Self::Stdout(b) => put(out, 1, &[b]),
            Self::Stderr(b) => put(out, 2, &[b]),
            Self::Resize(rows, cols) => put(out, 3, &[&rows.to_le_bytes(), &cols.to_le_bytes()]),
            Self::StdinEof => put(out, 4, &[]),
            Self::Exit(code) => put(out, 5, &[&code.to_le_bytes()]),
            Self::Error(code, text) => put(out, 6, &[&code.to_le_bytes(), text.as_bytes()]),
            Self::Started(pid) => put(out, 7, &[&pid.to_le_bytes()]),
            Self::Signal(signal) => put(out, 8, &[&signal.to_le_bytes()]),
        }
    }

    /// The encoded frame.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    /// Takes one frame off the front of `bytes`: the frame and the bytes it used, or `None` when more bytes
    /// are needed.
    ///
    /// # Errors
    /// The bytes cannot become a frame.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some((&[kind, l0, l1, l2, l3], rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if kind > 8 {
            return Err(FrameError::Kind(kind));
        }
        if len > MAX_PAYLOAD {
            return Err(FrameError::Length(len));
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let frame = Self::from_parts(kind, payload).ok_or(FrameError::Payload(kind))?;
        Ok(Some((frame, HEADER + len)))
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Option<Self> {
        let four = || payload.try_into().ok();
        Some(match kind {
            0 => Self::Stdin(payload.to_vec()),
            1 => Self::Stdout(payload.to_vec()),
            2 => Self::Stderr(payload.to_vec()),
            3 => {
                let [r0, r1, c0, c1]: [u8; 4] = four()?;
                Self::Resize(u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]))
            }
            4 if payload.is_empty() => Self::StdinEof,
            5 => Self::Exit(i32::from_le_bytes(four()?)),
            6 => {
                let (code, text) = payload.split_first_chunk::<4>()?;
                Self::Error(i32::from_le_bytes(*code), String::from_utf8_lossy(text).into_owned())
            }
            7 => Self::Started(u32::from_le_bytes(four()?)),
            8 => Self::Signal(u32::from_le_bytes(four()?)),
            _ => return None,
        })
    }
}

fn put(out: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    out.push(kind);
    out.extend((len as u32).to_le_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends a stdout (`error` false) or stderr frame without copying the bytes twice.
pub(crate) fn encode_output(error: bool, bytes: &[u8], out: &mut Vec<u8>) {
    put(out, if error { 2 } else { 1 }, &[bytes]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_in_any_cut() {
        let frames = [
            Frame::Stdin(b"abc".to_vec()),
            Frame::Stdout(vec![]),
            Frame::Stderr(vec![1; 300]),
            Frame::Resize(24, 80),
            Frame::StdinEof,
            Frame::Exit(-1),
            Frame::Error(127, "no".into()),
            Frame::Started(7),
            Frame::Signal(15),
        ];
        for frame in frames {
            let bytes = frame.to_bytes();
            for cut in 0..bytes.len() {
                assert_eq!(Frame::decode(&bytes[..cut]).unwrap(), None);
            }
            assert_eq!(Frame::decode(&bytes).unwrap(), Some((frame, bytes.len())));
        }
    }

    #[test]
    fn requests_are_the_documented_json() {
        let parse = |s: &str| serde_json::from_str::<Request>(s).unwrap();
        assert_eq!(
            parse(r#"{"op":"attach","stdin":true,"logs":false}"#),
            Request::Attach { stdin: true, logs: false }
        );
        assert_eq!(parse(r#"{"op":"kill","signal":9}"#), Request::Kill { signal: 9 });
        assert_eq!(parse(r#"{"op":"state"}"#), Request::State);
        let exec = parse(r#"{"op":"exec","process":{"args":["true"],"terminal":true}}"#);
        assert!(matches!(exec, Request::Exec { process } if process.terminal && process.args == ["true"]));
    }

    #[test]
    fn foreign_bytes_never_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..20_000 {
            let len = (next() % 24) as usize;
            // Small bytes, so that types and lengths are often valid ones.
            let bytes: Vec<u8> = (0..len).map(|_| (next() % 12) as u8 * u8::from(next() % 3 > 0)).collect();
            if let Ok(Some((_, used))) = Frame::decode(&bytes) {
                assert!(used <= bytes.len());
            }
        }
    }
}
