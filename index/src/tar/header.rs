//! The 512-byte header block.

use super::BLOCK;

/// Which family of headers a block belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavor {
    /// Seventh edition Unix: no magic.
    V7,
    /// POSIX ustar, also under PAX headers.
    Ustar,
    /// ustar magic with Jörg Schilling's `tar\0` at the end: a shorter prefix.
    Star,
    /// GNU tar: `ustar  `.
    Gnu,
}

/// The fields of a header, numbers decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(super) flavor: Flavor,
    pub(crate) name: Vec<u8>,
    pub(super) mode: u16,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(crate) size: i64,
    pub(super) mtime: i64,
    pub(crate) flag: u8,
    pub(super) link: Vec<u8>,
}

impl Header {
    /// Decodes `block` after checking its checksum.
    pub(crate) fn parse(block: &[u8; BLOCK]) -> Result<Self, String> {
        check_sum(block)?;
        let flavor = match &block[257..265] {
            b"ustar  \0" => Flavor::Gnu,
            magic if magic.starts_with(b"ustar\0") => {
                if &block[508..512] == b"tar\0" {
                    Flavor::Star
                } else {
                    Flavor::Ustar
                }
            }
            _ => Flavor::V7,
        };
        let prefix = match flavor {
            Flavor::Ustar => text(&block[345..500]),
            Flavor::Star => text(&block[345..476]),
            Flavor::V7 | Flavor::Gnu => b"",
        };
        let mut name = Vec::new();
        if !prefix.is_empty() {
            name.extend_from_slice(prefix);
            name.push(b'/');
        }
        name.extend_from_slice(text(&block[..100]));
        Ok(Self {
            flavor,
            name,
            mode: (number(&block[100..108], "mode")? & 0o7777) as u16,
            uid: number(&block[108..116], "uid")?,
            gid: number(&block[116..124], "gid")?,
            size: number(&block[124..136], "size")?,
            mtime: number(&block[136..148], "mtime")?,
            flag: block[156],
            link: text(&block[157..257]).to_vec(),
        })
    }
}

/// Major and minor number of a device; v7 archives have none.
pub(super) fn device(block: &[u8; BLOCK], flavor: Flavor) -> Result<(u32, u32), String> {
    if flavor == Flavor::V7 {
        return Err("it is a device without device numbers".into());
    }
    let part = |range: std::ops::Range<usize>, what| {
        let value = number(&block[range], what)?;
        u32::try_from(value).map_err(|_| format!("the {what} {value} is out of range"))
    };
    let rdev = (part(329..337, "device major")?, part(337..345, "device minor")?);
    check_device(rdev).map(|()| rdev)
}

/// Whether Linux can hold a device number: 12 bits of major, 20 bits of minor number.
pub(crate) fn check_device((major, minor): (u32, u32)) -> Result<(), String> {
    match (major >> 12, minor >> 20) {
        (0, 0) => Ok(()),
        (0, _) => Err(format!("the device minor {minor} is out of range")),
        _ => Err(format!("the device major {major} is out of range")),
    }
}

/// A text field up to its NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&c| c == 0).unwrap_or(field.len())]
}

/// A number: octal digits between spaces and NULs, or base 256 when the first bit is set.
pub(super) fn number(field: &[u8], what: &str) -> Result<i64, String> {
    let first = field.first().copied().unwrap_or(0);
    if first & 0x80 != 0 {
        return base256(field).ok_or_else(|| format!("the {what} field is out of range"));
    }
    let blank = |c: &u8| *c == b' ' || *c == 0;
    let start = field.iter().position(|c| !blank(c)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    let bad = || format!("the {what} field is not an octal number: \"{}\"", field.escape_ascii());
    if !digits[end..].iter().all(blank) {
        return Err(bad());
    }
    digits[..end].iter().try_fold(0i64, |value, &c| match c {
        b'0'..=b'7' => value.checked_mul(8).map(|v| v | i64::from(c - b'0')).ok_or_else(bad),
        _ => Err(bad()),
    })
}

/// Two's complement, most significant byte first; the very first bit only marks the encoding.
fn base256(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    // Bit 6 is the sign; bit 7 takes its value.
    let start = if first & 0x40 != 0 { i64::from(first) - 256 } else { i64::from(first & 0x7f) };
    rest.iter().try_fold(start, |value, &c| value.checked_mul(256)?.checked_add(i64::from(c)))
}

/// The sum of all bytes with the field itself as spaces; old writers summed signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), String> {
    let stored = number(&block[148..156], "checksum")?;
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (i, &c) in block.iter().enumerate() {
        let c = if (148..156).contains(&i) { b' ' } else { c };
        unsigned += i64::from(c);
        signed += i64::from(c as i8);
    }
    if stored == unsigned || stored == signed {
        Ok(())
    } else {
        Err(format!("the checksum is {stored} instead of {unsigned}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0", "x").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0", "x").unwrap(), 0o644);
        assert_eq!(number(b"\0\0\0\0", "x").unwrap(), 0);
        assert_eq!(number(b"77777777777", "x").unwrap(), 0o77_777_777_777);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1], "x").unwrap(), (2 << 32) + 1);
        assert_eq!(number(&[0xff; 12], "x").unwrap(), -1);
        assert_eq!(number(&[0xff, 0xff, 0xff, 0x00], "x").unwrap(), -256);
        for bad in [&b"12x4\0"[..], b"89", b"1 2", b"-1"] {
            assert!(number(bad, "x").is_err());
        }
        let mut huge = [0xff; 12];
        huge[0] = 0x80;
        assert!(number(&huge, "x").is_err());
    }
}
