//! The time without a daemon that serves. For as long as the bound of a fault readers wait for the next one; then they
//! are refused, because who waits behind EROFS could not even be killed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use lazyrun_fs::fuse::{RefusedRequest, Refuser, recall_unanswered};

use super::store::FdStore;

/// Whether there is an outage, and who refuses what waits.
#[derive(Debug)]
pub(super) struct Outage {
    bound: Duration,
    since: Option<Instant>,
    // A daemon serves, but not for long yet.
    serving: bool,
    // The bound has passed.
    refusing: bool,
    refusers: BTreeMap<String, Refuser>,
    buffer: RefusedRequest,
}

impl Outage {
    /// None yet; readers wait for `bound`.
    pub(super) fn new(bound: Duration) -> Self {
        let (refusers, buffer) = (BTreeMap::new(), RefusedRequest::default());
        Self { bound, since: None, serving: false, refusing: false, refusers, buffer }
    }

    /// There is no daemon any more.
    pub(super) fn begin(&mut self) {
        self.serving = false;
        self.since.get_or_insert_with(Instant::now);
    }

    /// There is a daemon that serves. If it does not for long, it was no end of the outage.
    pub(super) fn interrupt(&mut self) {
        if !self.refusers.is_empty() {
            eprintln!("lazyrun keeper: there is a daemon again; reads are no longer refused");
        }
        self.serving = true;
        self.refusing = false;
        self.refusers.clear();
    }

    /// The daemon that serves can be relied on.
    pub(super) fn end(&mut self) {
        self.since = None;
    }

    /// Whether there is no daemon that has served for long.
    pub(super) fn is_on(&self) -> bool {
        self.since.is_some()
    }

    /// When readers are to be refused, if they are not yet.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.since.filter(|_| !self.serving && !self.refusing).map(|since| since + self.bound)
    }

    /// What becomes readable when somebody is to be refused.
    pub(super) fn waiting(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.refusers.values().map(AsFd::as_fd)
    }

    /// Once the bound has passed and no daemon serves, refuses whoever waits. `alone`: there is no process of a daemon
    /// that could have taken requests, so that those which a dead one took can be refused as well.
    pub(super) fn refuse(&mut self, store: &FdStore, alone: bool) {
        let Some(since) = self.since else { return };
        if self.serving || since.elapsed() < self.bound {
            return;
        }
        if !self.refusing && store.connections().next().is_some() {
            let bound = self.bound;
            eprintln!("lazyrun keeper: no daemon has served for {bound:?}; reads fail until there is one");
        }
        self.refusing = true;
        let kept: BTreeSet<&str> = store.connections().map(|(name, ..)| name).collect();
        self.refusers.retain(|name, _| kept.contains(name.as_str()));
        for (name, dev, journal) in store.connections() {
            let new = !self.refusers.contains_key(name);
            // The kernel hands out anew even what a daemon has that does not get ready.
            if alone || (new && journal.is_none()) {
                let recalled = journal.map(OwnedFd::try_clone).transpose();
                if let Err(error) = recalled.and_then(|journal| recall_unanswered(dev.as_fd(), journal)) {
                    eprintln!("lazyrun keeper: reads that wait at {name} can't be refused: {error}");
                }
            }
            if new && let Ok(refuser) = Refuser::new(dev.as_fd()) {
                self.refusers.insert(name.to_owned(), refuser);
            }
        }
        // A connection that ended has nobody left who waits.
        self.refusers.retain(|_, refuser| refuser.refuse_waiting(&mut self.buffer).is_ok());
    }
}
