//! Who may use the link: faults at once, first streams next, hydration when it is quiet or where faults leave most of
//! the link idle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::FetchOptions;
use super::link::Link;
use crate::error::FetchError;

/// Hydration starts nothing until this long after the last fault: faults come in bursts.
const QUIET: Duration = Duration::from_millis(40);
/// Hydration that has waited this long does one request, so that a busy reader cannot keep it out for ever.
const PATIENCE: Duration = Duration::from_secs(5);
/// A background request shall occupy the link about this long, because a fault that comes meanwhile shares it.
const BUSY_TURN: Duration = Duration::from_millis(60);
/// The same after `CALM` without a fault.
const CALM_TURN: Duration = Duration::from_millis(500);
/// After so long without faults background requests may be long, and several at a time.
const CALM: Duration = Duration::from_secs(2);
/// A link that carries more than this during one round trip is long and fat: readers that ask for one thing after the
/// other leave it idle most of the time, and one that brings everything meanwhile spares them more waits than it
/// costs. With spans of some 170 KB compressed and a fifth of an image touched, the two are even here.
const FAT: u64 = 640 << 10;
const MIN_BACKGROUND: u64 = 1 << 20;
const MAX_BACKGROUND: u64 = 32 << 20;

pub(super) struct Scheduler {
    began: Instant,
    faults: AtomicUsize,
    /// Milliseconds from `began` to the end of the last fault, plus one; 0 is never.
    last_fault: AtomicU64,
    fault_ended: Notify,
    fault_slots: Arc<Semaphore>,
    prefetch_slots: Arc<Semaphore>,
    background_slots: Arc<Semaphore>,
    background_requests: u32,
    stream_slots: Arc<Semaphore>,
    decode_slots: Arc<Semaphore>,
    pub(super) link: Link,
}

/// Lives as long as a fault does.
pub(super) struct FaultGuard<'a>(&'a Scheduler);

impl Scheduler {
    pub(super) fn new(options: &FetchOptions) -> Scheduler {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let slots = |n: usize| Arc::new(Semaphore::new(n.max(1)));
        Scheduler {
            began: Instant::now(),
            faults: AtomicUsize::new(0),
            last_fault: AtomicU64::new(0),
            fault_ended: Notify::new(),
            fault_slots: slots(options.fault_requests),
            prefetch_slots: slots(options.prefetch_requests),
            background_slots: slots(options.background_requests),
            background_requests: u32::try_from(options.background_requests.max(1)).unwrap_or(u32::MAX),
            stream_slots: slots(options.streams),
            decode_slots: slots(cores.clamp(2, 4)),
            link: Link::default(),
        }
    }

    /// Announces a fault; background work holds back until the guard is dropped.
    pub(super) fn fault(&self) -> FaultGuard<'_> {
        self.faults.fetch_add(1, Relaxed);
        FaultGuard(self)
    }

    /// The right to one request for a fault.
    pub(super) async fn fault_request(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        permit(&self.fault_slots, 1).await
    }

    /// The right to one request for what is foreseen. Faults need not wait for it: they take over what such a
    /// request would bring late.
    pub(super) async fn prefetch_request(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        permit(&self.prefetch_slots, 1).await
    }

    /// The right to one background request, once it may start. While faults come now and then only one such request
    /// runs at a time, over all layers, unless the link is fat.
    pub(super) async fn background_request(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        let count = if self.is_calm() || self.is_fat() { 1 } else { self.background_requests };
        let permit = permit(&self.background_slots, count).await?;
        self.quiet().await;
        Ok(permit)
    }

    /// The right to one stream.
    pub(super) async fn stream(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        permit(&self.stream_slots, 1).await
    }

    /// The right to hold one decoded span in memory.
    pub(super) async fn decode(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        permit(&self.decode_slots, 1).await
    }

    /// Waits until background work may start a request.
    pub(super) async fn quiet(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.is_fat() {
                return;
            }
            let ended = self.fault_ended.notified();
            let wait = if self.faults.load(Relaxed) > 0 {
                deadline
            } else {
                match self.since_fault() {
                    Some(since) if since < QUIET => Instant::now() + (QUIET - since),
                    _ => return,
                }
            };
            let until = wait.min(deadline);
            if Instant::now() >= deadline {
                return;
            }
            tokio::select! {
                () = ended => {}
                () = tokio::time::sleep_until(until.into()) => {}
            }
        }
    }

    /// Waits until no fault came for as long as `quiet`, from now on, but not longer than `most`.
    pub(super) async fn settled(&self, quiet: Duration, most: Duration) {
        let began = Instant::now();
        loop {
            let elapsed = began.elapsed();
            let idle = match self.faults.load(Relaxed) {
                0 => self.since_fault().map_or(elapsed, |since| since.min(elapsed)),
                _ => Duration::ZERO,
            };
            if idle >= quiet || elapsed >= most {
                return;
            }
            tokio::time::sleep((quiet - idle).min(most - elapsed)).await;
        }
    }

    /// Bytes for the next background request.
    pub(super) fn background_bytes(&self) -> u64 {
        let turn = if self.is_calm() { CALM_TURN } else { BUSY_TURN };
        let turn = self.link.rate().map_or(4 << 20, |rate| (rate * turn.as_secs_f64()) as u64);
        turn.clamp(MIN_BACKGROUND, MAX_BACKGROUND)
    }

    /// Bytes that cost no more time than one more round trip would: reading so much ahead at most doubles a
    /// fault's time and saves the next fault.
    pub(super) fn free_readahead(&self) -> u64 {
        self.link.in_flight().unwrap_or(0)
    }

    /// Whether background work need not wait for faults. So it is as long as the link is not known, too: only a
    /// transfer of some length tells.
    fn is_fat(&self) -> bool {
        self.link.in_flight().is_none_or(|bytes| bytes > FAT)
    }

    fn is_calm(&self) -> bool {
        self.faults.load(Relaxed) == 0 && self.since_fault().is_none_or(|since| since > CALM)
    }

    fn since_fault(&self) -> Option<Duration> {
        let last = self.last_fault.load(Relaxed).checked_sub(1)?;
        Some(self.began.elapsed().saturating_sub(Duration::from_millis(last)))
    }
}

impl Drop for FaultGuard<'_> {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.0.last_fault.store(now + 1, Relaxed);
        self.0.faults.fetch_sub(1, Relaxed);
        self.0.fault_ended.notify_waiters();
    }
}

async fn permit(slots: &Arc<Semaphore>, count: u32) -> Result<OwnedSemaphorePermit, FetchError> {
    Arc::clone(slots).acquire_many_owned(count).await.map_err(|_| FetchError::Interrupted { what: "a fetch" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn over(rate: u64, round_trip: Duration) -> Arc<Scheduler> {
        let scheduler = Scheduler::new(&FetchOptions::default());
        scheduler.link.pretend(rate, round_trip);
        Arc::new(scheduler)
    }

    #[tokio::test]
    async fn background_waits_for_faults() {
        let scheduler = over(25_000_000, Duration::from_millis(20));
        drop(scheduler.background_request().await.unwrap());
        let fault = scheduler.fault();
        let other = Arc::clone(&scheduler);
        let waiter = tokio::spawn(async move { other.background_request().await });
        tokio::time::sleep(Duration::from_millis(80)).await;
        assert!(!waiter.is_finished());
        let ended = Instant::now();
        drop(fault);
        drop(waiter.await.unwrap().unwrap());
        assert!(ended.elapsed() + Duration::from_millis(2) >= QUIET);
    }

    #[tokio::test]
    async fn background_does_not_wait_where_faults_leave_the_link_idle() {
        let scheduler = over(125_000_000, Duration::from_millis(20));
        let _fault = scheduler.fault();
        let first = scheduler.background_request().await.unwrap();
        drop((first, scheduler.background_request().await.unwrap()));
        // Nor where nothing is known yet: somebody has to find out.
        let unknown = Scheduler::new(&FetchOptions::default());
        let _fault = unknown.fault();
        tokio::time::timeout(Duration::from_secs(1), unknown.quiet()).await.unwrap();
    }

    #[tokio::test]
    async fn a_start_has_settled_when_faults_have_ended_or_last_too_long() {
        let (scheduler, quiet) = (Arc::new(Scheduler::new(&FetchOptions::default())), 60 * MS);
        let began = Instant::now();
        scheduler.settled(quiet, 1000 * MS).await;
        assert!(began.elapsed() >= quiet, "{:?}", began.elapsed());
        let (began, fault) = (Instant::now(), scheduler.fault());
        scheduler.settled(quiet, 200 * MS).await;
        assert!(began.elapsed() >= 200 * MS, "{:?}", began.elapsed());
        let other = Arc::clone(&scheduler);
        let waiter = tokio::spawn(async move { other.settled(quiet, 60_000 * MS).await });
        tokio::time::sleep(2 * quiet).await;
        assert!(!waiter.is_finished());
        drop(fault);
        let ended = Instant::now();
        waiter.await.unwrap();
        assert!(ended.elapsed() + 2 * MS >= quiet, "{:?}", ended.elapsed());
    }

    #[test]
    fn readahead_follows_the_link() {
        assert_eq!(Scheduler::new(&FetchOptions::default()).free_readahead(), 0);
        let scheduler = over(25_000_000, Duration::from_millis(20));
        assert_eq!(scheduler.free_readahead(), 500_000);
        assert_eq!(scheduler.background_bytes(), 12_500_000);
        drop(scheduler.fault());
        assert_eq!(scheduler.background_bytes(), 1_500_000);
    }
}
