//! What can be asked about starts, and what comes back. docs/OBSERVABILITY.md explains the fields.
//!
//! All times are milliseconds since the start was asked for.

use lazyrun_fetcher::Class;
use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

/// Version of [`Start`] as it is kept on disk. Others are ignored.
pub const VERSION: u32 = 1;

/// What to tell of the starts of an image or container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhyAction {
    /// One start, the last being number 1; answers [`Why`].
    Show {
        /// Number of the start, counted back.
        number: usize,
    },
    /// All that are known, the last one first; answers a list of [`StartSummary`].
    List,
}

/// A start, and what it comes to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// What it comes to.
    pub summary: Summary,
    /// Everything that was seen.
    pub start: Start,
}

/// A line of the list of starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct StartSummary {
    /// What to ask for it by.
    pub number: usize,
    /// When it was asked for (RFC 3339).
    pub began: String,
    /// The image.
    pub image: String,
    /// The container's name, or what else was started.
    pub what: String,
    /// Milliseconds in all.
    #[serde(rename = "TotalMS")]
    pub total_ms: f64,
    /// Requests to registries.
    pub requests: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// Reads that waited.
    pub reads: u64,
    /// What went wrong.
    pub error: Option<String>,
}

/// What a start comes to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// From the request to the container's end, or to the last read that waited.
    pub total_ms: f64,
    /// Until the container was made and its command could run.
    pub started_ms: f64,
    /// Where the time went; the parts add up to `total_ms`.
    pub parts: Vec<Part>,
    /// Requests to registries.
    pub requests: u64,
    /// Those that were repeated because an earlier one failed.
    pub retries: u64,
    /// Body bytes that came, by class.
    pub bytes: Vec<ClassBytes>,
    /// Reads that waited for bytes.
    pub reads: u64,
    /// Time during which at least one of them waited.
    pub blocked_ms: f64,
    /// Why layers were not lazy, a sentence each.
    pub not_lazy: Vec<String>,
}

/// A share of the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Of what.
    pub what: String,
    /// How long.
    pub ms: f64,
}

/// Bytes of a class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassBytes {
    /// What for.
    pub class: Class,
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Started {
    /// A container.
    Container {
        /// Its id.
        id: String,
        /// Its name.
        name: String,
    },
    /// A mount.
    Mount,
    /// A snapshot for a container of containerd's.
    Snapshot {
        /// What the client calls it, which mostly is the container's id.
        key: String,
    },
}

/// The timeline of a start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// [`VERSION`].
    pub version: u32,
    /// The image's reference in its familiar form.
    pub image: String,
    /// What was started.
    pub what: Started,
    /// When it was asked for (RFC 3339).
    pub began: String,
    /// Whether it is still being recorded.
    pub recording: bool,
    /// What went wrong.
    pub error: Option<String>,
    /// The container's end.
    pub exit: Option<Exit>,
    /// The mount plan.
    pub plan: Option<String>,
    /// Where the profile came from that was prefetched by.
    pub profile: String,
    /// Layers, the bottom one first.
    pub layers: Vec<LayerOf>,
    /// What was done, one after the other without a gap.
    pub phases: Vec<Phase>,
    /// What was done beside that.
    pub beside: Vec<Phase>,
    /// Requests to registries, in the order in which they were over.
    pub requests: Vec<RequestOf>,
    /// Reads that waited, in the order in which they were over.
    pub reads: Vec<ReadOf>,
    /// What decoding took.
    pub decode: Decode,
    /// What was seen and not kept, because it was too much.
    pub dropped: Dropped,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exit {
    /// When.
    pub at_ms: f64,
    /// Its exit code.
    pub code: i32,
}

/// A layer of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOf {
    /// Beginning of its diffID.
    pub layer: String,
    /// Digest of its blob.
    pub digest: Digest,
    /// Compressed bytes.
    pub size: u64,
    /// Where its index came from.
    pub index: String,
}

/// A part of the work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What.
    pub name: String,
    /// When it began.
    pub start_ms: f64,
    /// When it ended.
    pub end_ms: f64,
}

/// A request to a registry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestOf {
    /// Host that was asked.
    pub host: String,
    /// `manifest`, `config`, `layer`, `blob`, `referrers`, `token`, `tags` or `other`.
    pub kind: String,
    /// The resource, without a query.
    pub what: String,
    /// Number of the layer whose blob it is, 0 at the bottom.
    pub layer: Option<usize>,
    /// Bytes of the blob, the first and the one after the last, if not all.
    pub range: Option<(u64, u64)>,
    /// Spans that lie in them, the first and the one after the last.
    pub spans: Option<(usize, usize)>,
    /// What for.
    pub class: Class,
    /// It is the second one beside one that was slow.
    pub second: bool,
    /// Earlier ones for the same that failed or broke off.
    pub retries: u32,
    /// When it was wanted.
    pub start_ms: f64,
    /// When it was sent.
    pub sent_ms: Option<f64>,
    /// When the answer's header came.
    pub first_byte_ms: Option<f64>,
    /// When its last byte came.
    pub end_ms: f64,
    /// Bytes of the body that came.
    pub bytes: u64,
    /// Status of the answer.
    pub status: Option<u16>,
    /// Why it broke.
    pub failure: Option<String>,
}

/// A read that waited.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadOf {
    /// Number of the layer, 0 at the bottom.
    pub layer: usize,
    /// First byte of the layer file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// The file that they belong to, relative to the root; `-` if to none.
    pub path: String,
    /// Other files that the read reaches.
    pub more_files: usize,
    /// When it began.
    pub start_ms: f64,
    /// How long it waited.
    pub ms: f64,
    /// Whether it got its bytes.
    pub ok: bool,
    /// The container that waited, if only one can have.
    pub container: Option<String>,
}

/// Decoding, all of it together. Cores work at the same time and while bytes come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Decode {
    /// Spans.
    pub spans: u64,
    /// Bytes they gave.
    pub bytes: u64,
    /// Time of cores.
    pub core_ms: f64,
}

/// What was too much to keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Requests.
    pub requests: u64,
    /// Their bytes.
    pub request_bytes: u64,
    /// Reads that waited.
    pub reads: u64,
}
