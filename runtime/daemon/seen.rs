//! Whoever watches the fetcher, in one: metrics by image and layer, and the timelines of starts.

use std::path::PathBuf;
use std::sync::Arc;

use lazyrun_fetcher::Reference;
use lazyrun_fetcher::observe::{DecodeSeen, FaultSeen, Observer, RequestSeen, SharedSeen};

use super::Daemon;
use super::images::Ready;
use super::metrics::layers::FaultsByLayer;
use super::views::MountedView;
use super::why::{Recorder, Starts};

/// What was seen.
#[derive(Debug)]
pub struct Seen {
    /// Faults by image and layer.
    pub faults: FaultsByLayer,
    /// Starts.
    pub starts: Arc<Starts>,
}

impl Seen {
    /// Nothing yet; timelines of starts are kept in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { faults: FaultsByLayer::default(), starts: Arc::new(Starts::new(dir)) }
    }
}

impl Seen {
    /// A start reads this view.
    pub fn mounted(&self, start: &Recorder, view: &Arc<MountedView>) {
        start.view(view);
        self.faults.mounted(start.image(), view);
    }

    /// A view that an earlier daemon mounted is in use, of an image as the user named it.
    pub fn recovered(&self, image: &str, view: &Arc<MountedView>) {
        let image = image.parse::<Reference>().map_or_else(|_| image.to_owned(), |r| r.familiar());
        self.faults.uses(&image, &view.layers);
        self.faults.mounted(&image, view);
    }

    /// An image is removed.
    pub fn forget(&self, reference: &str) {
        if let Ok(reference) = reference.parse::<Reference>() {
            self.faults.forget(&reference.familiar());
            self.starts.forget(&reference);
        }
    }
}

impl Daemon {
    /// A start has its image and layers.
    pub(super) fn uses(&self, start: &Recorder, ready: &Ready) {
        start.ready(ready);
        self.seen.faults.uses(start.image(), &ready.layers);
    }
}

impl Observer for Seen {
    fn request(&self, request: &RequestSeen) {
        self.starts.request(request);
    }

    fn fault(&self, fault: &FaultSeen) {
        self.faults.note(fault);
        self.starts.fault(fault);
    }

    fn decoded(&self, decode: &DecodeSeen) {
        self.starts.decoded(decode);
    }

    fn shared(&self, shared: &SharedSeen) {
        self.faults.note_shared(shared);
    }
}
