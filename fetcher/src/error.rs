//! Everything that can go wrong between a reference and verified bytes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lazyrun_index::{Digest, IndexError};

use crate::store::NoRoom;
use crate::trust::OriginKind;

/// Why an image, a blob or a piece of a layer could not be had.
///
/// Each variant's `Display` is one sentence without secrets, fit for a user. Clonable, because one failed
/// fetch answers everybody who waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The registry has no such repository.
    #[error("image {image} does not exist in its registry")]
    ImageNotFound {
        /// Familiar name of the image.
        image: String,
    },
    /// The repository exists but not this tag or digest.
    #[error("image {image} has no tag or digest {tag:?}")]
    TagNotFound {
        /// Registry and repository.
        image: String,
        /// What was asked for.
        tag: String,
    },
    /// The registry lacks a blob that a manifest names.
    #[error("the registry {host} does not have blob {digest}")]
    BlobNotFound {
        /// Registry.
        host: String,
        /// The blob.
        digest: Digest,
    },
    /// 401 or 403, after trying what credentials there are.
    #[error(
        "access to {image} was denied by {host}: {reason}; log in with `lazyrun login {host}` if it is private or check that it exists"
    )]
    Denied {
        /// Registry and repository.
        image: String,
        /// Who refused.
        host: String,
        /// The registry's words, or which credentials were tried.
        reason: String,
    },
    /// A file that says how registries are talked to is malformed or cannot be read.
    #[error("the registry settings in {}{} cannot be used: {reason}", .file.display(), line_hint(.line))]
    Config {
        /// The file.
        file: PathBuf,
        /// Line, counted from 1, where one is to blame.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A proxy of a kind that is not spoken here.
    #[error("the proxy {url} cannot be used: it has to be an http:// or https:// URL")]
    Proxy {
        /// Its URL without secrets.
        url: String,
    },
    /// The machine's administrator does not want it.
    #[error("image {image} is blocked by {}", .file.display())]
    Blocked {
        /// Registry and repository.
        image: String,
        /// The file that says so.
        file: PathBuf,
    },
    /// No host may be asked for something.
    #[error("no host of {image} may be asked to {what}; see its capabilities by `lazyrun registry show`")]
    Incapable {
        /// Registry and repository.
        image: String,
        /// "pull", "resolve tags" or "push".
        what: &'static str,
    },
    /// The docker configuration or a credential helper could not be used.
    #[error("credentials for {host} could not be read: {reason}")]
    Credentials {
        /// Registry.
        host: String,
        /// What went wrong; never holds a secret.
        reason: String,
    },
    /// The TLS handshake failed.
    #[error(
        "no secure connection to {host}: {reason}; for a registry without a trusted certificate name it as an insecure registry"
    )]
    Tls {
        /// Host.
        host: String,
        /// What rustls says.
        reason: String,
    },
    /// No connection.
    #[error("registry {host} cannot be reached: {reason}")]
    Unreachable {
        /// Host.
        host: String,
        /// What the resolver or the kernel says.
        reason: String,
    },
    /// A connection that stands but brings nothing.
    #[error("{host} sent nothing for {} s while {what} was read", .after.as_secs_f32())]
    Stalled {
        /// Host.
        host: String,
        /// What was being read.
        what: String,
        /// How long nothing came.
        after: Duration,
    },
    /// The connection broke inside an exchange.
    #[error("the connection to {host} broke while {what} was read: {reason}")]
    Broken {
        /// Host.
        host: String,
        /// What was being read.
        what: String,
        /// What the HTTP client says.
        reason: String,
    },
    /// 429.
    #[error("registry {host} limits the rate of requests{}", retry_hint(.retry_after))]
    RateLimited {
        /// Host.
        host: String,
        /// What it asked to wait.
        retry_after: Option<Duration>,
    },
    /// An error status.
    #[error("{host} answered {status} for {what}")]
    Server {
        /// Host.
        host: String,
        /// HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// What it asked to wait.
        retry_after: Option<Duration>,
    },
    /// The registry does not take what should be written.
    #[error("{host} refused {what} ({status}): {reason}")]
    Rejected {
        /// Host.
        host: String,
        /// HTTP status.
        status: u16,
        /// What should be written.
        what: String,
        /// The registry's words.
        reason: String,
    },
    /// The registry does not delete.
    #[error(
        "registry {host} does not allow to delete manifests, so {digest} stays; remove it by the registry's own means"
    )]
    Undeletable {
        /// Host.
        host: String,
        /// The manifest.
        digest: Digest,
    },
    /// An index artifact that cannot be used or made.
    #[error("index artifact {artifact} of {image} cannot be used: {reason}")]
    Artifact {
        /// Familiar name of the image.
        image: String,
        /// Digest of the artifact's manifest.
        artifact: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// An answer that breaks the protocol.
    #[error("{host} answered {what} in a way that cannot be used: {reason}")]
    Protocol {
        /// Host.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The server does not do ranges and the wanted bytes are far inside the blob.
    #[error("{host} ignores range requests, so parts of blob {digest} can only come by reading all of it")]
    RangeIgnored {
        /// Host.
        host: String,
        /// The blob.
        digest: Digest,
    },
    /// The body kept ending early.
    #[error("blob {digest} from {host} is still truncated after retries: {got} of {want} bytes came")]
    Truncated {
        /// Host.
        host: String,
        /// The blob.
        digest: Digest,
        /// Bytes that came.
        got: u64,
        /// Bytes there should be.
        want: u64,
    },
    /// Content that does not have its digest.
    #[error("{what} from {host} is not what was asked for: expected {want}, got {got}")]
    WrongDigest {
        /// Host.
        host: String,
        /// "manifest", "config", "layer blob" …
        what: &'static str,
        /// Digest asked for.
        want: Digest,
        /// Digest of what came.
        got: Digest,
    },
    /// The decompressed layer is not the one the config names.
    #[error("layer {blob} unpacks to diffID {got} but the image config says {want}")]
    WrongDiffId {
        /// Digest of the blob.
        blob: Digest,
        /// diffID by the config.
        want: Digest,
        /// diffID of what came.
        got: Digest,
    },
    /// Size by the manifest and size by the server differ.
    #[error("layer blob {digest} has {got} bytes but the manifest says {want}")]
    WrongSize {
        /// The blob.
        digest: Digest,
        /// Bytes by the manifest.
        want: u64,
        /// Bytes that came.
        got: u64,
    },
    /// A layer that cannot be decoded or whose archive is refused.
    #[error("layer {digest} cannot be used: {source}")]
    Layer {
        /// Digest of the blob.
        digest: Digest,
        /// What is wrong with it.
        source: Arc<IndexError>,
    },
    /// An index that somebody published does not tell the truth about its layer.
    #[error("the {origin} of layer {layer} is a lie: {reason}")]
    Lie {
        /// diffID of the layer.
        layer: Digest,
        /// What the index was taken from.
        origin: OriginKind,
        /// Which entry or span, what was claimed and what is true.
        reason: String,
    },
    /// An index that was built here does not fit its layer's blob.
    #[error(
        "the index of layer {layer} that was built here does not fit its blob: {reason}; remove the image and \
             pull it again"
    )]
    Disagrees {
        /// diffID of the layer.
        layer: Digest,
        /// Which entry, and how.
        reason: String,
    },
    /// An index from where a lie came from before.
    #[error("the {origin} of layer {layer} is not used, because it was found to be a lie: {reason}")]
    Distrusted {
        /// diffID of the layer.
        layer: Digest,
        /// What the index was taken from.
        origin: OriginKind,
        /// What was wrong then.
        reason: String,
    },
    /// An index that somebody published is not one.
    #[error("the {origin} cannot be used: {source}")]
    BadClaim {
        /// What the index was taken from.
        origin: OriginKind,
        /// What is wrong with it.
        source: Arc<IndexError>,
    },
    /// Spans that stay wrong after retries.
    #[error("bytes {start}..{end} of layer blob {digest} are corrupt after retries: {reason}")]
    Corrupt {
        /// The blob.
        digest: Digest,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// What the decoder says.
        reason: String,
    },
    /// A manifest or config that breaks the specifications or bounds.
    #[error("the {what} of {image} is invalid: {reason}")]
    Invalid {
        /// Image.
        image: String,
        /// "manifest" or "config".
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Something real that lazyrun does not do.
    #[error("image {image} cannot be used: {reason}")]
    Unsupported {
        /// Image.
        image: String,
        /// What it uses.
        reason: String,
    },
    /// The list has nothing for this platform.
    #[error("image {image} has no variant for {platform}; it offers {available}")]
    NoPlatform {
        /// Image.
        image: String,
        /// What was wanted.
        platform: String,
        /// What there is.
        available: String,
    },
    /// A document beyond its bound.
    #[error("{what} from {host} is larger than the {limit} bytes allowed")]
    TooLarge {
        /// Host.
        host: String,
        /// What was read.
        what: String,
        /// The bound in bytes.
        limit: u64,
    },
    /// ENOSPC or EDQUOT.
    #[error("the disk that holds {path} is full")]
    DiskFull {
        /// File being written.
        path: PathBuf,
    },
    /// A layer that would take what is kept free of the disk.
    #[error(
        "layer {digest} does not fit: the disk that holds {path} has {free} bytes of free space, of which {reserve} \
         stay free; free some or remove images that are not needed"
    )]
    NoRoom {
        /// Digest of the blob.
        digest: Digest,
        /// File being written.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are kept.
        reserve: u64,
    },
    /// More would take what is kept free of the disk.
    #[error(
        "the disk that holds {path} has {free} bytes of free space, of which {reserve} stay free, and nothing in the \
         cache may be evicted; free some or remove images that are not needed"
    )]
    DiskReserved {
        /// File being written.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are kept.
        reserve: u64,
    },
    /// More would take the store beyond its limit.
    #[error(
        "the cache is full: it has {used} of at most {limit} bytes of space and nothing in it may be evicted for \
         {path}; raise its limit or remove images that are not needed"
    )]
    CacheFull {
        /// File being written.
        path: PathBuf,
        /// Bytes that the store takes.
        used: u64,
        /// Bytes that it may take.
        limit: u64,
    },
    /// Any other trouble with the store.
    #[error("{what} {path} failed: {source}")]
    Store {
        /// "writing", "opening" …
        what: &'static str,
        /// File or directory.
        path: PathBuf,
        /// What the operating system says.
        source: Arc<io::Error>,
    },
    /// Nobody said where the layer's blob can be had.
    #[error("layer {diff_id} is not complete here and no registry is known that has it")]
    NoSource {
        /// diffID of the layer.
        diff_id: Digest,
    },
    /// The fault bound has passed.
    #[error("bytes {offset}..{end} of layer {diff_id} did not come within {} s{cause}", .after.as_secs_f32())]
    FaultTimeout {
        /// diffID of the layer.
        diff_id: Digest,
        /// First byte wanted, in the layer file.
        offset: u64,
        /// Byte after the last.
        end: u64,
        /// The bound.
        after: Duration,
        /// What was in the way last, with a colon in front; empty when nothing answered at all.
        cause: String,
    },
    /// The local bytes were dropped while they were being fetched.
    #[error("layer {diff_id} was dropped from the cache while it was being fetched")]
    Forgotten {
        /// diffID of the layer.
        diff_id: Digest,
    },
    /// A task of the fetcher ended without an answer (shutdown or a bug).
    #[error("{what} was interrupted")]
    Interrupted {
        /// What was being done.
        what: &'static str,
    },
}

fn line_hint(line: &Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(", line {line},"))
}

fn retry_hint(after: &Option<Duration>) -> String {
    after.map_or_else(String::new, |d| format!(" and asks to wait {} s", d.as_secs()))
}

impl FetchError {
    /// A configuration file that cannot be used.
    pub(crate) fn bad_config(file: &Path, line: Option<usize>, reason: impl Into<String>) -> FetchError {
        FetchError::Config { file: file.to_owned(), line, reason: reason.into() }
    }

    /// Wraps an I/O error of the store, telling a full disk apart.
    pub(crate) fn store(what: &'static str, path: &Path, source: io::Error) -> FetchError {
        let path_of = || path.to_owned();
        match source.get_ref().and_then(|reason| reason.downcast_ref()) {
            Some(&NoRoom::Reserve { free, reserve }) => {
                return FetchError::DiskReserved { path: path_of(), free, reserve };
            }
            Some(&NoRoom::Limit { used, limit }) => {
                return FetchError::CacheFull { path: path_of(), used, limit };
            }
            None => {}
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                FetchError::DiskFull { path: path.to_owned() }
            }
            _ => FetchError::Store { what, path: path.to_owned(), source: Arc::new(source) },
        }
    }

    /// Whether the store is to blame, so that no other source helps.
    pub(crate) fn is_of_store(&self) -> bool {
        self.is_full() || matches!(self, FetchError::Store { .. })
    }

    /// Whether the same request may succeed a moment later, because a registry does not answer or is overloaded.
    pub fn is_transient(&self) -> bool {
        match self {
            FetchError::Unreachable { .. }
            | FetchError::Stalled { .. }
            | FetchError::Broken { .. }
            | FetchError::RateLimited { .. } => true,
            FetchError::Server { status, .. } | FetchError::Rejected { status, .. } => {
                matches!(status, 408 | 425 | 500 | 502 | 503 | 504)
            }
            _ => false,
        }
    }

    /// Whether the store has no room for more.
    pub fn is_full(&self) -> bool {
        matches!(
            self,
            FetchError::DiskFull { .. }
                | FetchError::DiskReserved { .. }
                | FetchError::NoRoom { .. }
                | FetchError::CacheFull { .. }
        )
    }

    /// How long the server asked to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            FetchError::RateLimited { retry_after, .. } | FetchError::Server { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }
}
