//! The control socket: one request a connection.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use lazyrun_fetcher::Progress;
use lazyrun_index::Digest;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::Daemon;
use super::metrics::text::Format;
use super::snapshots::unwanted;
use super::takeover::Ended;
use super::views::Purpose;
use crate::failure::Failure;
use crate::ipc::hydration::HydrateMode;
use crate::ipc::protocol::{ContainerPaths, ImageRequest, Info, Mounted, Reply, Request};
use crate::ipc::{fds, frame, why};
use crate::proc;

// The pause after a caller could not be let in, most likely because too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

impl Daemon {
    /// Answers requests until told to stop.
    ///
    /// # Errors
    /// When it can't begin to.
    pub(super) async fn serve(self: Arc<Self>, listener: std::os::unix::net::UnixListener) -> Result<Ended> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tracing::info!(root = %self.paths.root().display(), plan = %self.plan, "serving");
        let mut calls = JoinSet::new();
        loop {
            tokio::select! {
                connection = listener.accept() => {
                    let (stream, _) = match connection {
                        Ok(connection) => connection,
                        Err(error) => {
                            tracing::warn!(%error, "a caller has to wait");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                            continue;
                        }
                    };
                    let this = Arc::clone(&self);
                    calls.spawn(async move {
                        if let Err(error) = this.answer(stream).await {
                            tracing::debug!(%error, "a connection broke");
                        }
                    });
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                () = self.stop.notified() => return Ok(Ended::InPeace),
                () = self.hand_over.notified() => {
                    drop(listener);
                    return Ok(self.hand_over(calls).await);
                }
                Some(_) = calls.join_next() => {}
            }
        }
        self.end_all().await;
        self.settle().await;
        Ok(Ended::InPeace)
    }

    /// Marks what was fetched as whole: the next daemon need not verify it again.
    pub(super) async fn settle(self: &Arc<Self>) {
        let synced = self.blocking(|this| {
            this.seen.starts.close_all();
            Ok(this.images.fetcher().store().sync()?)
        });
        if let Err(error) = synced.await {
            tracing::warn!(error = format!("{error:#}"), "what was fetched can't be marked as whole");
        }
    }

    async fn answer(self: Arc<Self>, mut stream: UnixStream) -> Result<()> {
        let Some(request) = frame::receive::<Request>(&mut stream).await? else { return Ok(()) };
        let stopping = matches!(request, Request::Reset { .. });
        let reply = match self.handle(request, &mut stream).await {
            Ok(Some(value)) => Reply::Done { value, fd: false },
            Ok(None) => return Ok(()),
            Err(error) => {
                let Failure { code, message } = error.into();
                Reply::Failed { code, message }
            }
        };
        let sent = frame::send(&mut stream, &reply).await;
        if stopping && matches!(reply, Reply::Done { .. }) {
            self.stop.notify_one();
        }
        Ok(sent?)
    }

    // `None`: the answer has been sent.
    async fn handle(self: &Arc<Self>, request: Request, stream: &mut UnixStream) -> Result<Option<Value>> {
        let value = match request {
            Request::Info => serde_json::to_value(self.info()?)?,
            Request::Run(request) => {
                let started =
                    self.with_progress(stream, |p| async move { self.run(*request, &p).await }).await?;
                serde_json::to_value(started)?
            }
            Request::Pull { image, hydrate } => {
                self.with_progress(stream, |p| self.pull(image, hydrate, p)).await?
            }
            Request::Hydrate(action) => self.with_progress(stream, |p| self.hydrate(action, p)).await?,
            Request::ContainerdFetch(request) => {
                self.with_progress(stream, |p| self.fetch_blobs(request, p)).await?
            }
            Request::Index { image, action } => {
                self.with_progress(stream, |p| self.index(image, action, p)).await?
            }
            Request::Profile { image, action } => {
                self.with_progress(stream, |p| self.profile(image, action, p)).await?
            }
            Request::Mount { image, target, plan, writable, shown, hydrate } => {
                let (id, fd, plan) = self
                    .with_progress(stream, |p| async move {
                        let plan = self.plan_for(plan)?;
                        let start = self.seen.starts.begin(&image.reference, why::Started::Mount);
                        let mounted = async {
                            let ready = self.images.ready(&image, &p).await?;
                            self.uses(&start, &ready);
                            self.keep_profile(&ready);
                            let missing = ready.layers.iter().any(|l| !l.is_hydrated());
                            let view = self.views.get(ready.layers, plan, Purpose::Use).await?;
                            self.seen.mounted(&start, &view);
                            start.phase("rootfs");
                            let mounted = self
                                .mount(&image.reference, view, target, (writable, shown), hydrate)
                                .await?;
                            if missing && hydrate == HydrateMode::Auto {
                                let key = self.hydration.want(&image, false)?;
                                self.hydration.begin(&key).await;
                            }
                            anyhow::Ok(mounted)
                        };
                        let (id, fd) = start.watch(mounted).await?;
                        start.started();
                        Ok((id, fd, plan))
                    })
                    .await?;
                let value = serde_json::to_value(Mounted { plan: plan.to_string() })?;
                let sent = send_with_fd(stream, value, &fd).await;
                drop(fd);
                // The caller's word or its end, whichever comes: the mount table knows the truth.
                if sent.is_ok() {
                    let _ = frame::receive::<bool>(stream).await;
                }
                self.settle_mount(&id);
                return Ok(None);
            }
            Request::TakeOver => {
                self.ask_for_take_over(stream)?;
                return Ok(None);
            }
            Request::System(action) => self.system(action).await?,
            Request::Images => {
                let list = |this: &Self| -> Result<Vec<_>> {
                    this.images.records()?.iter().map(|r| this.images.summary(r)).collect()
                };
                serde_json::to_value(self.blocking(list).await?)?
            }
            Request::Hosts { reference, registry } => {
                let client = self.images.client(&registry)?;
                serde_json::to_value(client.hosts(&reference.parse()?).await?)?
            }
            other => self.handle_short(other).await?,
        };
        Ok(Some(value))
    }

    async fn handle_short(self: &Arc<Self>, request: Request) -> Result<Value> {
        Ok(match request {
            Request::RemoveImage { image, force } => {
                json!(self.blocking(move |this| this.remove_image(&image, force)).await?)
            }
            Request::Unmounted { target } => {
                self.unmounted(&target);
                Value::Null
            }
            Request::List { all } => {
                let listed = self.containers.all().into_iter().filter(|c| all || c.is_running());
                serde_json::to_value(listed.map(|c| c.summary()).collect::<Vec<_>>())?
            }
            Request::Stop { container, timeout_secs } => {
                let container = self.containers.find(&container)?;
                self.stop(&container, Duration::from_secs(timeout_secs)).await?;
                Value::Null
            }
            Request::Kill { container, signal } => {
                let container = self.containers.find(&container)?;
                self.blocking(move |this| this.kill(&container, signal)).await?;
                Value::Null
            }
            Request::Remove { container, force } => {
                let container = self.containers.find(&container)?;
                self.remove(&container, force).await?;
                Value::Null
            }
            Request::Metrics { open } => {
                let format = if open { Format::OpenMetrics } else { Format::Prometheus };
                json!(self.blocking(move |this| this.metrics(format)).await?)
            }
            Request::Why { name, action } => self.blocking(move |this| this.why(&name, action)).await?,
            Request::Inspect { name } => self.blocking(move |this| this.inspect(&name)).await?,
            Request::Locate { container } => {
                let container = self.containers.find(&container)?;
                let record = container.record();
                serde_json::to_value(ContainerPaths {
                    running: container.is_running(),
                    log: container.dir().join("log.json"),
                    socket: record.socket,
                    id: record.id,
                })?
            }
            Request::CacheDrop { image } => {
                json!(self.blocking(move |this| this.cache_drop(image.as_deref())).await?)
            }
            Request::Reset { force } => {
                self.reset(force).await?;
                Value::Null
            }
            // All others are answered in `handle`.
            _ => return Err(Failure::daemon("the daemon does not know this request").into()),
        })
    }

    // Runs what reads or writes files away from the threads that answer requests.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || job(&this)).await.context("the daemon's own thread failed")?
    }

    async fn pull(
        self: &Arc<Self>,
        request: ImageRequest,
        hydrate: HydrateMode,
        progress: Arc<dyn Progress>,
    ) -> Result<Value> {
        let ready = self.images.ready(&request, &progress).await?;
        self.keep_profile(&ready);
        if hydrate == HydrateMode::Auto {
            // One layer of the image must not take the place of another, or none would ever be whole.
            ready.layers.iter().for_each(|layer| layer.touch());
            let _pins: Vec<_> = ready.layers.iter().map(lazyrun_fetcher::Layer::pin_filling).collect();
            self.images.hydrate(&ready.layers, &progress).await?;
        }
        let records = self.images.find(&ready.image.reference.to_string())?;
        let record = records.first().context("the image was removed meanwhile")?;
        Ok(serde_json::to_value(self.images.summary(record)?)?)
    }

    fn info(&self) -> Result<Info> {
        let all = self.containers.all();
        let running = all.iter().filter(|c| c.is_running()).count();
        let (registry_requests, registry_bytes) = self.images.traffic();
        Ok(Info {
            version: env!("CARGO_PKG_VERSION").into(),
            daemon_pid: std::process::id(),
            root: self.paths.root().to_owned(),
            mount_plan: self.plan.to_string(),
            bridge: self.network.bridge.clone(),
            nft_table: self.network.table.clone(),
            containers_running: running,
            containers_stopped: all.len() - running,
            images: self.images.records()?.len(),
            fuse_requests: self.flat.stats().total() + self.views.requests().total(),
            registry_requests,
            registry_bytes,
            faults: self.images.fetcher().stats().faults,
            daemon_rss: proc::resident(std::process::id()),
        })
    }

    fn inspect(&self, name: &str) -> Result<Value> {
        if let Ok(container) = self.containers.find(name) {
            let record = container.record();
            let bundle: Value = std::fs::read(container.dir().join("config.json"))
                .ok()
                .and_then(|b| serde_json::from_slice(&b).ok())
                .unwrap_or_default();
            let summary = container.summary();
            return Ok(json!({
                "Id": record.id,
                "Name": record.name,
                "Created": summary.created_at,
                "Image": record.image_id,
                "Args": record.args,
                "State": {
                    "Status": summary.state,
                    "Running": container.is_running(),
                    "Pid": if container.is_running() { record.pid.unwrap_or(0) } else { 0 },
                    "ExitCode": container.exit().map_or(0, |e| e.exit_code),
                    "OOMKilled": container.exit().is_some_and(|e| e.oom_killed),
                    "FinishedAt": container.exit().map(|e| e.exited_at),
                },
                "Config": { "Image": record.image, "Tty": record.terminal },
                "MountPlan": record.plan,
                "Layers": record.diff_ids,
                "NetworkSettings": {
                    "Mode": record.network,
                    "IPAddress": record.attachment.as_ref().map(|a| a.ip),
                    "Gateway": record.attachment.as_ref().map(|a| a.gateway),
                    "Ports": record.ports,
                },
                "LogPath": container.dir().join("log.json"),
                "Bundle": container.dir(),
                "Spec": bundle,
            }));
        }
        let no_such = |_| Failure::new(1, format!("no such container or image: {name}"));
        let records = self.images.find(name).map_err(no_such)?;
        let record = records.first().context("no record")?;
        let image = self.images.load(record)?;
        let config: Value = serde_json::from_slice(&image.config)?;
        Ok(json!({
            "Id": record.config,
            "RepoTags": records.iter().map(|r| r.reference.clone()).collect::<Vec<_>>(),
            "Digest": record.manifest,
            "PulledAt": record.pulled_at,
            "Summary": self.images.summary(record)?,
            "Layers": image.layers.iter().map(|l| json!({
                "Digest": l.digest, "DiffID": l.diff_id, "Size": l.size, "MediaType": l.media_type,
            })).collect::<Vec<_>>(),
            "Config": config,
        }))
    }

    fn remove_image(&self, name: &str, force: bool) -> Result<Vec<String>> {
        let records = self.images.find(name)?;
        let user = self
            .containers
            .all()
            .into_iter()
            .map(|c| c.record())
            .find(|c| records.iter().any(|r| r.config == c.image_id));
        if let Some(user) = user.filter(|_| !force) {
            return Err(Failure::new(
                1,
                format!(
                    "image {name} is used by container {}; remove that first, or use rmi --force",
                    user.name
                ),
            )
            .into());
        }
        let (mut removed, mut chains) = (Vec::new(), Vec::new());
        for record in &records {
            chains.extend(self.images.load(record).map(|image| image.diff_ids()));
            self.images.remove(record)?;
            self.seen.forget(&record.reference);
            removed.push(record.reference.clone());
        }
        self.hydration.forget(&removed)?;
        self.hydration.stop_layers(unwanted(&chains, &self.wanted_layers()?));
        self.collect_layers()?;
        Ok(removed)
    }

    // Deletes layers and views that no image and no mount has any more.
    pub(super) fn collect_layers(&self) -> Result<()> {
        self.sweep_mounts();
        let wanted = self.wanted_layers()?;
        let chains: Vec<Digest> = wanted.iter().filter_map(|of| super::views::chain_id(of)).collect();
        let wanted: BTreeSet<Digest> = wanted.into_iter().flatten().collect();
        let mut dropped = Vec::new();
        let busy = self.views.release(|view| !chains.contains(&view.id.chain));
        let store = self.images.fetcher().store();
        for id in store.list()? {
            if !wanted.contains(&id.diff_id) && !busy.contains(&id) {
                dropped.push(id);
            }
        }
        for id in dropped {
            self.images.fetcher().cancel(id);
            if let Some(name) = store.file_name(id) {
                self.service.forget(&name);
            }
            store.remove(id)?;
        }
        self.views.delete_except(&chains)?;
        self.profiles.delete_except(&chains)
    }

    // The honest cold start: local bytes go, indexes stay. Returns the bytes freed.
    fn cache_drop(&self, image: Option<&str>) -> Result<u64> {
        self.sweep_mounts();
        let records = match image {
            Some(name) => self.images.find(name)?,
            None => self.images.records()?,
        };
        let mut diff_ids = Vec::new();
        for record in &records {
            diff_ids.extend(self.images.load(record)?.diff_ids());
        }
        if image.is_none() {
            diff_ids.extend(self.snapshot_layers()?.into_iter().flatten());
        }
        let store = self.images.fetcher().store();
        let mut ids = store.list()?;
        ids.retain(|id| diff_ids.contains(&id.diff_id));
        self.hydration.give_up(&diff_ids)?;
        let busy = self.views.release(|view| view.layers.iter().any(|l| diff_ids.contains(&l.diff_id())));
        let mut freed = 0;
        for id in ids.into_iter().filter(|id| !busy.contains(id)) {
            self.images.fetcher().cancel(id);
            if let Some(layer) = store.by_id(id)? {
                let local = layer.local_bytes();
                match layer.forget() {
                    Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                        tracing::warn!(%error, "local bytes are not dropped");
                        continue;
                    }
                    result => result?,
                }
                freed += local;
                if let Err(error) = self.views.invalidate(&self.flat, &[layer.file_name()]) {
                    tracing::warn!(layer = %id, %error, "cached contents of a dropped layer may remain");
                }
            }
        }
        Ok(freed)
    }

    async fn reset(self: &Arc<Self>, force: bool) -> Result<()> {
        let running = self.containers.all().into_iter().filter(|c| c.is_running()).count();
        if running > 0 && !force {
            return Err(Failure::daemon(format!(
                "{running} container(s) still run; stop them, or use system reset --force"
            ))
            .into());
        }
        for container in self.containers.all() {
            self.remove(&container, true).await?;
        }
        self.unmount_all();
        self.blocking(|this| Ok(this.network.reset()?)).await
    }
}

async fn send_with_fd(stream: &mut UnixStream, value: Value, fd: &std::os::fd::OwnedFd) -> Result<()> {
    frame::send(stream, &Reply::Done { value, fd: true }).await?;
    let socket = stream.as_fd().try_clone_to_owned()?;
    stream.async_io(tokio::io::Interest::WRITABLE, || fds::send(socket.as_fd(), &[fd.as_fd()])).await?;
    Ok(())
}
