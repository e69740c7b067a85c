//! What the integration tests and the end-to-end benches share: instances of the program, images, registries,
//! a private containerd, trees, and the search for what was left behind.

#![allow(dead_code, unreachable_pub, reason = "each test binary and bench uses a part")]

pub mod bulk;
pub mod containerd;
pub mod cri;
pub mod docker_registry;
#[path = "../../fetcher/tests/common/evil.rs"]
pub mod evil;
pub mod fixture;
pub mod indexed;
pub mod instance;
pub mod leaks;
pub mod load;
pub mod manager;
pub mod prometheus;
pub mod proxy;
pub mod server;
pub mod snapshotter;
pub mod tree;

use std::time::{Duration, Instant};

/// Fails with a reason when the tests do not run as root: without it hardly anything here can be tested, and a
/// silent pass would be a lie.
pub fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests mount filesystems and make namespaces: run them as root (make test)"
    );
}

/// Polls until `check` gives something, for at most `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
