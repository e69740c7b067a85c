//! SOCI's zTOC: the table of contents and the gzip checkpoints of one layer, a FlatBuffer
//! (soci-snapshotter, `ztoc/fbs/ztoc.fbs`).
//!
//! It names the entries in archive order with the place of their data in the uncompressed tar, so it makes an index
//! with a tar layout. Its digests are of compressed bytes. It has no content digests, no maps of sparse files, and its
//! archive ends with the tar's end blocks: padding behind them belongs to no span.

mod flat;
mod zinfo;

use crate::builder::{IndexBuilder, LayerFacts, NewEntrance, NewEntry, NewSpan};
use crate::error::Name;
use crate::format::SPAN_LEN_MAX;
use crate::rfc3339;
use crate::tar::Pax;
use crate::{Compression, Digest, DigestOf, EntryKind, Extent, IndexError, Layout, Timestamp};

use flat::{Fault, Offsets, Table};

/// The only version there is.
const VERSION: &[u8] = b"0.9";
const GZIP: i8 = 1;
const UNCOMPRESSED: i8 = 2;
/// What an entry costs in the index beside its strings, at most a fifth of what it costs in an honest zTOC.
const ENTRY_COST: usize = 32;

/// Makes an index of a zTOC. `facts` are the layer's in the image's manifest and configuration.
///
/// The index is a claim: [`prove_layer`](crate::prove_layer) finds out whether it is true. The work and the
/// length of the index are bounded by the length of `bytes`.
pub fn ztoc_to_index(bytes: &[u8], facts: &LayerFacts) -> Result<Vec<u8>, IndexError> {
    build(bytes, facts).map_err(|reason| IndexError::BadTable { format: "SOCI zTOC", reason })
}

fn build(bytes: &[u8], facts: &LayerFacts) -> Result<Vec<u8>, String> {
    let broken = |fault: Fault| format!("it is damaged: {fault}");
    let ztoc = Table::root(bytes).map_err(broken)?;
    let version = ztoc.bytes(0).map_err(broken)?;
    if version != VERSION {
        return Err(format!("its version {} is not known", Name::new(version)));
    }
    let blob_size = ztoc.i64(2).map_err(broken)?;
    if u64::try_from(blob_size) != Ok(facts.blob_size) {
        return Err(format!("it is of a blob of {blob_size} bytes, the layer's has {}", facts.blob_size));
    }
    let size = ztoc.i64(3).map_err(broken)?;
    let size = u64::try_from(size).map_err(|_| format!("the tar's size {size} is out of range"))?;
    let toc = ztoc.table(4).map_err(broken)?.ok_or("it has no table of contents")?;
    let info = ztoc.table(5).map_err(broken)?.ok_or("it has no checkpoints")?;
    let mut budget = Budget(bytes.len());
    let mut builder = IndexBuilder::new(facts, Layout::Tar);
    entries(&mut builder, toc.offsets(0).map_err(broken)?, &mut budget)?;
    spans(&mut builder, &info, facts, size, &mut budget)?;
    builder.finish().map_err(reason)
}

/// Why the builder does not take something.
fn reason(error: IndexError) -> String {
    match error {
        IndexError::BadIndex { reason } => reason,
        IndexError::Entry { name, reason } => format!("entry {name}: {reason}"),
        other => other.to_string(),
    }
}

/// What may still be read. FlatBuffers may point to the same bytes again and again; nobody who means well does, and
/// what is read is never more than the whole buffer.
struct Budget(usize);

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<(), String> {
        self.0 = self.0.checked_sub(bytes).ok_or("it uses the same bytes again and again")?;
        Ok(())
    }
}

/// The entries in the order of the archive: that of their data.
fn entries(builder: &mut IndexBuilder, table: Offsets<'_>, budget: &mut Budget) -> Result<(), String> {
    let broken = |i: usize| move |fault: Fault| format!("entry {i} is damaged: {fault}");
    let mut order = Vec::with_capacity(table.len());
    for i in 0..table.len() {
        budget.spend(ENTRY_COST)?;
        let at = table.table(i).and_then(|entry| entry.i64(2)).map_err(broken(i))?;
        order.push((u64::try_from(at).map_err(|_| format!("entry {i} lies before the tar"))?, i));
    }
    order.sort_unstable();
    // A header of at least one block comes before each entry's data.
    let mut next = 0u64;
    for (at, i) in order {
        let entry = table.table(i).map_err(broken(i))?;
        let end = add(builder, &entry, at, budget).map_err(|e| match e {
            Refusal::Damage(fault) => broken(i)(fault),
            Refusal::Entry(reason) => reason,
        })?;
        if at < next.saturating_add(512) {
            return Err(format!("entry {i} overlaps the one before"));
        }
        next = end.next_multiple_of(512);
    }
    Ok(())
}

enum Refusal {
    Damage(Fault),
    Entry(String),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Damage(fault)
    }
}

/// Adds one entry; where its data ends in the tar.
fn add(builder: &mut IndexBuilder, entry: &Table<'_>, at: u64, budget: &mut Budget) -> Result<u64, Refusal> {
    let path = entry.bytes(0)?;
    let refuse = |why: String| Refusal::Entry(format!("entry {}: {why}", Name::new(path)));
    let link = entry.bytes(4)?;
    budget.spend(path.len() + link.len()).map_err(refuse)?;
    let kind = match entry.bytes(1)? {
        b"reg" => EntryKind::File,
        b"dir" => EntryKind::Directory,
        b"symlink" => EntryKind::Symlink,
        b"hardlink" => EntryKind::Hardlink,
        b"char" => EntryKind::CharDevice,
        b"block" => EntryKind::BlockDevice,
        b"fifo" => EntryKind::Fifo,
        other => return Err(refuse(format!("entries of type {} are not known", Name::new(other)))),
    };
    let pax = records(entry.offsets(13)?, budget)?;
    let pax = pax.map_err(refuse)?;
    let size = match kind {
        EntryKind::File => {
            let size = entry.i64(3)?;
            u64::try_from(size).map_err(|_| refuse(format!("the size {size} is out of range")))?
        }
        _ => 0,
    };
    let rdev = match kind {
        EntryKind::CharDevice | EntryKind::BlockDevice => {
            let part = |slot| -> Result<u32, Refusal> {
                let number = entry.i64(slot)?;
                u32::try_from(number).map_err(|_| refuse(format!("device number {number} is out of range")))
            };
            (part(11)?, part(12)?)
        }
        _ => (0, 0),
    };
    let links = matches!(kind, EntryKind::Symlink | EntryKind::Hardlink);
    let xattrs: Vec<(&[u8], &[u8])> = pax.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let data = [Extent { file_offset: 0, layer_offset: at, len: size }];
    let new = NewEntry {
        path,
        kind,
        // The upper bits of old headers repeat the type.
        mode: (entry.i64(5)? & 0o7777) as u32,
        uid: entry.u32(6)?,
        gid: entry.u32(7)?,
        mtime: mtime(entry.bytes(10)?, pax.mtime).map_err(refuse)?,
        size,
        link: if links { link } else { b"" },
        rdev,
        xattrs: &xattrs,
        extents: if size > 0 { &data } else { &[] },
        content: None,
    };
    builder.entry(&new).map_err(|e| Refusal::Entry(reason(e)))?;
    at.checked_add(size).ok_or_else(|| refuse("its data ends nowhere".into()))
}

/// The extended attributes, and a time, of an entry's PAX records.
fn records(table: Offsets<'_>, budget: &mut Budget) -> Result<Result<Pax, String>, Fault> {
    let mut records = Vec::new();
    for i in 0..table.len() {
        let record = table.table(i)?;
        let (key, value) = (record.bytes(0)?, record.bytes(1)?);
        if let Err(reason) = budget.spend(8 + key.len() + value.len()) {
            return Ok(Err(reason));
        }
        if key.starts_with(b"GNU.sparse.") {
            return Ok(Err("it is sparse, and a zTOC does not say where its holes are".into()));
        }
        if key.starts_with(b"SCHILY.xattr.") || key.starts_with(b"LIBARCHIVE.xattr.") || key == b"mtime" {
            records.push((key, value));
        }
    }
    Ok(Pax::from_records(records))
}

/// An entry's time: RFC 3339, empty for what that cannot say (then a PAX record may).
fn mtime(text: &[u8], pax: Option<Timestamp>) -> Result<Timestamp, String> {
    if text.is_empty() {
        return pax.ok_or_else(|| "its time is not said".into());
    }
    rfc3339::parse(text).ok_or_else(|| format!("{} is no time", Name::new(text)))
}

fn spans(
    builder: &mut IndexBuilder,
    info: &Table<'_>,
    facts: &LayerFacts,
    size: u64,
    budget: &mut Budget,
) -> Result<(), String> {
    let broken = |fault: Fault| format!("its checkpoints are damaged: {fault}");
    let digests = info.offsets(2).map_err(broken)?;
    let count = digests.len();
    let said = info.i32(1).map_err(broken)?;
    if i64::try_from(count).map(|count| count - 1) != Ok(i64::from(said)) {
        return Err(format!("its last span is number {said}, but it has digests of {count}"));
    }
    let digest = |i: usize, budget: &mut Budget| -> Result<Digest, String> {
        let text = digests.bytes(i).map_err(broken)?;
        budget.spend(text.len().max(64))?;
        let digest = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        digest.ok_or_else(|| format!("the digest of span {i}, {}, is no sha256", Name::new(text)))
    };
    let checkpoints = info.bytes(3).map_err(broken)?;
    let algorithm = info.i8(0, GZIP).map_err(broken)?;
    match (algorithm, facts.compression) {
        (GZIP, Compression::Gzip) => {
            let points = zinfo::gzip(checkpoints, count)?;
            // Checkpoints behind the archive's end start spans of padding only.
            let kept = points.iter().take_while(|point| point.tar < size).count();
            for (i, point) in points[..kept].iter().enumerate() {
                let next = points.get(i + 1);
                let end = next.map_or(size, |next| next.tar.min(size));
                let blob_end = next.map_or(facts.blob_size, |next| next.blob_before);
                let blob_len = blob_end.checked_sub(point.blob);
                let len = end - point.tar;
                if len == 0 {
                    // Only what comes before the tar's first byte: nothing of the tar needs it.
                    continue;
                }
                let whole = NewEntrance::Deflate { bits: point.bits, window: point.window };
                let span = NewSpan {
                    blob_offset: point.blob,
                    blob_len: blob_len.ok_or_else(|| format!("span {i} points outside the blob"))?,
                    len,
                    pad: 0,
                    digest: digest(i, budget)?,
                    digest_of: DigestOf::Blob,
                    // What is too long to decode for a fault still comes by streaming.
                    entrance: if len > SPAN_LEN_MAX { NewEntrance::None } else { whole },
                };
                builder.span(&span).map_err(reason)?;
            }
            Ok(())
        }
        (UNCOMPRESSED, Compression::None) => {
            let span_size = zinfo::plain(checkpoints, facts.blob_size, count)?;
            for i in 0..count {
                let start = i as u64 * span_size;
                let len = span_size.min(facts.blob_size - start);
                let span = NewSpan {
                    blob_offset: start,
                    blob_len: len,
                    len,
                    pad: 0,
                    digest: digest(i, budget)?,
                    // The blob's bytes are the tar's.
                    digest_of: DigestOf::Decoded,
                    entrance: NewEntrance::Plain,
                };
                builder.span(&span).map_err(reason)?;
            }
            Ok(())
        }
        (GZIP | UNCOMPRESSED, blob) => Err(format!("it is of a blob with another compression than {blob:?}")),
        (other, _) => Err(format!("compression {other} is not known")),
    }
}
