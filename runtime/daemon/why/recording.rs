//! One start while it is recorded: phases as the daemon tells them, requests and reads as they are over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use lazyrun_fetcher::observe::{DecodeSeen, FaultSeen, RequestSeen};
use lazyrun_fetcher::{Class, Layer, LayerDescriptor, ResolvedImage};
use lazyrun_index::{Digest, LayerId};
use tracing::Instrument;

use super::{canonical, names};
use crate::clock;
use crate::daemon::images::Ready;
use crate::daemon::metrics::layers::short;
use crate::daemon::views::MountedView;
use crate::failure::sentence;
use crate::ipc::why::{Decode, Dropped, Exit, LayerOf, Phase, ReadOf, RequestOf, Start, Started, VERSION};

/// Requests that are kept of one start.
const MAX_REQUESTS: usize = 1024;
/// Reads that are kept of one start.
const MAX_READS: usize = 2048;

/// A start being recorded.
#[derive(Debug)]
pub struct Recording {
    began: Instant,
    at: SystemTime,
    number: u64,
    what: Started,
    /// The image's canonical reference.
    pub reference: String,
    familiar: String,
    /// Registry and repository.
    repository: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    error: Option<String>,
    exit: Option<Exit>,
    plan: Option<String>,
    /// Somebody else reads the same view, so nobody can tell whose reads are whose.
    shared: bool,
    profile: Option<String>,
    config: Option<Digest>,
    layers: Vec<Known>,
    /// Ends of phases are the beginnings of the next ones.
    phases: Vec<(String, Instant)>,
    closed_at: Option<Instant>,
    beside: Vec<Phase>,
    requests: Vec<RequestSeen>,
    reads: Vec<FaultSeen>,
    decode: Decode,
    dropped: Dropped,
}

#[derive(Debug)]
struct Known {
    descriptor: LayerDescriptor,
    layer: Arc<Layer>,
    index: String,
}

/// Orders starts, also those that begin within one tick of the clock.
static LAST: AtomicU64 = AtomicU64::new(0);

impl Recording {
    pub(super) fn new(image: &str, what: Started) -> Self {
        let (began, at) = (Instant::now(), SystemTime::now());
        let micros = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
        let micros = u64::try_from(micros).unwrap_or(0);
        let last = LAST.fetch_max(micros, Relaxed);
        let number = if last < micros { micros } else { LAST.fetch_add(1, Relaxed) + 1 };
        let parsed = canonical(image).ok();
        let repository =
            parsed.as_ref().map_or_else(String::new, |r| format!("{}/{}", r.registry, r.repository));
        let state = State { phases: vec![("resolve".to_owned(), began)], ..State::default() };
        Self {
            began,
            at,
            number,
            what,
            reference: parsed.as_ref().map_or_else(|| image.to_owned(), ToString::to_string),
            familiar: parsed.map_or_else(|| image.to_owned(), |r| r.familiar()),
            repository,
            state: Mutex::new(state),
        }
    }

    /// Tells it from all other starts; later ones have higher numbers. Microseconds since the epoch.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The image's reference in its familiar form.
    pub fn image(&self) -> &str {
        &self.familiar
    }

    /// Waits for what is to be started and remembers why it can't be.
    ///
    /// # Errors
    /// Those of what is to be started.
    pub async fn watch<T>(&self, starting: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let span =
            tracing::info_span!("start", image = self.familiar, container = self.container().map(|c| c.1));
        let result = starting.instrument(span).await;
        if let Err(error) = &result {
            self.failed(&sentence(error));
        }
        result
    }

    /// Id and name of the container that is started.
    pub fn container(&self) -> Option<(&str, &str)> {
        match &self.what {
            Started::Container { id, name } => Some((id, name)),
            Started::Mount | Started::Snapshot { .. } => None,
        }
    }

    pub(super) fn is_of_container(&self, id: &str) -> bool {
        self.container().is_some_and(|(own, _)| own == id)
    }

    /// From now on something else is being done.
    pub fn phase(&self, name: &str) {
        self.lock().phases.push((name.to_owned(), Instant::now()));
    }

    /// Something was done beside the rest since `began`.
    pub fn beside(&self, name: &str, began: Instant) {
        let phase =
            Phase { name: name.to_owned(), start_ms: self.ms(began), end_ms: self.ms(Instant::now()) };
        self.lock().beside.push(phase);
    }

    /// The image is known and its layers have indexes; `ready` says when it was. What comes next is the view.
    pub fn ready(&self, ready: &Ready) {
        let mut state = self.lock();
        state.phases.push(("index".to_owned(), ready.resolved));
        state.phases.push(("stream".to_owned(), ready.indexed));
        state.phases.push(("view".to_owned(), Instant::now()));
        let ResolvedImage { config_digest, layers, .. } = &ready.image;
        state.config = Some(*config_digest);
        let known = layers.iter().zip(&ready.layers).map(|(descriptor, layer)| {
            let streamed = |r: &RequestSeen| r.class == Class::Stream && r.blob == Some(descriptor.digest);
            let index = match layer.adopted_from() {
                Some(origin) => format!("{} ({})", origin.kind, origin.trust),
                None if state.requests.iter().any(streamed) => "none: streamed".to_owned(),
                None => "local".to_owned(),
            };
            Known { descriptor: descriptor.clone(), layer: Arc::clone(layer), index }
        });
        state.layers = known.collect();
    }

    /// Which view is used.
    pub fn view(&self, view: &Arc<MountedView>) {
        let mut state = self.lock();
        state.plan = Some(view.plan.to_string());
        // The list of views has it once, and so has this start.
        state.shared |= Arc::strong_count(view) > 2;
    }

    /// Where the profile came from that is prefetched by.
    pub fn profile(&self, from: &str) {
        self.lock().profile = Some(from.to_owned());
    }

    /// It came from another tag of the repository, if from nowhere else.
    pub fn profile_of_other_tag(&self) {
        self.lock().profile.get_or_insert_with(|| "another tag".to_owned());
    }

    /// What went wrong; the first word counts.
    pub fn failed(&self, error: &str) {
        self.lock().error.get_or_insert_with(|| error.to_owned());
    }

    /// The container has ended; whether this was news.
    pub(super) fn exited(&self, code: i32) -> bool {
        let at_ms = self.ms(Instant::now());
        let mut state = self.lock();
        let news = state.exit.is_none() && !state.closed;
        state.exit.get_or_insert(Exit { at_ms, code });
        news
    }

    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.closed_at.get_or_insert_with(Instant::now);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    pub(super) fn request(&self, request: &RequestSeen) {
        let mut state = self.lock();
        let of_layer = |digest| state.layers.iter().any(|known| known.descriptor.digest == digest);
        let ours = request.repository == self.repository || request.blob.is_some_and(of_layer);
        if state.closed || request.queued < self.began || !ours {
            return;
        }
        if state.requests.len() < MAX_REQUESTS {
            state.requests.push(request.clone());
        } else {
            state.dropped.requests += 1;
            state.dropped.request_bytes += request.bytes;
        }
    }

    pub(super) fn fault(&self, fault: &FaultSeen) {
        let mut state = self.lock();
        if state.closed || fault.began < self.began || !state.has(fault.layer) {
            return;
        }
        if state.reads.len() < MAX_READS {
            state.reads.push(*fault);
        } else {
            state.dropped.reads += 1;
        }
    }

    pub(super) fn decoded(&self, decode: &DecodeSeen) {
        let mut state = self.lock();
        if !state.closed && state.has(decode.layer) {
            state.decode.spans += 1;
            state.decode.bytes += decode.bytes;
            state.decode.core_ms += decode.took.as_secs_f64() * 1e3;
        }
    }

    /// What is known now, with names of files. Reads indexes: not for an async task.
    pub(super) fn snapshot(&self) -> Start {
        // Names take a while, and faults must not wait for them.
        let (requests, reads, layers, config, shared) = {
            let state = self.lock();
            let layers: Vec<Arc<Layer>> = state.layers.iter().map(|known| Arc::clone(&known.layer)).collect();
            (state.requests.clone(), state.reads.clone(), layers, state.config, state.shared)
        };
        let blobs: Vec<Digest> = layers.iter().map(|layer| layer.index().blob_digest()).collect();
        let requests = self.requests_of(&requests, &layers, &blobs, config);
        let reads = self.reads_of(&reads, &layers, shared);
        let state = self.lock();
        let mut start = Start {
            version: VERSION,
            image: self.familiar.clone(),
            what: self.what.clone(),
            began: clock::rfc3339(self.at),
            recording: !state.closed,
            error: state.error.clone(),
            exit: state.exit.clone(),
            plan: state.plan.clone(),
            profile: state.profile.clone().unwrap_or_else(|| "none".to_owned()),
            layers: state.layers.iter().map(Known::told).collect(),
            phases: Vec::new(),
            beside: state.beside.clone(),
            requests,
            reads,
            decode: state.decode,
            dropped: state.dropped,
        };
        start.phases = self.phases_of(&state, &start);
        start
    }

    fn phases_of(&self, state: &State, start: &Start) -> Vec<Phase> {
        let mut phases: Vec<Phase> = Vec::new();
        for (name, began) in &state.phases {
            let start_ms = self.ms(*began);
            if let Some(last) = phases.last_mut() {
                last.end_ms = start_ms;
            }
            phases.push(Phase { name: name.clone(), start_ms, end_ms: start_ms });
        }
        if let Some(last) = phases.last_mut() {
            let running = last.name == "run";
            // A command that goes on is done with its start after the last read that it waited for.
            let waited = start.reads.iter().map(|read| read.start_ms + read.ms).fold(last.start_ms, f64::max);
            let now = self.ms(state.closed_at.unwrap_or_else(Instant::now));
            last.end_ms = match &start.exit {
                Some(exit) => exit.at_ms.max(last.start_ms),
                None if running => waited,
                None => now,
            };
        }
        phases
    }

    fn requests_of(
        &self,
        seen: &[RequestSeen],
        layers: &[Arc<Layer>],
        blobs: &[Digest],
        config: Option<Digest>,
    ) -> Vec<RequestOf> {
        let spans = names::Spans::of(layers);
        let mut told: Vec<RequestOf> = Vec::with_capacity(seen.len());
        for (number, request) in seen.iter().enumerate() {
            let layer = request.blob.and_then(|blob| blobs.iter().position(|own| *own == blob));
            let again = seen[..number].iter().filter(|earlier| is_repeated_by(earlier, request)).count();
            told.push(RequestOf {
                host: request.host.clone(),
                kind: kind(request, layer.is_some(), config).to_owned(),
                what: request.what.clone(),
                layer,
                range: request.range.as_ref().map(|range| (range.start, range.end)),
                spans: layer.zip(request.range.clone()).and_then(|(layer, range)| spans.within(layer, range)),
                class: request.class,
                second: request.second,
                retries: u32::try_from(again).unwrap_or(u32::MAX),
                start_ms: self.ms(request.queued),
                sent_ms: request.sent.map(|at| self.ms(at)),
                first_byte_ms: request.first_byte.map(|at| self.ms(at)),
                end_ms: self.ms(request.ended),
                bytes: request.bytes,
                status: request.status,
                failure: request.failure.clone(),
            });
        }
        told
    }

    fn reads_of(&self, seen: &[FaultSeen], layers: &[Arc<Layer>], shared: bool) -> Vec<ReadOf> {
        let mut files = names::Files::of(layers);
        let container = self.container().filter(|_| !shared).map(|(id, _)| id.to_owned());
        let told = seen.iter().filter_map(|fault| {
            let layer = layers.iter().position(|layer| layer.id() == fault.layer)?;
            let (path, more_files) = files.at(layer, fault.offset..fault.offset.saturating_add(fault.len));
            Some(ReadOf {
                layer,
                offset: fault.offset,
                len: fault.len,
                path,
                more_files,
                start_ms: self.ms(fault.began),
                ms: fault.waited.as_secs_f64() * 1e3,
                ok: fault.ok,
                container: container.clone(),
            })
        });
        told.collect()
    }

    fn ms(&self, at: Instant) -> f64 {
        // Whole microseconds: more would be noise.
        at.saturating_duration_since(self.began).as_micros() as f64 / 1e3
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn has(&self, id: LayerId) -> bool {
        self.layers.iter().any(|known| known.layer.id() == id)
    }
}

impl Known {
    fn told(&self) -> LayerOf {
        let LayerDescriptor { digest, size, .. } = self.descriptor;
        LayerOf { layer: short(self.layer.id()), digest, size, index: self.index.clone() }
    }
}

fn kind(request: &RequestSeen, is_layer: bool, config: Option<Digest>) -> &'static str {
    match request.what.split('/').next().unwrap_or_default() {
        "manifests" => "manifest",
        "blobs" if is_layer || matches!(request.class, Class::Stream) => "layer",
        "blobs" if request.blob.is_some() && request.blob == config => "config",
        "blobs" => "blob",
        "referrers" => "referrers",
        "tags" => "tags",
        "token" => "token",
        _ => "other",
    }
}

/// Whether a request asks once more for what an earlier one did not bring.
fn is_repeated_by(earlier: &RequestSeen, later: &RequestSeen) -> bool {
    let same = earlier.what == later.what
        && earlier.range.as_ref().map(|r| r.end) == later.range.as_ref().map(|r| r.end)
        && earlier.class == later.class
        && !later.second;
    // What was answered 401 is sent again with a token, which is no failure.
    let failed = earlier.failure.is_some() || earlier.status.is_some_and(|s| s == 429 || s >= 500);
    same && failed && later.queued >= earlier.ended
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn seen(recording: &Recording, what: &str, at: u64, status: u16) -> RequestSeen {
        let at = recording.began + Duration::from_millis(at);
        RequestSeen {
            host: "h".into(),
            repository: "h.example/app".into(),
            what: what.into(),
            blob: None,
            range: None,
            class: Class::Metadata,
            second: false,
            queued: at,
            sent: Some(at),
            first_byte: Some(at + Duration::from_millis(1)),
            ended: at + Duration::from_millis(2),
            bytes: 10,
            status: Some(status),
            failure: None,
        }
    }

    #[test]
    fn only_its_own_is_recorded_and_not_without_bound() {
        let recording = Recording::new("h.example/app:v1", Started::Mount);
        let other =
            RequestSeen { repository: "h.example/other".into(), ..seen(&recording, "manifests/v1", 0, 200) };
        recording.request(&other);
        recording.request(&seen(&recording, "manifests/v1", 0, 503));
        recording.request(&seen(&recording, "manifests/v1", 5, 200));
        let start = recording.snapshot();
        let told: Vec<_> = start.requests.iter().map(|r| (r.kind.as_str(), r.status, r.retries)).collect();
        assert_eq!(told, [("manifest", Some(503), 0), ("manifest", Some(200), 1)]);
        for number in 0..MAX_REQUESTS as u64 {
            recording.request(&seen(&recording, "token", 10 + number, 200));
        }
        let start = recording.snapshot();
        assert_eq!(
            (start.requests.len(), start.dropped.requests, start.dropped.request_bytes),
            (1024, 2, 20)
        );
        recording.close();
        recording.request(&seen(&recording, "token", 10, 200));
        assert_eq!(recording.snapshot().dropped.requests, 2, "closed");
    }

    #[test]
    fn phases_have_no_gaps() {
        let recording =
            Recording::new("h.example/app:v1", Started::Container { id: "i".into(), name: "n".into() });
        std::thread::sleep(Duration::from_millis(2));
        recording.phase("setup");
        recording.phase("run");
        std::thread::sleep(Duration::from_millis(2));
        assert!(recording.exited(3) && !recording.exited(4));
        recording.close();
        let start = recording.snapshot();
        let names: Vec<&str> = start.phases.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["resolve", "setup", "run"]);
        assert!(start.phases.windows(2).all(|pair| pair[0].end_ms == pair[1].start_ms));
        assert_eq!(start.exit.as_ref().map(|e| (e.code, e.at_ms)), Some((3, start.phases[2].end_ms)));
        let later = Recording::new("h.example/app:v1", Started::Mount);
        assert!(later.number() > recording.number());
    }
}
