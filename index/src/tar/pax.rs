//! PAX extended headers: records `LENGTH KEY=VALUE\n` (POSIX.1-2001 pax, "pax Extended Header").

use crate::Timestamp;

/// Most extended attributes an entry may have.
pub(crate) const XATTRS_MAX: usize = 1024;
/// Longest attribute name (XATTR_NAME_MAX).
pub(crate) const XATTR_NAME_MAX: usize = 255;
/// Longest attribute value (XATTR_SIZE_MAX).
pub(crate) const XATTR_VALUE_MAX: usize = 64 * 1024;

/// What the records of one extended header say. Absent and empty values leave the header's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<i64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(crate) mtime: Option<Timestamp>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PaxSparse {
    pub(super) major: Option<i64>,
    pub(super) minor: Option<i64>,
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size` (0.0, 0.1) or `GNU.sparse.realsize` (1.0).
    pub(super) size: Option<i64>,
    /// Offsets and lengths in turn, from `GNU.sparse.map` or the repeated records of 0.0.
    pub(super) map: Option<Vec<i64>>,
}

impl Pax {
    /// Parses the body of an extended header.
    pub(super) fn parse(mut body: &[u8]) -> Result<Self, String> {
        let mut records = Vec::new();
        while !body.is_empty() {
            let (key, value, rest) = record(body)?;
            body = rest;
            records.push((key, value));
        }
        Self::from_records(records)
    }

    /// What keys and values say, in their order.
    pub(crate) fn from_records<'a>(
        records: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Self, String> {
        let mut pax = Self::default();
        let mut libarchive = Vec::new();
        for (key, value) in records {
            pax.set(key, value, &mut libarchive)?;
        }
        // The same attributes in both spellings: SCHILY's, which containerd reads, wins.
        for (name, value) in libarchive {
            if !pax.xattrs.iter().any(|(n, _)| *n == name) {
                pax.add_xattr(name, value)?;
            }
        }
        Ok(pax)
    }

    fn set(
        &mut self,
        key: &[u8],
        value: &[u8],
        libarchive: &mut Vec<(Vec<u8>, Vec<u8>)>,
    ) -> Result<(), String> {
        let bytes = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = no_nul(key, value)?,
            b"linkpath" => self.link = no_nul(key, value)?,
            b"size" => self.size = integer(key, value)?,
            b"uid" => self.uid = integer(key, value)?,
            b"gid" => self.gid = integer(key, value)?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(timestamp(value)?) },
            b"GNU.sparse.major" => self.sparse.major = integer(key, value)?,
            b"GNU.sparse.minor" => self.sparse.minor = integer(key, value)?,
            b"GNU.sparse.name" => self.sparse.name = no_nul(key, value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = integer(key, value)?,
            b"GNU.sparse.map" => self.sparse.map = bytes().map(|map| numbers(key, &map)).transpose()?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let map = self.sparse.map.get_or_insert_default();
                if map.len().is_multiple_of(2) != (key == b"GNU.sparse.offset") {
                    return Err("GNU.sparse.offset and GNU.sparse.numbytes do not come in turn".into());
                }
                map.push(integer(key, value)?.unwrap_or(0));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.add_xattr(name.to_vec(), value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let value =
                        base64(value).ok_or_else(|| format!("record {} is not base64", shown(key)))?;
                    libarchive.push((url_decode(name), value));
                }
            }
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: Vec<u8>, value: Vec<u8>) -> Result<(), String> {
        if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains(&0) {
            return Err(format!("extended attribute name {} is empty, too long or has a NUL", shown(&name)));
        }
        if value.len() > XATTR_VALUE_MAX {
            return Err(format!(
                "extended attribute {} has {} bytes, more than {XATTR_VALUE_MAX}",
                shown(&name),
                value.len()
            ));
        }
        if let Some(known) = self.xattrs.iter_mut().find(|(n, _)| *n == name) {
            known.1 = value;
        } else if self.xattrs.len() >= XATTRS_MAX {
            return Err(format!("more than {XATTRS_MAX} extended attributes"));
        } else {
            self.xattrs.push((name, value));
        }
        Ok(())
    }
}

/// Key, value, and the records after it.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits the first record off.
fn record(body: &[u8]) -> Result<Record<'_>, String> {
    let bad = || format!("malformed extended header record {}", shown(body));
    let space = body.iter().take(20).position(|&c| c == b' ').ok_or_else(bad)?;
    let len = decimal(&body[..space]).and_then(|n| usize::try_from(n).ok()).ok_or_else(bad)?;
    if len <= space + 1 || len > body.len() || body[len - 1] != b'\n' {
        return Err(bad());
    }
    let content = &body[space + 1..len - 1];
    let equals = content.iter().position(|&c| c == b'=').ok_or_else(bad)?;
    if equals == 0 || content[..equals].contains(&0) {
        return Err(bad());
    }
    Ok((&content[..equals], &content[equals + 1..], &body[len..]))
}

fn shown(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes[..bytes.len().min(60)].escape_ascii())
}

fn no_nul(key: &[u8], value: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if value.contains(&0) {
        return Err(format!("record {} contains a NUL byte", shown(key)));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn integer(key: &[u8], value: &[u8]) -> Result<Option<i64>, String> {
    if value.is_empty() {
        return Ok(None);
    }
    let (sign, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (-1, digits),
        None => (1, value),
    };
    decimal(digits)
        .map(|n| Some(sign * n))
        .ok_or_else(|| format!("record {} is not a number: {}", shown(key), shown(value)))
}

fn numbers(key: &[u8], list: &[u8]) -> Result<Vec<i64>, String> {
    list.split(|&c| c == b',').map(|n| integer(key, n).map(|n| n.unwrap_or(0))).collect()
}

/// Unsigned decimal digits, nothing else.
pub(super) fn decimal(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0i64, |n, &c| {
        c.is_ascii_digit().then_some(())?;
        n.checked_mul(10)?.checked_add(i64::from(c - b'0'))
    })
}

/// Decimal seconds with a sign and a fraction, of which nine digits count.
fn timestamp(value: &[u8]) -> Result<Timestamp, String> {
    let bad = || format!("the mtime record is not a time: {}", shown(value));
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |&c| c == b'.');
    let secs = decimal(parts.next().unwrap_or_default()).ok_or_else(bad)?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let nanos = (0..9).fold(0u32, |n, i| n * 10 + fraction.get(i).map_or(0, |c| u32::from(c - b'0')));
    Ok(match (negative, nanos) {
        (false, nanos) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos: 0 },
        // -1.5 is 0.5 after -2.
        (true, nanos) => Timestamp { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// `%XX` escapes of libarchive's attribute names.
fn url_decode(name: &[u8]) -> Vec<u8> {
    let hex = |c: &u8| (*c as char).to_digit(16).map(|d| d as u8);
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&c, tail)) = rest.split_first() {
        let escaped = match tail {
            [a, b, ..] if c == b'%' => hex(a).zip(hex(b)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            out.push(high << 4 | low);
            rest = &tail[2..];
        } else {
            out.push(c);
            rest = tail;
        }
    }
    out
}

/// Standard base64, with or without padding.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut held) = (0u32, 0);
    for &c in text {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rec(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = rest.len() + 1;
        while len.to_string().len() + rest.len() != len {
            len += 1;
        }
        [len.to_string().as_bytes(), &rest].concat()
    }

    #[test]
    fn records() {
        let body = [
            rec("path", b"a b"),
            rec("mtime", b"-1.25000"),
            rec("SCHILY.xattr.user.a", b"\x00=\n\xff  "),
            rec("size", b"1234567890"),
            rec("uid", b""),
            rec("comment", b"not for us"),
        ];
        let pax = Pax::parse(&body.concat()).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a b"[..]));
        assert_eq!(pax.mtime, Some(Timestamp { secs: -2, nanos: 750_000_000 }));
        assert_eq!(pax.xattrs, [(b"user.a".to_vec(), b"\x00=\n\xff  ".to_vec())]);
        assert_eq!((pax.size, pax.uid), (Some(1_234_567_890), None));
    }

    #[test]
    fn libarchive_attributes() {
        let ours = rec("LIBARCHIVE.xattr.user.a%3Db", b"aGk");
        let pax = Pax::parse(&ours).unwrap();
        assert_eq!(pax.xattrs, [(b"user.a=b".to_vec(), b"hi".to_vec())]);
        // Both spellings: SCHILY's counts.
        let both = [rec("LIBARCHIVE.xattr.user.c", b"aGk"), rec("SCHILY.xattr.user.c", b"x")].concat();
        assert_eq!(Pax::parse(&both).unwrap().xattrs, [(b"user.c".to_vec(), b"x".to_vec())]);
        assert!(Pax::parse(&rec("LIBARCHIVE.xattr.user.a", b"?")).is_err());
    }

    #[test]
    fn bad_records_are_refused() {
        for bad in [
            &b"5 a=b"[..],
            b"99 path=a\n",
            b"0 a=b\n",
            b"3 \n",
            b"x a=b\n",
            b"6 =bc\n",
            b"6 abc\n",
            b"99999999999999999999999 a=b\n",
            b"10 size=x\n",
            b"11 path=a\0\n",
            b"12 mtime=1x\n",
            b"25 GNU.sparse.numbytes=1\n",
        ] {
            assert!(Pax::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
