//! Why a start took what it took: what `lazyrun why` tells. Every start is recorded for a while, and the last few of each
//! image are kept.

mod kept;
mod names;
mod recording;
mod summary;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use lazyrun_fetcher::Reference;
use lazyrun_fetcher::observe::{DecodeSeen, FaultSeen, RequestSeen};
use serde_json::Value;

use super::Daemon;
use crate::failure::Failure;
use crate::ipc::why::{Start, StartSummary, Started, Why, WhyAction};
use kept::Kept;
pub use recording::Recording;
pub use summary::summary;

/// A start is recorded for so long after it was made, unless its container ends before.
const RECORDED: Duration = Duration::from_secs(30);
/// After so long it is kept for the first time: nothing that the start waits for, and soon enough for most crashes.
const FIRST_KEPT: Duration = Duration::from_secs(2);
/// Recordings at a time; what starts while there are more is not recorded.
const MAX_RECORDINGS: usize = 32;

/// The starts of an instance.
#[derive(Debug)]
pub struct Starts {
    // Requests and faults are many and starts few: what nobody records costs one load.
    any: AtomicBool,
    recordings: RwLock<Vec<Arc<Recording>>>,
    kept: Kept,
    ok: AtomicU64,
    failed: AtomicU64,
}

impl Starts {
    /// Starts kept in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            any: AtomicBool::new(false),
            recordings: RwLock::default(),
            kept: Kept::new(dir),
            ok: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Starts that went well and that failed.
    pub fn counts(&self) -> (u64, u64) {
        (self.ok.load(Relaxed), self.failed.load(Relaxed))
    }

    /// Something is to be started from this image, as the user named it.
    pub fn begin(self: &Arc<Self>, image: &str, what: Started) -> Recorder {
        let recording = Arc::new(Recording::new(image, what));
        let mut recordings = self.recordings.write().unwrap_or_else(PoisonError::into_inner);
        if recordings.len() < MAX_RECORDINGS {
            recordings.push(Arc::clone(&recording));
            self.any.store(true, Relaxed);
        }
        Recorder { starts: Arc::clone(self), recording, over: false }
    }

    /// A container has ended, as its start may still be recorded.
    pub fn exited(self: &Arc<Self>, id: &str, code: i32) {
        let found = self.active().into_iter().find(|r| r.is_of_container(id));
        if let Some(recording) = found.filter(|recording| recording.exited(code)) {
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || this.close(&recording));
        }
    }

    /// Keeps what is being recorded. Blocks on the disk; for an orderly end.
    pub fn close_all(&self) {
        for recording in self.active() {
            self.close(&recording);
        }
    }

    /// Forgets the starts of an image.
    pub fn forget(&self, image: &Reference) {
        let name = image.to_string();
        let mut recordings = self.recordings.write().unwrap_or_else(PoisonError::into_inner);
        for forgotten in recordings.extract_if(.., |recording| recording.reference == name) {
            forgotten.close();
        }
        self.any.store(!recordings.is_empty(), Relaxed);
        drop(recordings);
        self.kept.forget(&name);
    }

    /// A request is over.
    pub fn request(&self, request: &RequestSeen) {
        self.each(|recording| recording.request(request));
    }

    /// A fault is over.
    pub fn fault(&self, fault: &FaultSeen) {
        self.each(|recording| recording.fault(fault));
    }

    /// A span has been decoded.
    pub fn decoded(&self, decode: &DecodeSeen) {
        self.each(|recording| recording.decoded(decode));
    }

    fn each(&self, tell: impl Fn(&Recording)) {
        if self.any.load(Relaxed) {
            let recordings = self.recordings.read().unwrap_or_else(PoisonError::into_inner);
            recordings.iter().for_each(|recording| tell(recording));
        }
    }

    fn active(&self) -> Vec<Arc<Recording>> {
        self.recordings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    // Kept first and dropped then, so that whoever asks meanwhile finds it.
    fn close(&self, recording: &Arc<Recording>) {
        recording.close();
        self.keep(recording);
        let mut recordings = self.recordings.write().unwrap_or_else(PoisonError::into_inner);
        recordings.retain(|other| !Arc::ptr_eq(other, recording));
        self.any.store(!recordings.is_empty(), Relaxed);
    }

    fn keep(&self, recording: &Recording) {
        let start = recording.snapshot();
        if let Err(error) = self.kept.save(&recording.reference, recording.number(), &start) {
            tracing::warn!(image = start.image, %error, "the timeline of a start can't be kept");
        }
    }

    /// Starts of a container (by name or beginning of its id) or, if there is none, of an image; the last one first.
    fn find(&self, name: &str, images: &[String]) -> Vec<Start> {
        let active = self.active();
        let of_container =
            |id: &str, its_name: &str| its_name == name || (name.len() >= 4 && id.starts_with(name));
        let mut found: Vec<(u64, Start)> = Vec::new();
        let matching =
            |recording: &&Arc<Recording>| recording.container().is_some_and(|(id, n)| of_container(id, n));
        found.extend(active.iter().filter(matching).map(|r| (r.number(), r.snapshot())));
        found.extend(self.kept.of_container(of_container));
        if found.is_empty() {
            let of_image = |recording: &&Arc<Recording>| images.contains(&recording.reference);
            found.extend(active.iter().filter(of_image).map(|r| (r.number(), r.snapshot())));
            found.extend(images.iter().flat_map(|image| self.kept.of_image(image)));
        }
        // Of one that is both recorded and kept the recording knows more, and comes first.
        found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        found.dedup_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, start)| start).collect()
    }
}

/// Records one start. Dropped before [`Recorder::started`], the start has failed or was given up.
#[derive(Debug)]
pub struct Recorder {
    starts: Arc<Starts>,
    recording: Arc<Recording>,
    over: bool,
}

impl std::ops::Deref for Recorder {
    type Target = Recording;

    fn deref(&self) -> &Recording {
        &self.recording
    }
}

impl Recorder {
    /// What it records to, for work that outlives the start.
    pub fn recording(&self) -> Arc<Recording> {
        Arc::clone(&self.recording)
    }

    /// All is made; what comes now is the command's own time. It is recorded for a while yet.
    pub fn started(mut self) {
        self.over = true;
        self.starts.ok.fetch_add(1, Relaxed);
        self.recording.phase("run");
        let (starts, recording) = (Arc::clone(&self.starts), Arc::clone(&self.recording));
        tokio::spawn(async move {
            for (wait, last) in [(FIRST_KEPT, false), (RECORDED - FIRST_KEPT, true)] {
                tokio::time::sleep(wait).await;
                if recording.is_closed() {
                    return;
                }
                let (starts, recording) = (Arc::clone(&starts), Arc::clone(&recording));
                let kept = move || if last { starts.close(&recording) } else { starts.keep(&recording) };
                let _ = tokio::task::spawn_blocking(kept).await;
            }
        });
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        self.starts.failed.fetch_add(1, Relaxed);
        self.recording.failed("it was given up");
        let (starts, recording) = (Arc::clone(&self.starts), Arc::clone(&self.recording));
        // A daemon that ends drops what it was at.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || starts.close(&recording));
        }
    }
}

impl Daemon {
    /// Tells what is known of the starts of a container or image. Reads files.
    ///
    /// # Errors
    /// When nothing is known of any.
    pub(super) fn why(&self, name: &str, action: WhyAction) -> Result<Value> {
        let starts = self.starts_of(name)?;
        match action {
            WhyAction::List => {
                let lines: Vec<StartSummary> = (1..).zip(&starts).map(|(n, s)| line(n, s)).collect();
                Ok(serde_json::to_value(lines)?)
            }
            WhyAction::Show { number } => {
                let kept = starts.len();
                let start = starts.into_iter().nth(number.saturating_sub(1)).filter(|_| number > 0);
                let start = start.ok_or_else(|| {
                    Failure::new(
                        1,
                        format!("of {name} {kept} start(s) are known; there is no number {number}"),
                    )
                })?;
                Ok(serde_json::to_value(Why { summary: summary(&start), start })?)
            }
        }
    }

    fn starts_of(&self, name: &str) -> Result<Vec<Start>> {
        let container = self.containers.find(name).ok().map(|container| container.record().id);
        let mut images: Vec<String> = Vec::new();
        if let Ok(reference) = name.parse::<Reference>() {
            images.push(reference.to_string());
        }
        images.extend(self.images.find(name).unwrap_or_default().into_iter().map(|record| record.reference));
        let starts = self.seen.starts.find(container.as_deref().unwrap_or(name), &images);
        if starts.is_empty() {
            let known = container.is_some() || self.images.find(name).is_ok();
            let why = if known { "no start of it is known" } else { "no such container or image" };
            return Err(Failure::new(1, format!("{why}: {name}")).into());
        }
        Ok(starts)
    }
}

fn line(number: usize, start: &Start) -> StartSummary {
    let sums = summary(start);
    StartSummary {
        number,
        began: start.began.clone(),
        image: start.image.clone(),
        what: match &start.what {
            Started::Container { name, .. } => name.clone(),
            Started::Mount => "(mount)".to_owned(),
            Started::Snapshot { key } => format!("(snapshot) {key}"),
        },
        total_ms: sums.total_ms,
        requests: sums.requests,
        bytes: sums.bytes.iter().map(|class| class.bytes).sum(),
        reads: sums.reads,
        error: start.error.clone(),
    }
}

/// The name that an image's starts are kept under, whatever the user typed.
fn canonical(image: &str) -> Result<Reference> {
    image.parse::<Reference>().context("no reference")
}
