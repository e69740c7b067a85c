//! What clients and fetchers tell whoever watches them: every request, every fault, every decoded span.
//!
//! Whoever watches is told synchronously and from any thread, on the path that a reader waits for: it must be quick and
//! must not block. Nothing that is told holds a credential or the query of a URL.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyrun_index::{Digest, LayerId};
use reqwest::Response;
use serde::{Deserialize, Serialize};

use crate::client::{Call, Transport};
use crate::error::FetchError;
use crate::stats::{ClientCounters, HostCounters};

/// What bytes are fetched for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// A reader waits for them.
    Fault,
    /// A profile foresees them.
    Prefetch,
    /// Everything that is missing, in the background; also the proof of an adopted index.
    Hydrate,
    /// The first pass over a layer that has no index yet.
    Stream,
    /// Manifests, configs, indexes, profiles, lists of referrers, tokens.
    #[default]
    Metadata,
}

impl Class {
    /// All of them, in the order of [`ClientStats::bytes_by_class`](crate::ClientStats::bytes_by_class).
    pub const ALL: [Class; 5] =
        [Class::Fault, Class::Prefetch, Class::Hydrate, Class::Stream, Class::Metadata];

    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Class::Fault => "fault",
            Class::Prefetch => "prefetch",
            Class::Hydrate => "hydrate",
            Class::Stream => "stream",
            Class::Metadata => "metadata",
        }
    }

    pub(crate) fn number(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An HTTP exchange that is over: answered and read, broken, or given up.
#[derive(Clone, Debug)]
pub struct RequestSeen {
    /// Host, with its port if that is not the default one.
    pub host: String,
    /// Registry and repository that it was sent for, `host/path`.
    pub repository: String,
    /// The resource: `manifests/latest`, `blobs/sha256:…`, `token`. Never with a query.
    pub what: String,
    /// The blob that is asked for.
    pub blob: Option<Digest>,
    /// Bytes of the blob that are asked for, if not all.
    pub range: Option<Range<u64>>,
    /// What for.
    pub class: Class,
    /// It is the second request beside one that was slow.
    pub second: bool,
    /// When it wanted to be sent.
    pub queued: Instant,
    /// When the host's window let it through; `None` when it was given up before.
    pub sent: Option<Instant>,
    /// When the header of the answer had come.
    pub first_byte: Option<Instant>,
    /// When the last byte had come, or it was clear that none would.
    pub ended: Instant,
    /// Bytes of the body that came.
    pub bytes: u64,
    /// Status of the answer.
    pub status: Option<u16>,
    /// Why it broke.
    pub failure: Option<String>,
}

/// A read that found something missing and is over.
#[derive(Clone, Copy, Debug)]
pub struct FaultSeen {
    /// The layer file.
    pub layer: LayerId,
    /// First byte that was wanted.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// When it began to wait.
    pub began: Instant,
    /// How long.
    pub waited: Duration,
    /// Whether it got its bytes.
    pub ok: bool,
}

/// A span that was decoded, verified and stored.
#[derive(Clone, Copy, Debug)]
pub struct DecodeSeen {
    /// The layer file.
    pub layer: LayerId,
    /// Number of the span.
    pub span: usize,
    /// Its bytes in the layer file.
    pub bytes: u64,
    /// How long a core worked on it.
    pub took: Duration,
}

/// Missing bytes that came from files of other layers with the same content.
#[derive(Clone, Copy, Debug)]
pub struct SharedSeen {
    /// The layer file that missed them.
    pub layer: LayerId,
    /// How many.
    pub bytes: u64,
}

/// Hears what happens.
pub trait Observer: fmt::Debug + Send + Sync {
    /// A request is over.
    fn request(&self, request: &RequestSeen) {
        let _ = request;
    }
    /// A fault is over.
    fn fault(&self, fault: &FaultSeen) {
        let _ = fault;
    }
    /// A span has been decoded.
    fn decoded(&self, decode: &DecodeSeen) {
        let _ = decode;
    }
    /// Bytes came from another layer.
    fn shared(&self, shared: &SharedSeen) {
        let _ = shared;
    }
}

/// Who watches, if anybody does.
#[derive(Clone, Debug, Default)]
pub struct Watch(Option<Arc<dyn Observer>>);

impl Watch {
    /// This observer watches.
    pub fn new(observer: Arc<dyn Observer>) -> Watch {
        Watch(Some(observer))
    }

    pub(crate) fn fault(&self, fault: &FaultSeen) {
        let FaultSeen { layer, offset, len, waited, ok, .. } = *fault;
        tracing::debug!(%layer, offset, len, ?waited, ok, "fault");
        if let Some(observer) = &self.0 {
            observer.fault(fault);
        }
    }

    pub(crate) fn decoded(&self, decode: &DecodeSeen) {
        let DecodeSeen { layer, span, bytes, took } = *decode;
        tracing::debug!(%layer, span, bytes, ?took, "span decoded");
        if let Some(observer) = &self.0 {
            observer.decoded(decode);
        }
    }

    pub(crate) fn shared(&self, shared: &SharedSeen) {
        let SharedSeen { layer, bytes } = *shared;
        tracing::debug!(%layer, bytes, "bytes of another layer");
        if let Some(observer) = &self.0 {
            observer.shared(shared);
        }
    }

    fn request(&self, request: &RequestSeen) {
        let since = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(request.queued));
        tracing::debug!(
            host = request.host,
            image = request.repository,
            what = request.what,
            range = ?request.range,
            class = %request.class,
            second = request.second,
            status = request.status,
            bytes = request.bytes,
            first_byte = ?since(request.first_byte),
            took = ?since(Some(request.ended)),
            failure = request.failure,
            "request"
        );
        if let Some(observer) = &self.0 {
            observer.request(request);
        }
    }
}

/// An HTTP exchange under way. It is told of when the last handle is dropped, wherever that happens; the answer carries
/// one until its body has been read or thrown away.
#[derive(Clone)]
pub(crate) struct Exchange(Arc<Inner>);

struct Inner {
    watch: Watch,
    counters: Arc<ClientCounters>,
    host_counters: Arc<HostCounters>,
    host: String,
    repository: String,
    what: String,
    blob: Option<Digest>,
    range: Option<Range<u64>>,
    class: Class,
    second: bool,
    queued: Instant,
    sent: OnceLock<Instant>,
    answer: OnceLock<(Instant, u16)>,
    failure: OnceLock<String>,
    bytes: AtomicU64,
    /// Nanoseconds from `queued` to the last sign of life.
    last: AtomicU64,
}

impl Exchange {
    /// A call is about to be sent to `host`.
    pub(crate) fn begin(transport: &Transport, host: &str, call: &Call<'_>) -> Exchange {
        let range = call.range.map(|(start, end)| start..end);
        let (blob, class, second) = (call.blob, call.class, call.apart);
        Exchange::new(transport, host, call, &call.resource, Meant { blob, range, class, second })
    }

    /// A token for a call is about to be asked for.
    pub(crate) fn begin_token(transport: &Transport, host: &str, call: &Call<'_>) -> Exchange {
        transport.counters.tokens.fetch_add(1, Relaxed);
        Exchange::new(transport, host, call, "token", Meant::default())
    }

    fn new(transport: &Transport, host: &str, call: &Call<'_>, what: &str, meant: Meant) -> Exchange {
        let Meant { blob, range, class, second } = meant;
        let counters = Arc::clone(&transport.counters);
        Exchange(Arc::new(Inner {
            watch: transport.options.watch.clone(),
            host_counters: counters.host(host),
            counters,
            host: host.to_owned(),
            repository: call.repository.name(),
            what: what.split('?').next().unwrap_or_default().to_owned(),
            blob,
            range,
            class,
            second,
            queued: Instant::now(),
            sent: OnceLock::new(),
            answer: OnceLock::new(),
            failure: OnceLock::new(),
            bytes: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }))
    }

    /// It has passed the host's gate.
    pub(crate) fn sent(&self) {
        let _ = self.0.sent.set(Instant::now());
    }

    /// The header of the answer has come, or will not.
    pub(crate) fn answered(self, answer: &mut Result<Response, FetchError>) {
        let now = Instant::now();
        self.0.alive_at(now);
        match answer {
            Ok(response) => {
                let _ = self.0.answer.set((now, response.status().as_u16()));
                if response.status().is_redirection() {
                    self.0.counters.redirects.fetch_add(1, Relaxed);
                }
                response.extensions_mut().insert(self);
            }
            Err(error) => drop(self.0.failure.set(error.to_string())),
        }
    }

    /// A piece of the body of `response` has come, or none will.
    pub(crate) fn piece(response: &Response, piece: &Result<Option<Bytes>, FetchError>) {
        let Some(Exchange(inner)) = response.extensions().get::<Exchange>() else { return };
        match piece {
            Ok(Some(bytes)) => {
                let len = bytes.len() as u64;
                inner.bytes.fetch_add(len, Relaxed);
                inner.counters.bytes_by_class[inner.class.number()].fetch_add(len, Relaxed);
                inner.alive();
            }
            Ok(None) => {}
            Err(error) => {
                inner.alive();
                let _ = inner.failure.set(error.to_string());
            }
        }
    }
}

#[derive(Default)]
struct Meant {
    blob: Option<Digest>,
    range: Option<Range<u64>>,
    class: Class,
    second: bool,
}

impl Inner {
    fn alive(&self) {
        self.alive_at(Instant::now());
    }

    fn alive_at(&self, now: Instant) {
        let since = now.saturating_duration_since(self.queued);
        let since = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.last.fetch_max(since, Relaxed);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let answer = self.answer.get().copied();
        self.host_counters.count(answer.map(|(_, status)| status));
        self.counters.requests_by_class[self.class.number()].fetch_add(1, Relaxed);
        if answer.is_none() {
            // Given up by whoever waited, or broken: it went on until now.
            self.alive();
        }
        self.watch.request(&RequestSeen {
            host: std::mem::take(&mut self.host),
            repository: std::mem::take(&mut self.repository),
            what: std::mem::take(&mut self.what),
            blob: self.blob,
            range: self.range.take(),
            class: self.class,
            second: self.second,
            queued: self.queued,
            sent: self.sent.get().copied(),
            first_byte: answer.map(|(at, _)| at),
            ended: self.queued + Duration::from_nanos(self.last.load(Relaxed)),
            bytes: self.bytes.load(Relaxed),
            status: answer.map(|(_, status)| status),
            failure: self.failure.take(),
        });
    }
}
