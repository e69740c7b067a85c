//! Reads a table's JSON as a stream: one record in memory at a time, whatever the text claims.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::TableError;
use crate::{Digest, Hasher};

/// Longest JSON text. Tables of the largest layers known are a tenth of it.
pub(super) const JSON_MAX: u64 = 256 << 20;
/// Most records, chunks included.
const RECORDS_MAX: u64 = 1 << 20;
/// Longest record: room for many extended attributes.
const RECORD_LEN_MAX: u64 = 8 << 20;

/// One record as it stands in the table; both formats' fields. Names are case-sensitive, others are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Record {
    pub(super) name: Option<String>,
    pub(super) r#type: Option<String>,
    pub(super) size: Option<i64>,
    pub(super) modtime: Option<String>,
    pub(super) link_name: Option<String>,
    pub(super) mode: Option<i64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) offset: Option<i64>,
    pub(super) end_offset: Option<i64>,
    pub(super) inner_offset: Option<i64>,
    pub(super) dev_major: Option<i64>,
    pub(super) dev_minor: Option<i64>,
    pub(super) xattrs: Option<Pairs>,
    pub(super) digest: Option<String>,
    pub(super) chunk_offset: Option<i64>,
    pub(super) chunk_size: Option<i64>,
    pub(super) chunk_digest: Option<String>,
    pub(super) chunk_type: Option<String>,
}

/// A JSON object of strings, in its order and with repetitions.
#[derive(Debug, Default)]
pub(super) struct Pairs(pub(super) Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("extended attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// Hands all records of the table to `each`, in order. Returns the digest and the length of the whole text.
pub(super) fn read(
    text: impl Read,
    each: &mut dyn FnMut(Record) -> Result<(), TableError>,
) -> Result<(Digest, u64), TableError> {
    let limits = Rc::new(Limits { record: Cell::new(RECORD_LEN_MAX), fault: RefCell::new(None) });
    let mut metered = Metered {
        inner: text,
        buffer: vec![0; 64 << 10],
        at: 0,
        end: 0,
        total: 0,
        hasher: Hasher::new(),
        limits: Rc::clone(&limits),
    };
    let mut parser = serde_json::Deserializer::from_reader(&mut metered);
    let version = Table { each, limits: &limits }
        .deserialize(&mut parser)
        .and_then(|version| parser.end().map(|()| version))
        .map_err(|e| limits.fault.take().unwrap_or_else(|| TableError::Json { reason: e.to_string() }))?;
    if version != 1 {
        return Err(TableError::Version { found: version });
    }
    Ok((metered.hasher.finish(), metered.total))
}

/// What the reader and the visitors share.
struct Limits {
    /// Bytes that the current record may still have.
    record: Cell<u64>,
    /// The real reason behind an error that had to pass through serde.
    fault: RefCell<Option<TableError>>,
}

impl Limits {
    fn fail<E: serde::de::Error>(&self, fault: TableError) -> E {
        let error = E::custom(&fault);
        self.fault.replace(Some(fault));
        error
    }
}

/// Counts and hashes what passes. serde_json asks for single bytes.
struct Metered<R> {
    inner: R,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    total: u64,
    hasher: Hasher,
    limits: Rc<Limits>,
}

impl<R: Read> Metered<R> {
    fn fill(&mut self) -> io::Result<()> {
        self.at = 0;
        self.end = match self.inner.read(&mut self.buffer) {
            Ok(n) => n,
            Err(e) => return Err(self.stop(TableError::packed(e.to_string()))),
        };
        self.hasher.update(&self.buffer[..self.end]);
        self.total += self.end as u64;
        if self.total > JSON_MAX {
            return Err(self.stop(TableError::TooLarge { what: "its length in bytes", limit: JSON_MAX }));
        }
        Ok(())
    }

    fn stop(&self, fault: TableError) -> io::Error {
        let error = io::Error::other(fault.to_string());
        self.limits.fault.replace(Some(fault));
        error
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.end {
            self.fill()?;
        }
        let n = out.len().min(self.end - self.at);
        let left = self.limits.record.get().checked_sub(n as u64).ok_or_else(|| {
            self.stop(TableError::TooLarge { what: "one entry's length in bytes", limit: RECORD_LEN_MAX })
        })?;
        self.limits.record.set(left);
        out[..n].copy_from_slice(&self.buffer[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// The whole table; yields its version.
struct Table<'a> {
    each: &'a mut dyn FnMut(Record) -> Result<(), TableError>,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = i64;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<i64, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with version and entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<i64, A::Error> {
        let (mut version, mut entries) = (None, false);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" if version.is_some() => return Err(A::Error::duplicate_field("version")),
                "version" => version = Some(map.next_value()?),
                "entries" if entries => return Err(A::Error::duplicate_field("entries")),
                "entries" => {
                    entries = true;
                    map.next_value_seed(Entries { each: &mut *self.each, limits: self.limits })?;
                    self.limits.record.set(RECORD_LEN_MAX);
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if !entries {
            return Err(A::Error::missing_field("entries"));
        }
        version.ok_or_else(|| A::Error::missing_field("version"))
    }
}

/// The array of records. Go writes `null` for one without elements.
struct Entries<'a> {
    each: &'a mut dyn FnMut(Record) -> Result<(), TableError>,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of entries")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut count = 0;
        loop {
            self.limits.record.set(RECORD_LEN_MAX);
            let Some(record) = seq.next_element()? else { return Ok(()) };
            count += 1;
            if count > RECORDS_MAX {
                let fault = TableError::TooLarge { what: "its number of entries", limit: RECORDS_MAX };
                return Err(self.limits.fail(fault));
            }
            (self.each)(record).map_err(|fault| self.limits.fail(fault))?;
        }
    }
}
