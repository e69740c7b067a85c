//! The daemon: owns the store, the FUSE sessions, the views and the containers of one root directory.

mod blobs;
pub mod cache;
pub mod containers;
mod foresee;
pub mod hydration;
pub mod images;
mod indexes;
pub mod layer_service;
pub mod lies;
mod lifecycle;
mod loading;
mod memory;
pub mod meta;
pub mod metrics;
pub mod mounts;
pub mod page_cache;
pub mod profile;
mod progress;
mod run;
mod secrets;
pub mod seen;
mod server;
mod snapshots;
mod takeover;
mod union_views;
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

use crate::failure::{EXIT_LAZYRUN, Failure};
use crate::file_limit;
use crate::ipc::hydration::HydrateMode;
use crate::keeper::store::{Kept, take_mount};
use crate::keeper::{self, start};
use crate::network::Instance;
use crate::paths::Paths;
use crate::settings::Settings;
use crate::snapshotter::{self, Snapshots, SnapshotterOptions};
use containers::Containers;
use hydration::{Hydration, KeptLazy};
use images::Images;
use layer_service::LayerService;
use meta::Meta;
use mounts::Mounts;
use page_cache::PageCache;
use profile::Profiles;
use seen::Seen;
use views::{ViewId, Views};

pub use lifecycle::parse_signal;
use takeover::Ended;

// Two threads answer FUSE: each holds a request buffer, and more don't help one reader (measured).
const FUSE_THREADS: usize = 2;
// What the keeper calls the mount of the layer files.
const FLAT: &str = "flat";
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything the daemon of one root directory has.
pub struct Daemon {
    paths: Paths,
    probes: Probes,
    plan: Plan,
    images: Arc<Images>,
    hydration: Arc<Hydration>,
    views: Arc<Views>,
    service: Arc<LayerService>,
    profiles: Profiles,
    seen: Arc<Seen>,
    containers: Containers,
    mounts: Mounts,
    // Snapshots of containerd's, where there are any.
    snapshots: Option<Arc<Snapshots>>,
    network: Instance,
    stop: tokio::sync::Notify,
    // Another daemon is to take this one's place.
    hand_over: tokio::sync::Notify,
    kept: Arc<Kept>,
    // Serves the flat mount; ends when the daemon does.
    flat: fuse::ServerHandle,
}

/// Runs the daemon that a keeper started, until it is told to end. With options for it, it serves snapshots to
/// containerd as well.
pub fn main(paths: &Paths, settings: &Settings, snapshotter: Option<&SnapshotterOptions>) -> ExitCode {
    memory::stay_small();
    file_limit::raise();
    // SAFETY: the keeper placed these three descriptors before it started this process, and nothing has used
    // or closed them since.
    let (listener, store, ready) = unsafe {
        (
            OwnedFd::from_raw_fd(keeper::LISTENER_FD),
            OwnedFd::from_raw_fd(keeper::STORE_FD),
            OwnedFd::from_raw_fd(keeper::READY_FD),
        )
    };
    // SAFETY: as above; the keeper places this one when it gives the options.
    let containerd = snapshotter.map(|_| unsafe { OwnedFd::from_raw_fd(keeper::SNAPSHOTTER_FD) });
    for fd in [&listener, &store, &ready].into_iter().chain(&containerd) {
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
            let daemon = Daemon::start(paths.clone(), settings, store, snapshotter).await?;
            let containerd = containerd.map(|listener| snapshotter::serve(&daemon, listener)).transpose()?;
            let listener = std::os::unix::net::UnixListener::from(listener);
            let nothing = std::fs::File::open("/dev/null")?;
            let _ = write!(ready, "{}", start::READY);
            drop(ready.flush());
            drop(std::mem::replace(&mut ready, nothing));
            let ended = daemon.serve(listener).await;
            if let Some(containerd) = containerd {
                containerd.abort();
            }
            // Those that others take over from end at once: a read whose answer is dropped on the way out would fail, one
            // that is not answered at all is the next daemon's.
            match ended {
                Ok(Ended::InPeace) => anyhow::Ok(()),
                Ok(Ended::HandedOver) => std::process::exit(0),
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "the daemon ends");
                    std::process::exit(EXIT_LAZYRUN.into());
                }
            }
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
    async fn start(
        paths: Paths,
        settings: &Settings,
        store: OwnedFd,
        snapshotter: Option<&SnapshotterOptions>,
    ) -> Result<Arc<Self>> {
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
        let limits = cache::load_limits(&paths)?;
        layers.set_users(Arc::new(cache::NotYet));
        let fetcher = Fetcher::new(layers, FetchOptions { watch: watch.clone(), ..fetch_options(settings) });
        let (found_lies, lies) = tokio::sync::mpsc::channel(lies::QUEUE);
        let images = Arc::new(Images::new(meta, paths.blobs(), fetcher.clone(), found_lies, watch));
        images.add_recorded_sources()?;
        let limit = settings.hydrate_limit.and_then(|rate| rate.0);
        let hydration = Hydration::open(Arc::clone(&images), paths.hydration(), limit)?;
        let snapshots = Snapshots::open(&paths, &images, snapshotter)?.map(Arc::new);
        let cri = snapshotter.is_some_and(|options| options.cri);
        secrets::take_over(&mut before, &kept, images.keychain(), cri);
        let service = Arc::new(LayerService::new(fetcher.clone(), tokio::runtime::Handle::current()));
        let (flat_tree, flat) = serve_flat(&service, &kept, &mut before, settings.fuse_resend)?;
        let probes = probing.await.context("probing mount plans")??;
        let plan = plan::choose(&probes, None)?;
        let views = Views::new(
            paths.views(),
            mounter,
            fetcher,
            Arc::clone(&service),
            Arc::new(flat_tree),
            Arc::clone(&kept),
        )
        .resending(settings.fuse_resend)
        .past_the_cache(settings.page_cache == PageCache::Direct);
        let daemon = Arc::new(Self {
            network: Instance::for_root(paths.root()),
            profiles: Profiles::new(paths.profiles()),
            seen,
            paths,
            probes,
            plan,
            images,
            hydration,
            views: Arc::new(views),
            service,
            containers: Containers::default(),
            mounts: Mounts::default(),
            snapshots,
            stop: tokio::sync::Notify::new(),
            hand_over: tokio::sync::Notify::new(),
            kept,
            flat,
        });
        keeper::watchdog::feed(&daemon.kept, tokio::runtime::Handle::current())
            .context("starting the watchdog")?;
        lies::watch(&daemon, lies);
        if settings.page_cache != PageCache::Keep {
            page_cache::watch(&daemon);
        }
        daemon.recover(before).await?;
        daemon.guard_cache(limits);
        daemon.hydration.begin_all().await;
        if let Some(address) = metrics {
            daemon.serve_metrics(address, took_over).await?;
        }
        let this = Arc::clone(&daemon);
        tokio::task::spawn_blocking(move || this.remove_superseded());
        Ok(daemon)
    }

    // Containers and mounts of an earlier daemon, with the views that the keeper held for them. Of what is not taken over
    // nothing stays there: a daemon serves, so whoever waits for it would wait for ever.
    async fn recover(self: &Arc<Self>, mut before: BTreeMap<String, OwnedFd>) -> Result<()> {
        let views: Vec<_> =
            before.keys().filter_map(|name| Some((name.clone(), views::parse_kept_name(name)?))).collect();
        for (name, kept) in views {
            let Some(mount) = take_mount(&mut before, &name) else { continue };
            let served = mount.dev.is_some();
            let tree = mount.tree.try_clone()?;
            let adopted = match self.layers_of_view(&kept.id)? {
                Some(layers) => self.views.adopt(kept, layers, mount),
                None => Err(anyhow::anyhow!("its layers are not known")),
            };
            if let Err(error) = adopted {
                tracing::warn!(view = name, error = format!("{error:#}"), "a view can't be taken over");
                if served && let Err(error) = fuse::abort(tree.as_fd()) {
                    tracing::warn!(view = name, %error, "reads of a view that is lost may hang");
                }
                self.kept.discard_served(&name)?;
            }
        }
        for name in before.keys() {
            tracing::warn!(name, "what the keeper holds under this name can't be used");
            self.kept.discard(name)?;
        }
        drop(before);
        self.recover_snapshots().await?;
        self.recover_containers().await?;
        self.recover_mounts().await
    }

    fn layers_of_view(&self, id: &ViewId) -> Result<Option<Vec<Arc<Layer>>>> {
        for record in self.images.records()? {
            let Ok(image) = self.images.load(&record) else { continue };
            let diff_ids = image.diff_ids();
            if views::chain_id(&diff_ids) == Some(id.chain) {
                let layers = self.known_layers(&id.layer_ids(&diff_ids));
                return Ok(layers.filter(|layers| ViewId::of(layers) == *id));
            }
        }
        // An image can be removed while containers of it run.
        for diff_ids in self.recorded_uses() {
            if views::chain_id(&diff_ids) == Some(id.chain) {
                let layers = self.known_layers(&id.layer_ids(&diff_ids));
                return Ok(layers.filter(|layers| ViewId::of(layers) == *id));
            }
        }
        let of_snapshots = self.snapshot_layers()?;
        let diff_ids = of_snapshots.iter().find(|diff_ids| views::chain_id(diff_ids) == Some(id.chain));
        let layers = diff_ids.and_then(|diff_ids| self.known_layers(&id.layer_ids(diff_ids)));
        Ok(layers.filter(|layers| ViewId::of(layers) == *id))
    }

    /// Layers of the containers and mounts that earlier daemons recorded.
    fn recorded_uses(&self) -> Vec<Vec<Digest>> {
        #[derive(serde::Deserialize)]
        struct Uses {
            diff_ids: Vec<Digest>,
        }
        let dirs = [(self.paths.containers(), "container.json"), (self.paths.mounts(), "mount.json")];
        let files = dirs.into_iter().flat_map(|(dir, name)| {
            std::fs::read_dir(dir).into_iter().flatten().flatten().map(move |entry| entry.path().join(name))
        });
        let read = |path| serde_json::from_slice::<Uses>(&std::fs::read(path).ok()?).ok();
        files.filter_map(read).map(|uses| uses.diff_ids).collect()
    }

    /// Keeps the image of these layers lazy for a container or mount that asks for it.
    fn keep_lazy(&self, mode: HydrateMode, user: &str, layers: &[Arc<Layer>]) -> Option<KeptLazy> {
        let chain = views::chain_id(&layers.iter().map(|l| l.diff_id()).collect::<Vec<_>>())?;
        (mode == HydrateMode::Never).then(|| self.hydration.keep_lazy(user, chain))
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

fn fetch_options(settings: &Settings) -> FetchOptions {
    FetchOptions { fault_timeout: settings.fault_timeout(), ..FetchOptions::default() }
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
    resend: bool,
) -> Result<(OwnedFd, fuse::ServerHandle)> {
    let server = fuse::Flat::new(Arc::clone(service));
    let options = |adopt, journal| ServeOptions { adopt, journal, resend, threads: FUSE_THREADS };
    let mount = take_mount(before, FLAT).and_then(|mount| Some((mount.tree, mount.dev?, mount.journal)));
    // One whose connection was aborted is lost; what comes needs another.
    if let Some((tree, dev, journal)) = mount.filter(|(_, dev, _)| fuse::is_connected(dev.as_fd())) {
        let handle = fuse::serve(server, tree.as_fd(), dev, options(true, journal))
            .context("taking over the layer files")?;
        return Ok((tree, handle));
    }
    // Nothing of the lost one is to be taken for the new one's.
    kept.discard_served(FLAT)?;
    let mount = fuse::mount(FuseKind::Flat).context("mounting the layer files")?;
    let handle = fuse::serve(server, mount.tree.as_fd(), mount.dev, options(false, None))
        .context("serving the layer files")?;
    kept.keep_served(FLAT, &mount.tree, &handle)?;
    Ok((mount.tree, handle))
}
