//! Counts of the requests a server got from the kernel.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Requests by opcode since the server started.
        #[derive(Debug, Default)]
        pub struct Requests {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// The counts of [`Requests`] at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct StatsSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Requests {
            /// The counts now.
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl StatsSnapshot {
            /// All requests together.
            pub fn total(&self) -> u64 {
                0 $(+ self.$name)*
            }

            /// Each kind of request by name, and how many there were.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

requests! {
    /// LOOKUP: a name the kernel did not know.
    lookup,
    /// GETATTR.
    getattr,
    /// READ.
    read,
    /// READDIR and READDIRPLUS.
    readdir,
    /// READLINK.
    readlink,
    /// OPEN and OPENDIR; one each per mount, refused so that no more come.
    open,
    /// GETXATTR and LISTXATTR.
    xattr,
    /// Everything else (STATFS, FLUSH, ACCESS…; FORGET is not counted: it asks nothing).
    other,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
