//! What an OCI layer contains and where its bytes are.
//!
//! Bytes in, bytes out: no network, no async, no store. [`index_layer`] reads a layer blob once (gzip, zstd or
//! plain tar, told by its first bytes) and writes its *layer index*: all entries with their attributes, where
//! their contents lie in the *layer file* (the uncompressed tar), and *spans*, the smallest runs of the blob that
//! can be decoded on their own. [`LayerIndex`] opens such an index and decodes single spans;
//! [`hydrate_layer`] decodes a whole blob against a known index.
//!
//! ```
//! use lazyrun_index::{LayerIndex, StreamOptions, index_layer};
//!
//! let blob: &[u8] = &[0; 1024]; // an empty tar
//! let mut index = std::io::Cursor::new(Vec::new());
//! let summary = index_layer(blob, &mut (), &mut index, &StreamOptions::default())?;
//! let index = LayerIndex::from_bytes(index.into_inner())?;
//! assert_eq!(index.diff_id(), summary.diff_id);
//! assert_eq!(index.entry_count(), 0);
//! # Ok::<(), lazyrun_index::IndexError>(())
//! ```

mod builder;
pub mod chunked;
mod claims;
mod compare;
mod decode;
mod digest;
mod error;
pub mod estargz;
mod format;
mod gzip;
mod id;
mod inflate;
#[cfg(fuzzing)]
mod inline;
#[cfg_attr(fuzzing, allow(dead_code, reason = "`inline` stands in for it"))]
mod pipeline;
mod reader;
mod rfc3339;
pub mod soci;
mod source;
mod span;
mod stream;
mod table;
mod tar;
mod types;
mod validate;
mod window;
mod writer;

pub use builder::{IndexBuilder, LayerFacts, NewEntrance, NewEntry, NewSpan};
pub use compare::{Mismatch, compare};
pub use digest::{Digest, Hasher, ParseDigestError};
pub use error::{IndexError, Name};
pub use id::{LayerId, ParseLayerIdError};
pub use reader::{EntryRef, LayerIndex};
pub use stream::{hydrate_layer, index_layer, index_layer_along, prove_layer};
pub use table::{Table, TableError, TocInfo, TocPlace};
pub use types::{
    Compression, DigestOf, EntryKind, Extent, LayerSink, Layout, SpanInfo, StreamOptions, StreamSummary,
    Timestamp,
};
