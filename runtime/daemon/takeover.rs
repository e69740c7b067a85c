//! Another program takes over from this daemon.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::Daemon;

// How long callers may keep a daemon that is to be replaced.
const HAND_OVER_WAIT: Duration = Duration::from_secs(10);

/// How a daemon comes to its end.
pub(super) enum Ended {
    /// Nothing is left of what it did.
    InPeace,
    /// Another one takes over what it serves.
    HandedOver,
}

impl Daemon {
    /// Has the keeper start the program of the process behind this connection, and tell it how that went.
    pub(super) fn ask_for_take_over(&self, caller: &UnixStream) -> Result<()> {
        let peer = caller.peer_cred().context("asking who calls")?;
        let pid = peer.pid().context("the kernel does not say who calls")?;
        let path = format!("/proc/{pid}/exe");
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let program = nix::fcntl::open(path.as_str(), flags, Mode::empty())
            .with_context(|| format!("opening the program that is to take over ({path})"))?;
        self.kept.replace(&program, caller.as_fd()).context("asking the keeper for another daemon")?;
        self.hand_over.notify_one();
        Ok(())
    }

    /// Finishes what was asked, as far as that is soon; who calls from now on waits for the next daemon. Mounts are
    /// served to the end.
    pub(super) async fn hand_over(self: &Arc<Self>, mut calls: JoinSet<()>) -> Ended {
        tracing::info!("another daemon takes over");
        let finished = async { while calls.join_next().await.is_some() {} };
        if tokio::time::timeout(HAND_OVER_WAIT, finished).await.is_err() {
            tracing::warn!(calls = calls.len(), "calls that take long break: another daemon takes over");
        }
        // The end of the process drops none of these either.
        calls.detach_all();
        self.settle().await;
        Ended::HandedOver
    }
}
