//! Processors: what is decoded ahead of any reader gives way to containers and to whoever waits.
//!
//! A start whose bytes are foreseen shares the machine with their decoding. It is what the decoding is for.

use std::sync::OnceLock;

use rustix::process::{getpriority_process, setpriority_process};

use crate::observe::Class;

/// How much nicer such a thread is than the daemon (nice(2)): it gets a third of a processor that others want, too.
const NICER: i32 = 5;

/// The calling thread gives way until this is dropped.
pub(super) struct Polite {
    /// Its niceness before; absent where it stays as it is.
    before: Option<i32>,
}

impl Polite {
    pub(super) fn for_class(class: Class) -> Polite {
        if class == Class::Fault { Polite { before: None } } else { Polite::now() }
    }

    pub(super) fn now() -> Polite {
        let before = can_come_back().then(getpriority).flatten();
        Polite { before: before.filter(|before| setpriority(before + NICER)) }
    }
}

impl Drop for Polite {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            setpriority(before);
        }
    }
}

/// The calling thread's; Linux takes "this process" for that (setpriority(2), "C library/kernel differences").
fn getpriority() -> Option<i32> {
    getpriority_process(None).ok()
}

fn setpriority(nice: i32) -> bool {
    setpriority_process(None, nice).is_ok()
}

/// Whether a thread may become less nice again: not everybody may, and threads are used again. Tried once, on a thread
/// that nobody needs.
fn can_come_back() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    let attempt = || getpriority().is_some_and(|before| setpriority(before + NICER) && setpriority(before));
    *CAN.get_or_init(|| std::thread::spawn(attempt).join().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_as_before_afterwards() {
        let before = getpriority().unwrap();
        let polite = Polite::for_class(Class::Hydrate);
        let meanwhile = if can_come_back() { before + NICER } else { before };
        assert_eq!(getpriority().unwrap(), meanwhile.min(19));
        drop(polite);
        assert_eq!(getpriority().unwrap(), before);
        let _fault = Polite::for_class(Class::Fault);
        assert_eq!(getpriority().unwrap(), before);
    }
}
