//! The end of containers: watching, stopping, removing, and picking them up after a restart.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::containers::{Container, Holds, Record};
use super::views::{Purpose, chain_id};
use super::{Daemon, layer_ids};
use crate::container::config::ShimConfig;
use crate::container::shim;
use crate::failure::Failure;
use crate::network::Attachment;

impl Daemon {
    /// Waits in the background for the container's end and cleans up then.
    pub(super) fn watch(self: &Arc<Self>, container: Arc<Container>) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = wait_for_shim(&container).await {
                tracing::warn!(container = container.record().id, %error, "a shim can't be watched");
            }
            this.finish(&container).await;
            if container.record().remove
                && let Err(error) = this.delete(&container)
            {
                tracing::warn!(container = container.record().id, %error, "a container can't be removed");
            }
        });
    }

    // Everything that is due once a container's shim is gone, done exactly once.
    async fn finish(self: &Arc<Self>, container: &Arc<Container>) {
        let mut ended = container.ended.lock().await;
        if *ended {
            return;
        }
        let record = container.record();
        if container.exit().is_none() {
            // The shim was killed, and its container with it; what it would have cleaned up is done here.
            let dir = container.dir().to_owned();
            let swept =
                tokio::task::spawn_blocking(move || shim::sweep(&ShimConfig::load(&dir.join("shim.json"))?));
            match swept.await {
                Ok(Ok(exit)) => tracing::warn!(container = record.id, exit.exit_code, "a shim was killed"),
                Ok(Err(error)) => {
                    tracing::warn!(container = record.id, %error, "a killed shim left something");
                }
                Err(error) => tracing::warn!(container = record.id, %error, "a killed shim left something"),
            }
        }
        if let Some(attachment) = record.attachment {
            // Not waited for: the kernel takes tens of milliseconds to delete a firewall table, and what a crash
            // leaves of it the next start removes.
            let (this, id) = (Arc::clone(self), record.id.clone());
            tokio::task::spawn_blocking(move || this.detach_network(&id, &attachment));
        }
        container.release();
        self.seen.starts.exited(&record.id, container.exit().map_or(0, |exit| exit.exit_code));
        if let Some(chain) = chain_id(&record.diff_ids) {
            self.save_profile(chain);
        }
        let _ = std::fs::remove_file(&record.socket);
        *ended = true;
    }

    /// Takes a container off its bridge; the bridge goes with the last one.
    pub(super) fn detach_network(&self, id: &str, attachment: &Attachment) {
        if let Err(error) = self.network.detach(id, attachment) {
            tracing::warn!(container = id, %error, "a container's network can't be taken down");
        }
    }

    fn delete(&self, container: &Container) -> Result<()> {
        let record = container.record();
        self.containers.remove(&record.id);
        match std::fs::remove_dir_all(container.dir()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("deleting {}", container.dir().display()))
            }
            _ => Ok(()),
        }
    }

    /// Stops a container: its stop signal, then SIGKILL after `timeout`.
    ///
    /// # Errors
    /// When it can't be signalled or does not end.
    pub async fn stop(self: &Arc<Self>, container: &Arc<Container>, timeout: Duration) -> Result<()> {
        if !container.is_running() {
            return Ok(());
        }
        let record = container.record();
        if tokio::time::timeout(timeout, signal_and_wait(container, stop_signal(&record))).await.is_err() {
            let kill = signal_and_wait(container, libc::SIGKILL);
            tokio::time::timeout(Duration::from_secs(10), kill)
                .await
                .with_context(|| format!("container {} does not end, not even on SIGKILL", record.name))?;
        }
        self.finish(container).await;
        Ok(())
    }

    /// Sends a signal to a container's init.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&self, container: &Container, signal: i32) -> Result<()> {
        let record = container.record();
        if !container.is_running() {
            return Err(Failure::new(1, format!("container {} is not running", record.name)).into());
        }
        crate::container::client::kill(&record.socket, signal)
            .with_context(|| format!("sending signal {signal} to container {}", record.name))?;
        Ok(())
    }

    /// Removes a container that has ended, or any with `force`.
    ///
    /// # Errors
    /// When it runs and `force` is not given, or its directory can't be deleted.
    pub async fn remove(self: &Arc<Self>, container: &Arc<Container>, force: bool) -> Result<()> {
        let record = container.record();
        if container.is_running() {
            if !force {
                let name = record.name;
                return Err(Failure::new(
                    1,
                    format!("container {name} is running; stop it first, or use rm --force"),
                )
                .into());
            }
            signal_and_wait(container, libc::SIGKILL).await;
        }
        // A shim that has written its exit status may still be on its way out.
        wait_for_shim(container).await?;
        self.finish(container).await;
        self.delete(container)
    }

    /// Picks up the containers that an earlier daemon left.
    ///
    /// # Errors
    /// When the directory of containers can't be read.
    pub(super) async fn recover_containers(self: &Arc<Self>) -> Result<()> {
        for entry in std::fs::read_dir(self.paths.containers())? {
            let dir = entry?.path();
            let record = std::fs::read(dir.join("container.json"))
                .map_err(anyhow::Error::from)
                .and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
            let record = match record {
                Ok(record) if record.shim.is_some() => record,
                // Cut off before its shim was there: it never ran.
                _ => {
                    tracing::warn!(dir = %dir.display(), "a half-made container is deleted");
                    let _ = std::fs::remove_dir_all(&dir);
                    continue;
                }
            };
            let alive = record.shim.is_some_and(crate::proc::Identity::is_alive);
            let holds = if alive { self.recover_holds(&record).await } else { Holds::default() };
            let container = Arc::new(Container::new(dir, record, holds, false));
            self.containers.insert(Arc::clone(&container));
            self.watch(container);
        }
        let live = self.containers.all().iter().filter(|c| c.is_running()).map(|c| c.record().id).collect();
        let this = Arc::clone(self);
        match tokio::task::spawn_blocking(move || this.network.retain(&live)).await? {
            Ok(gone) if !gone.is_empty() => tracing::info!(?gone, "networks of ended containers removed"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "networks of ended containers can't be removed"),
        }
        Ok(())
    }

    async fn recover_holds(self: &Arc<Self>, record: &Record) -> Holds {
        let layers = self.known_layers(&layer_ids(&record.layers, &record.diff_ids));
        let (Some(layers), Ok(plan)) = (layers, record.plan.parse()) else { return Holds::default() };
        let kept_lazy = self.keep_lazy(record.hydrate, &record.id, &layers);
        match self.views.get(layers, plan, Purpose::Use).await {
            Ok(view) => {
                self.seen.recovered(&record.image, &view);
                Holds { view: Some(view), kept_lazy }
            }
            Err(error) => {
                tracing::warn!(container = record.id, %error, "the view of a running container can't be taken over");
                Holds { view: None, kept_lazy }
            }
        }
    }
}

// What `stop` sends first: the image's STOPSIGNAL, by name or number.
fn stop_signal(record: &Record) -> i32 {
    let Some(text) = &record.stop_signal else { return libc::SIGTERM };
    parse_signal(text).unwrap_or_else(|| {
        tracing::warn!(
            container = record.id,
            signal = text,
            "the image's stop signal is unknown; SIGTERM is used"
        );
        libc::SIGTERM
    })
}

/// A signal by number or by name, with or without SIG.
pub fn parse_signal(text: &str) -> Option<i32> {
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper.clone() } else { format!("SIG{upper}") };
    let number = upper.parse::<i32>().ok().filter(|n| (1..=64).contains(n));
    number.or_else(|| name.parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32))
}

async fn signal_and_wait(container: &Container, signal: i32) {
    let record = container.record();
    if crate::container::client::kill(&record.socket, signal).is_err()
        && let Some(shim) = record.shim
    {
        // A shim that doesn't listen takes its container along when it is killed.
        shim.signal(libc::SIGKILL);
    }
    let _ = wait_for_shim(container).await;
}

async fn wait_for_shim(container: &Container) -> Result<()> {
    let Some(fd) = container.record().shim.and_then(crate::proc::Identity::pidfd) else { return Ok(()) };
    Ok(crate::proc::ended(fd).await?)
}
