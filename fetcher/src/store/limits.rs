//! How much of a disk the store may take.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The smallest limit: what a few readers wait for at the same time must fit.
const MIN_LIMIT: u64 = 8 << 20;
/// Bytes of the store's disk that are left free unless somebody says otherwise.
pub(crate) const DEFAULT_RESERVE: u64 = 512 << 20;
/// A reserve never takes more of a disk than one part in so many, or small disks would hold nothing.
const RESERVE_PART: u64 = 20;

/// A hard limit of the store: everything of layers, their indexes and what is being streamed included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheLimit {
    /// Bytes of disk.
    Bytes(u64),
    /// Parts of a hundred of the disk's size.
    Percent(u8),
}

/// A text that is no limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no limit of the cache: write for example 20GiB, or 80% of the disk; at least 8MiB, at most 100%"
)]
pub struct ParseLimitError(String);

impl FromStr for CacheLimit {
    type Err = ParseLimitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseLimitError(text.to_owned());
        match text.trim().strip_suffix('%') {
            Some(percent) => match percent.trim().parse() {
                Ok(percent @ 1..=100) => Ok(CacheLimit::Percent(percent)),
                _ => Err(bad()),
            },
            None => match parse_bytes(text) {
                Some(bytes) if bytes >= MIN_LIMIT => Ok(CacheLimit::Bytes(bytes)),
                _ => Err(bad()),
            },
        }
    }
}

impl fmt::Display for CacheLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheLimit::Bytes(bytes) => write!(f, "{bytes}"),
            CacheLimit::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for CacheLimit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CacheLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes with a unit: `KiB`, `MiB`, `GiB`, `TiB` or `K`, `M`, `G`, `T` in powers of 1024; `kB`, `MB`, `GB`, `TB` in
/// powers of 1000. `None` for anything else, and for what does not fit.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: f64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return None,
    };
    let value = digits.trim().parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0)? * unit;
    // Beyond that a float does not count single bytes, and no disk has so many.
    (value < 2f64.powi(53)).then_some(value as u64)
}

/// What a store keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLimits {
    /// Most that the store may take; none: what the disk has.
    pub limit: Option<CacheLimit>,
    /// Bytes of the disk that are left free, or a twentieth of a disk for which that is less.
    pub reserve: u64,
}

impl Default for CacheLimits {
    fn default() -> Self {
        CacheLimits { limit: None, reserve: DEFAULT_RESERVE }
    }
}

impl CacheLimits {
    /// The limit in bytes on a disk of this size.
    pub fn limit_on(&self, disk: u64) -> Option<u64> {
        Some(match self.limit? {
            CacheLimit::Bytes(bytes) => bytes,
            CacheLimit::Percent(percent) => disk / 100 * u64::from(percent),
        })
    }

    /// The reserve in bytes on a disk of this size.
    pub fn reserve_on(&self, disk: u64) -> u64 {
        self.reserve.min(disk / RESERVE_PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_as_people_write_them() {
        let read = |text: &str| text.parse::<CacheLimit>().ok();
        assert_eq!(read("20GiB"), Some(CacheLimit::Bytes(20 << 30)));
        assert_eq!(read("20g"), Some(CacheLimit::Bytes(20 << 30)));
        assert_eq!(read("1.5 TB"), Some(CacheLimit::Bytes(1_500_000_000_000)));
        assert_eq!(read("16777216"), Some(CacheLimit::Bytes(16 << 20)));
        assert_eq!(read("80%"), Some(CacheLimit::Percent(80)));
        for bad in
            ["", "%", "0%", "101%", "-1", "7MiB", "GiB", "12 parsecs", "1e300", "nan", "inf", "9999999TiB"]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(parse_bytes("0"), Some(0));
        for limit in [CacheLimit::Bytes(20 << 30), CacheLimit::Percent(80)] {
            assert_eq!(read(&limit.to_string()), Some(limit));
        }
    }

    #[test]
    fn limits_on_a_disk() {
        let limits = CacheLimits { limit: Some(CacheLimit::Percent(80)), reserve: 1 << 30 };
        assert_eq!((limits.limit_on(1000), limits.reserve_on(1000)), (Some(800), 50));
        assert_eq!((limits.limit_on(1 << 40).is_some(), limits.reserve_on(1 << 40)), (true, 1 << 30));
        assert_eq!(CacheLimits::default().limit_on(1000), None);
    }
}
