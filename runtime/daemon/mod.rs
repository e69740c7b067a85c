//! The daemon: owns the store, the FUSE sessions, the views and the containers of one root directory.

pub mod containers;
mod foresee;
pub mod images;
mod indexes;
pub mod layer_service;
pub mod lies;
mod lifecycle;
pub mod meta;
pub mod metrics;
pub mod mounts;
pub mod profile;
mod run;
pub mod seen;
mod server;
pub mod views;
pub mod why;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use lazyrun_fetcher::observe::Watch;
use lazyrun_fetcher::{FetchOptions, Fetcher, Layer, LayerStore};
use lazyrun_fs::fuse::{self, FuseKind, ServeOptions};
use lazyrun_fs::mounter::Mounter;
use lazyrun_fs::plan::{self, Plan, Probes};
use lazyrun_index::{Digest, LayerId};

use crate::failure::Failure;
use crate::keeper::settings::DaemonSettings;
use crate::keeper::store::Kept;
use crate::keeper::{self, start};
use crate::network::Instance;
use crate::paths::Paths;
use containers::Containers;
use images::Images;
use layer_service::LayerService;
use meta::Meta;
use mounts::Mounts;
use profile::Profiles;
use seen::Seen;
use views::{ViewId, Views};

pub use lifecycle::parse_signal;

// Two threads answer FUSE: each holds a request buffer, and more don't help one reader (measured).
const FUSE_THREADS: usize = 2;
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything the daemon of one root directory has.
pub struct Daemon {
    paths: Paths,
    probes: Probes,
    plan: Plan,
    images: Arc<Images>,
    views: Arc<Views>,
    service: Arc<LayerService>,
    profiles: Profiles,
    seen: Arc<Seen>,
    containers: Containers,
    mounts: Mounts,
    network: Instance,
    stop: tokio::sync::Notify,
    // Serves the flat mount; ends when the daemon does.
    flat: fuse::ServerHandle,
}

/// Runs the daemon that a keeper started, until it is told to end.
pub fn main(paths: &Paths, settings: &DaemonSettings) -> ExitCode {
    // SAFETY: the keeper placed these three descriptors before it started this process, and nothing has used
    // or closed them since.
    let (listener, store, ready) = unsafe {
        (
            OwnedFd::from_raw_fd(keeper::LISTENER_FD),
            OwnedFd::from_raw_fd(keeper::STORE_FD),
            OwnedFd::from_raw_fd(keeper::READY_FD),
        )
    };
    for fd in [&listener, &store, &ready] {
        let _ = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
    }
    let mut ready = std::fs::File::from(ready);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build();
    let served = runtime.context("starting the runtime").and_then(|runtime| {
        runtime.block_on(async {
            let daemon = Daemon::start(paths.clone(), store, settings).await?;
            let listener = std::os::unix::net::UnixListener::from(listener);
            let _ = write!(ready, "{}", start::READY);
            drop(ready.flush());
            drop(std::mem::replace(&mut ready, std::fs::File::open("/dev/null")?));
            daemon.serve(listener).await
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = Failure::from(error);
            tracing::error!(%error, "the daemon ends");
            let _ = write!(ready, "{error}");
            // Told to the caller: starting again would only say it again.
            ExitCode::SUCCESS
        }
    }
}

impl Daemon {
    async fn start(paths: Paths, store: OwnedFd, settings: &DaemonSettings) -> Result<Arc<Self>> {
        let address = settings.metrics_address.as_deref().filter(|address| !address.is_empty());
        let metrics = address.map(str::parse::<metrics::Address>).transpose()?;
        let (kept, mut before) = Kept::connect(store.into()).context("taking over from the keeper")?;
        let kept = Arc::new(kept);
        let took_over = !before.is_empty();
        let mounter = Mounter::new("/proc/self/exe".into());
        let probing = tokio::task::spawn_blocking({
            let (mounter, root) = (mounter.clone(), paths.root().to_owned());
            move || mounter.probe(&root)
        });
        let meta = Meta::open(&paths.meta())?;
        let layers = LayerStore::open(paths.root()).context("opening the layer store")?;
        let seen = Arc::new(Seen::new(paths.starts()));
        let watch = Watch::new(Arc::clone(&seen) as _);
        let fetcher = Fetcher::new(layers, FetchOptions { watch: watch.clone(), ..FetchOptions::default() });
        let (found_lies, lies) = tokio::sync::mpsc::channel(lies::QUEUE);
        let images = Arc::new(Images::new(meta, paths.blobs(), fetcher.clone(), found_lies, watch));
        images.add_recorded_sources()?;
        let service = Arc::new(LayerService::new(fetcher.clone(), tokio::runtime::Handle::current()));
        let (flat_tree, flat) = serve_flat(&service, &kept, &mut before)?;
        let probes = probing.await.context("probing mount plans")??;
        let plan = plan::choose(&probes, None)?;
        let views =
            Views::new(paths.views(), mounter, fetcher, Arc::clone(&service), Arc::new(flat_tree), kept);
        let daemon = Arc::new(Self {
            network: Instance::for_root(paths.root()),
            profiles: Profiles::new(paths.profiles()),
            seen,
            paths,
            probes,
            plan,
            images,
            views: Arc::new(views),
            service,
            containers: Containers::default(),
            mounts: Mounts::default(),
            stop: tokio::sync::Notify::new(),
            flat,
        });
        lies::watch(&daemon, lies);
        daemon.recover(before).await?;
        if let Some(address) = metrics {
            daemon.serve_metrics(address, took_over).await?;
        }
        let this = Arc::clone(&daemon);
        tokio::task::spawn_blocking(move || this.remove_superseded());
        Ok(daemon)
    }

    // Containers and mounts of an earlier daemon, with the views that the keeper held for them.
    async fn recover(self: &Arc<Self>, mut before: BTreeMap<String, OwnedFd>) -> Result<()> {
        let names: Vec<String> =
            before.keys().filter(|n| views::parse_kept_name(n).is_some()).cloned().collect();
        for name in names {
            let Some(tree) = before.remove(&name) else { continue };
            let dev = before.remove(&format!("{name}:dev"));
            let Some(kept) = views::parse_kept_name(&name) else { continue };
            let Some(layers) = self.layers_of_view(&kept.id)? else { continue };
            if let Err(error) = self.views.adopt(&name, layers, tree, dev) {
                tracing::warn!(view = name, %error, "a view can't be taken over");
            }
        }
        self.recover_containers().await?;
        self.recover_mounts().await
    }

    fn layers_of_view(&self, id: &ViewId) -> Result<Option<Vec<Arc<Layer>>>> {
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            let diff_ids: Vec<Digest> = image.layers.iter().map(|l| l.diff_id).collect();
            if views::chain_id(&diff_ids) == Some(id.chain) {
                let layers = self.known_layers(&id.layer_ids(&diff_ids));
                return Ok(layers.filter(|layers| ViewId::of(layers) == *id));
            }
        }
        Ok(None)
    }

    /// These layer files, if all are here.
    fn known_layers(&self, ids: &[LayerId]) -> Option<Vec<Arc<Layer>>> {
        ids.iter().map(|id| self.images.fetcher().store().by_id(*id).ok().flatten()).collect()
    }

    // Layer files that nothing starts from any more and no view uses.
    fn remove_superseded(&self) {
        let busy = self.views.release(|view| view.layers.iter().any(|l| l.adopted_from().is_some()));
        match self.images.fetcher().store().remove_superseded(|id| busy.contains(&id)) {
            Ok(removed) => {
                for name in removed {
                    self.service.forget(&name);
                    tracing::info!(layer = name, "superseded layer file removed");
                }
            }
            Err(error) => tracing::warn!(%error, "superseded layer files can't be removed"),
        }
    }

    /// The plan a request gets.
    fn plan_for(&self, forced: Option<Plan>) -> Result<Plan> {
        match forced {
            None => Ok(self.plan),
            forced => Ok(plan::choose(&self.probes, forced)?),
        }
    }

    /// Ends all containers and mounts.
    async fn end_all(self: &Arc<Self>) {
        let running: Vec<_> = self.containers.all().into_iter().filter(|c| c.is_running()).collect();
        let stopping = running.iter().map(|c| self.stop(c, STOP_TIMEOUT));
        for stopped in futures_util::future::join_all(stopping).await {
            if let Err(error) = stopped {
                tracing::warn!(%error, "a container can't be stopped");
            }
        }
        self.unmount_all();
    }
}

/// The layer files of a record; early records have no names of files, only diffIDs.
fn layer_ids(layers: &[LayerId], diff_ids: &[Digest]) -> Vec<LayerId> {
    if layers.len() == diff_ids.len() {
        return layers.to_vec();
    }
    diff_ids.iter().copied().map(LayerId::tar).collect()
}

fn serve_flat(
    service: &Arc<LayerService>,
    kept: &Kept,
    before: &mut BTreeMap<String, OwnedFd>,
) -> Result<(OwnedFd, fuse::ServerHandle)> {
    let server = fuse::Flat::new(Arc::clone(service));
    let options = |adopt| ServeOptions { adopt, threads: FUSE_THREADS };
    if let (Some(tree), Some(dev)) = (before.remove("flat"), before.remove("flat:dev")) {
        let handle =
            fuse::serve(server, tree.as_fd(), dev, options(true)).context("taking over the layer files")?;
        return Ok((tree, handle));
    }
    let mount = fuse::mount(FuseKind::Flat).context("mounting the layer files")?;
    let handle = fuse::serve(server, mount.tree.as_fd(), mount.dev, options(false))
        .context("serving the layer files")?;
    kept.keep("flat", &mount.tree)?;
    kept.keep("flat:dev", &handle.device_fd()?)?;
    Ok((mount.tree, handle))
}
