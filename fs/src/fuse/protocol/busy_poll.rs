//! Looking for the next request for a moment before sleeping.
//!
//! Who unpacks or removes a tree asks again as soon as it has its answer, and a processor that has gone to sleep in
//! between takes longer to wake than the answer takes. So one thread looks again and again for some microseconds: not
//! where requests don't come that fast or several ask, which keeps the processors awake, and not while others want them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long to look for one request.
const LOOK: Duration = Duration::from_micros(50);
/// How often in a row to look in vain before it is given up.
const IN_VAIN: u32 = 8;
/// How long a thread looks for requests before it finds out again whether others want the processors.
const STINT: Duration = Duration::from_millis(200);
/// How long that takes. They do if the thread, which does nothing but answer meanwhile, is ready and waits for a processor
/// for longer than it runs.
const PAUSE: Duration = Duration::from_millis(20);
/// How often in a row the others must not want the processors once they did.
const DOUBTS: u32 = 8;

/// How many requests in a row must have come from one thread.
const ALONE: u32 = 32;

/// What the threads that read from one connection share: one of them looks.
#[derive(Debug, Default)]
pub(super) struct BusyPoll {
    taken: AtomicBool,
    /// The thread that asked last, and how often before somebody else did.
    asker: AtomicU32,
    in_a_row: AtomicU32,
}

/// A thread that looks.
#[derive(Debug)]
pub(super) struct Looker<'p> {
    shared: &'p BusyPoll,
    /// What the kernel says of this thread.
    scheduling: File,
    phase: Phase,
    doubts: u32,
    in_vain: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Until then.
    Looks(Instant),
    /// Since then, when this was so.
    Pauses(Instant, Scheduled),
}

/// How long a thread has run, and how long it was ready to and waited for a processor.
#[derive(Clone, Copy, Debug, Default)]
struct Scheduled {
    ran: Duration,
    waited: Duration,
}

impl BusyPoll {
    /// For the calling thread; `None` where the kernel does not tell how long it waits for a processor, and where there is
    /// only one, which who asks needs.
    pub(super) fn looker(&self) -> Option<Looker<'_>> {
        if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
            return None;
        }
        let scheduling = File::open("/proc/thread-self/schedstat").ok()?;
        let phase = Phase::Pauses(Instant::now(), scheduled(&scheduling)?);
        Some(Looker { shared: self, scheduling, phase, doubts: DOUBTS, in_vain: 0 })
    }
}

impl Looker<'_> {
    /// A request came, from the thread `pid`; 0 is nobody in particular.
    pub(super) fn asked(&self, pid: u32) {
        if pid == 0 {
            return;
        }
        // Requests at the same time may be miscounted: nothing depends on a few.
        let again = self.shared.asker.swap(pid, Ordering::Relaxed) == pid;
        let row = if again { self.shared.in_a_row.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.shared.in_a_row.store(row, Ordering::Relaxed);
    }

    /// Returns when there is a request, or when it is better to sleep until there is one.
    pub(super) fn look(&mut self, dev: &OwnedFd) {
        if self.shared.in_a_row.load(Ordering::Relaxed) < ALONE {
            return;
        }
        let now = Instant::now();
        if !self.may_look(now) || self.shared.taken.swap(true, Ordering::Acquire) {
            return;
        }
        let found = look(dev, now);
        self.shared.taken.store(false, Ordering::Release);
        self.in_vain = if found { 0 } else { self.in_vain + 1 };
        if self.in_vain > IN_VAIN {
            self.pause(now);
        }
    }

    fn may_look(&mut self, now: Instant) -> bool {
        match self.phase {
            Phase::Looks(until) if now < until => return true,
            Phase::Looks(_) => self.pause(now),
            Phase::Pauses(since, _) if now - since < PAUSE => {}
            Phase::Pauses(_, before) => {
                let free = scheduled(&self.scheduling).is_some_and(|after| ran_freely(before, after));
                self.doubts = if free { self.doubts.saturating_sub(1) } else { DOUBTS };
                if self.doubts == 0 {
                    self.phase = Phase::Looks(now + STINT);
                    return true;
                }
                self.pause(now);
            }
        }
        false
    }

    fn pause(&mut self, now: Instant) {
        self.in_vain = 0;
        self.phase = Phase::Pauses(now, scheduled(&self.scheduling).unwrap_or_default());
    }
}

fn ran_freely(before: Scheduled, after: Scheduled) -> bool {
    let more = |after: Duration, before| after.saturating_sub(before);
    more(after.ran, before.ran) > more(after.waited, before.waited)
}

/// Whether a request came.
fn look(dev: &OwnedFd, began: Instant) -> bool {
    loop {
        if is_readable(dev) {
            return true;
        }
        if began.elapsed() > LOOK {
            return false;
        }
        std::thread::yield_now();
    }
}

/// Whether a read would not wait. Also when it would fail: it shall.
fn is_readable(dev: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(dev.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}

/// What the first two numbers of a thread's `schedstat` say, in nanoseconds.
fn scheduled(scheduling: &File) -> Option<Scheduled> {
    let mut text = [0; 64];
    let n = scheduling.read_at(&mut text, 0).ok()?;
    let mut numbers = std::str::from_utf8(&text[..n]).ok()?.split_ascii_whitespace();
    let mut nanos = || numbers.next()?.parse().ok().map(Duration::from_nanos);
    Some(Scheduled { ran: nanos()?, waited: nanos()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_finds_what_is_there_and_is_short_if_nothing_is() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let began = Instant::now();
        assert!(!look(&reader, began));
        assert!(began.elapsed() > LOOK);
        nix::unistd::write(&writer, b"x").unwrap();
        assert!(look(&reader, Instant::now()));
    }

    #[test]
    fn a_thread_that_waits_for_a_processor_is_in_the_way() {
        let at = |ran, waited| Scheduled {
            ran: Duration::from_millis(ran),
            waited: Duration::from_millis(waited),
        };
        assert!(ran_freely(at(5, 9), at(15, 11)));
        assert!(!ran_freely(at(5, 9), at(15, 20)));
        assert!(!ran_freely(at(5, 9), at(5, 9)), "it did nothing");
        let scheduling = File::open("/proc/thread-self/schedstat").unwrap();
        let before = scheduled(&scheduling).unwrap();
        while scheduled(&scheduling).unwrap().ran < before.ran + Duration::from_millis(5) {
            std::hint::spin_loop();
        }
    }

    /// One looks at a time; and after some looks in vain nobody does for a while.
    #[test]
    fn looking_is_given_up() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let shared = BusyPoll::default();
        let Some(mut looker) = shared.looker() else { return };
        let looks = Phase::Looks(Instant::now() + Duration::from_secs(3600));
        looker.phase = looks;
        for pid in [7; 1 + ALONE as usize] {
            looker.look(&reader);
            assert_eq!(looker.in_vain, 0, "others asked");
            looker.asked(pid);
            looker.asked(0);
        }
        shared.taken.store(true, Ordering::Relaxed);
        looker.look(&reader);
        assert_eq!(looker.in_vain, 0);
        shared.taken.store(false, Ordering::Relaxed);
        for _ in 0..=IN_VAIN {
            assert!(matches!(looker.phase, Phase::Looks(_)));
            looker.look(&reader);
        }
        assert!(matches!(looker.phase, Phase::Pauses(..)));
        assert!(!shared.taken.load(Ordering::Relaxed));
    }
}
