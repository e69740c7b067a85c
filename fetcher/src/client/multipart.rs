//! The body of an answer with several ranges: `multipart/byteranges` (RFC 9110, section 14.6).

use std::ops::Range;

use bytes::{Buf as _, Bytes, BytesMut};

use super::range::parse_content_range;

/// Most bytes of a part's head, with what stands before its boundary.
const MAX_HEAD: usize = 4 << 10;
/// Longest boundary (RFC 2046, section 5.1.1).
const MAX_BOUNDARY: usize = 70;

/// Takes such a body apart as it comes. Parts must be what was asked for, in that order.
pub(super) struct Parts {
    /// What stands in front of each part: `--` and the boundary.
    delimiter: Vec<u8>,
    /// What is still to come; the first one may have begun.
    wanted: std::collections::VecDeque<Range<u64>>,
    in_part: bool,
    buffer: BytesMut,
}

impl Parts {
    /// A body with this `Content-Type` that answers a request for `wanted`; `None` if it is of another kind.
    pub(super) fn new(content_type: &str, wanted: &[Range<u64>]) -> Option<Parts> {
        let boundary = boundary_of(content_type)?;
        let delimiter = [b"--", boundary.as_bytes()].concat();
        let wanted = wanted.iter().cloned().collect();
        Some(Parts { delimiter, wanted, in_part: false, buffer: BytesMut::new() })
    }

    /// Whether all parts have come.
    pub(super) fn is_done(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Takes in a piece of the body.
    pub(super) fn feed(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    /// The next bytes of the blob and their place in it; `None` when more of the body is needed for that, or all is
    /// there.
    ///
    /// # Errors
    /// When the body is not what was asked for.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Bytes)>, String> {
        if !self.in_part && !self.head()? {
            return Ok(None);
        }
        let Some(part) = self.wanted.front_mut() else { return Ok(None) };
        let left = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
        let len = left.min(self.buffer.len());
        if len == 0 {
            return Ok(None);
        }
        let (at, bytes) = (part.start, self.buffer.split_to(len).freeze());
        part.start += len as u64;
        if part.start == part.end {
            self.wanted.pop_front();
            self.in_part = false;
        }
        Ok(Some((at, bytes)))
    }

    /// Reads the head of the next part, once it is there wholly.
    fn head(&mut self) -> Result<bool, String> {
        let Some(part) = self.wanted.front() else { return Ok(false) };
        let Some(end) = find(&self.buffer, b"\r\n\r\n") else {
            return if self.buffer.len() > MAX_HEAD {
                Err("a part without a head".to_owned())
            } else {
                Ok(false)
            };
        };
        let head = std::str::from_utf8(&self.buffer[..end]).map_err(|_| "the head of a part is no text")?;
        let mut lines = head.split("\r\n").skip_while(|line| line.is_empty());
        // The end of the part before is where its range says.
        if lines.next().is_none_or(|line| line.trim_end().as_bytes() != self.delimiter) {
            return Err("a part does not begin with the boundary".to_owned());
        }
        let range = lines.find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.trim().eq_ignore_ascii_case("content-range").then(|| parse_content_range(value))
        });
        if range.flatten() != Some((part.start, part.end - 1)) {
            return Err(format!("a part is not the range {}..{} that is next", part.start, part.end));
        }
        self.buffer.advance(end + 4);
        self.in_part = true;
        Ok(true)
    }
}

/// The boundary in a `Content-Type: multipart/byteranges; boundary=…`.
fn boundary_of(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/byteranges") {
        return None;
    }
    let boundary = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
    })?;
    (!boundary.is_empty() && boundary.len() <= MAX_BOUNDARY).then_some(boundary)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let near = &haystack[..haystack.len().min(MAX_HEAD)];
    near.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: &str = "multipart/byteranges; boundary=\"xyz\"";

    fn body(parts: &[(u64, &str)]) -> Vec<u8> {
        let mut body = String::new();
        for (at, text) in parts {
            let last = at + text.len() as u64 - 1;
            body += &format!(
                "\r\n--xyz\r\nContent-Type: a/b\r\ncontent-range: bytes {at}-{last}/1000\r\n\r\n{text}"
            );
        }
        (body + "\r\n--xyz--\r\n").into_bytes()
    }

    fn read(wanted: &[Range<u64>], body: &[u8], step: usize) -> Result<Vec<(u64, String)>, String> {
        let mut parts = Parts::new(KIND, wanted).expect("several parts");
        let mut got: Vec<(u64, String)> = Vec::new();
        for piece in body.chunks(step) {
            parts.feed(piece);
            while let Some((at, bytes)) = parts.next()? {
                let text = std::str::from_utf8(&bytes).expect("text");
                match got.last_mut().filter(|(start, all)| start + all.len() as u64 == at) {
                    Some((_, all)) => all.push_str(text),
                    None => got.push((at, text.to_owned())),
                }
            }
        }
        if parts.is_done() { Ok(got) } else { Err("not done".to_owned()) }
    }

    #[test]
    fn parts_come_in_pieces_of_any_length() {
        let wanted = [700..704, 10..13, 500..501];
        let sent = body(&[(700, "\r\n--"), (10, "abc"), (500, "x")]);
        let expected = [(700, "\r\n--".to_owned()), (10, "abc".to_owned()), (500, "x".to_owned())];
        for step in [1, 2, 3, 7, 50, 1000] {
            assert_eq!(read(&wanted, &sent, step).expect("parts"), expected, "{step}");
        }
        // Without the empty line that Go's servers do not send before the first boundary.
        assert_eq!(read(&wanted, &sent[2..], 5).expect("parts"), expected);
    }

    #[test]
    fn anything_else_is_an_error() {
        let wanted = [10..13, 500..501];
        for wrong in [
            body(&[(500, "x"), (10, "abc")]),
            body(&[(10, "ab"), (500, "x")]),
            body(&[(10, "abcd"), (500, "x")]),
            body(&[(10, "abc")]),
            b"--abc\r\nContent-Range: bytes 10-12/1000\r\n\r\nabc".to_vec(),
            b"--xyz\r\nContent-Type: a/b\r\n\r\nabc".to_vec(),
            vec![b'-'; 10_000],
            vec![0xff; 100],
            Vec::new(),
        ] {
            assert!(read(&wanted, &wrong, 9).is_err(), "{:?}", String::from_utf8_lossy(&wrong));
        }
        for kind in [
            "text/plain",
            "multipart/byteranges",
            "multipart/byteranges; boundary=",
            "multipart/x; boundary=a",
        ] {
            assert!(Parts::new(kind, &wanted).is_none(), "{kind}");
        }
    }
}
