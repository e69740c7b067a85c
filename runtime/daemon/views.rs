//! Views: an image's merged tree, built once per chain and mounted once per node.

mod id;
mod pages;

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, bail};
use lazyrun_fetcher::{Fetcher, Layer, LayerPin};
use lazyrun_fs::erofs::{self, BUILDER_VERSION, DeviceSpec, LayerContent};
use lazyrun_fs::fuse::{self, FuseKind, Requests, ServeOptions, ServerHandle, StatsSnapshot};
use lazyrun_fs::mount::{self, OverlayOptions, Shown};
use lazyrun_fs::mounter::{Device, Mounter, Request};
use lazyrun_fs::plan::Plan;
use lazyrun_fs::view::View;
use lazyrun_index::{Digest, LayerId};

use id::kept_name;
pub use id::{KeptView, ViewId, chain_id, parse_kept_name};
pub use pages::ReadLayer;

use super::layer_service::{LayerService, inode_of};
use super::metrics::Counted;
use super::profile::{Devices, ShortReadahead, delete_others};
use super::union_views;
use crate::keeper::store::{Kept, KeptMount};

/// A mounted view. The mount is detached: it is in no mount table and goes when this and all mounts made of it go.
#[derive(Debug)]
pub struct MountedView {
    /// Which view it is.
    pub id: ViewId,
    /// The plan that serves it.
    pub plan: Plan,
    /// Root of the mount.
    pub tree: OwnedFd,
    /// Whether contents are read from local files without FUSE; then those must stay whole.
    pub direct: bool,
    /// The layers, bottom first.
    pub layers: Vec<Arc<Layer>>,
    // Nothing of what is read without FUSE may be evicted.
    _pins: Vec<LayerPin>,
    // During a start from this view.
    readahead: Mutex<Option<ShortReadahead>>,
    // The server of plans `overlay` and `fuse`, which have a FUSE connection for each view.
    _server: Option<ServerHandle>,
}

/// What a view is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A start that is recorded: contents are read through FUSE even when all of them are local, so that they can be
    /// seen.
    Recorded,
    /// A start.
    Start,
    /// Anything else.
    Use,
}

/// All views of an instance.
pub struct Views {
    pub(super) dir: PathBuf,
    mounter: Mounter,
    fetcher: Fetcher,
    service: Arc<LayerService>,
    flat: Arc<OwnedFd>,
    kept: Arc<Kept>,
    resend: bool,
    past_the_cache: bool,
    mounted: Mutex<HashMap<(ViewId, Plan), Arc<MountedView>>>,
    // One build or mount at a time: they are short, and two of one chain must not race.
    pub(super) building: tokio::sync::Mutex<()>,
    // The merged tree that somebody looked at last: several may want one at the same time.
    tree: Mutex<(Option<ViewId>, Weak<View>)>,
    // Of all servers of plan `overlay` together.
    requests: Arc<Requests>,
    counted: Counted,
}

impl Views {
    /// Views kept in `dir`, reading through the flat FUSE mount `flat`.
    pub fn new(
        dir: PathBuf,
        mounter: Mounter,
        fetcher: Fetcher,
        service: Arc<LayerService>,
        flat: Arc<OwnedFd>,
        kept: Arc<Kept>,
    ) -> Self {
        let building = tokio::sync::Mutex::new(());
        let (mounted, requests, counted) = (Mutex::default(), Arc::default(), Counted::default());
        let (tree, resend, past_the_cache) = (Mutex::default(), true, false);
        Self {
            dir,
            mounter,
            fetcher,
            service,
            flat,
            kept,
            resend,
            past_the_cache,
            mounted,
            building,
            tree,
            requests,
            counted,
        }
    }

    /// Whether the kernel is relied on to resend requests ([`ServeOptions::resend`]).
    pub fn resending(mut self, resend: bool) -> Self {
        self.resend = resend;
        self
    }

    /// Whether EROFS reads layer files past the page cache.
    pub fn past_the_cache(mut self, past: bool) -> Self {
        self.past_the_cache = past;
        self
    }

    /// Requests of the kernel to the servers of views.
    pub fn requests(&self) -> StatsSnapshot {
        self.requests.snapshot()
    }

    /// How long views took.
    pub fn counted(&self) -> &Counted {
        &self.counted
    }

    /// A detached mount of the view for one user: with a writable layer on top if there is one (upper and work
    /// directory). Blocks for some milliseconds.
    ///
    /// # Errors
    /// When the kernel refuses the mount, or the plan can't show other owners or labels.
    pub fn stack(
        &self,
        view: &MountedView,
        writable: Option<(PathBuf, PathBuf)>,
        shown: &Shown,
    ) -> Result<OwnedFd> {
        match (writable, &shown.idmap) {
            (Some(_), _) if view.plan == Plan::Fuse && *shown != Shown::default() => {
                bail!("plan fuse shows neither other owners nor labels: use --union erofs or --union overlay")
            }
            (Some((upper, work)), _) if view.plan == Plan::Fuse => {
                union_views::mount(view.tree.as_fd(), &upper, &work)
            }
            (Some((upper, work)), _) => {
                let options = OverlayOptions { shown: shown.clone(), ..OverlayOptions::default() };
                let request = Request::Overlay { upper, work, options };
                Ok(self.mounter.mount(&request, &[view.tree.as_fd()])?)
            }
            (None, Some(map)) => {
                Ok(self.mounter.mount(&Request::Idmap { map: map.clone() }, &[view.tree.as_fd()])?)
            }
            (None, None) if mount::shares_detached() => Ok(mount::clone_tree(view.tree.as_fd())?),
            (None, None) => Ok(view.tree.try_clone()?),
        }
    }

    /// Takes over a view that an earlier daemon had mounted.
    ///
    /// # Errors
    /// When its FUSE connection can't be served again.
    pub fn adopt(&self, kept: KeptView, layers: Vec<Arc<Layer>>, mount: KeptMount) -> Result<()> {
        let KeptView { id, plan, direct } = kept;
        let KeptMount { tree, dev, journal } = mount;
        let server = match dev {
            Some(dev) => Some(self.serve_view(&layers, &tree, dev, self.options(true, journal))?),
            None if plan == Plan::Erofs => None,
            None => bail!("its FUSE connection is lost"),
        };
        let pins = if direct { pin(&layers) } else { Vec::new() };
        let view = MountedView {
            _pins: pins,
            id: id.clone(),
            plan,
            tree,
            direct,
            layers,
            readahead: Mutex::default(),
            _server: server,
        };
        self.lock().insert((id, plan), Arc::new(view));
        Ok(())
    }

    /// The mounted view of these layers, which all have an index; built and mounted when it isn't yet.
    ///
    /// # Errors
    /// When the layers don't merge, or the kernel refuses the mount.
    pub async fn get(
        self: &Arc<Self>,
        layers: Vec<Arc<Layer>>,
        plan: Plan,
        purpose: Purpose,
    ) -> Result<Arc<MountedView>> {
        let id = ViewId::of(&layers);
        layers.iter().for_each(|layer| layer.touch());
        let _building = self.building.lock().await;
        if let Some(view) = self.reusable(&id, plan, purpose) {
            return Ok(view);
        }
        let this = Arc::clone(self);
        let began = std::time::Instant::now();
        let runtime = tokio::runtime::Handle::current();
        let of = tracing::Span::current();
        let mounted = tokio::task::spawn_blocking(move || {
            of.in_scope(|| match plan {
                Plan::Erofs => this.mount_erofs(id, layers, purpose, &runtime),
                Plan::Overlay | Plan::Fuse => this.mount_fuse(id, layers, plan),
            })
        });
        let view = Arc::new(mounted.await.context("mounting the view")??);
        self.lock().insert((view.id.clone(), plan), Arc::clone(&view));
        self.counted.view_mounts.observe(began.elapsed());
        Ok(view)
    }

    /// The merged tree of these layers. Blocks for some milliseconds, for a big image for some hundred.
    ///
    /// # Errors
    /// When the layers don't merge.
    pub fn tree(&self, layers: &[Arc<Layer>]) -> Result<Arc<View>> {
        let id = ViewId::of(layers);
        // Held while it is merged: who comes second waits for the first instead of merging as well.
        let mut last = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = last.1.upgrade().filter(|_| last.0.as_ref() == Some(&id)) {
            return Ok(tree);
        }
        let indexes: Vec<_> = layers.iter().map(|l| l.index()).collect();
        let tree = View::merge(&indexes).context("merging the image's layers");
        // Of a large image that is much, and only missing spans are looked up from now on.
        layers.iter().for_each(|layer| layer.index().let_go());
        let tree = Arc::new(tree?);
        *last = (Some(id), Arc::downgrade(&tree));
        Ok(tree)
    }

    // A view nobody uses is mounted anew once its layers are whole: then without FUSE.
    fn reusable(&self, id: &ViewId, plan: Plan, purpose: Purpose) -> Option<Arc<MountedView>> {
        if !mount::shares_detached() {
            return None;
        }
        let mut mounted = self.lock();
        let key = (id.clone(), plan);
        let view = mounted.get(&key)?;
        let unused = Arc::strong_count(view) == 1;
        let direct = purpose != Purpose::Recorded && view.layers.iter().all(|l| l.is_hydrated());
        if unused && plan == Plan::Erofs && view.direct != direct {
            let view = mounted.remove(&key)?;
            self.discard(&view);
            return None;
        }
        Some(Arc::clone(view))
    }

    /// The mounted views of a chain.
    pub fn of_chain(&self, chain: Digest) -> Vec<Arc<MountedView>> {
        self.lock().values().filter(|view| view.id.chain == chain).map(Arc::clone).collect()
    }

    /// Deletes the metadata images of a chain that nothing starts from any more.
    ///
    /// # Errors
    /// When the directory can't be read or a file can't be deleted.
    pub fn delete(&self, chain: Digest) -> Result<()> {
        let context = || format!("deleting views in {}", self.dir.display());
        for entry in std::fs::read_dir(&self.dir).with_context(context)? {
            let entry = entry.with_context(context)?;
            let rest =
                entry.file_name().to_str().and_then(|n| n.strip_prefix(&chain.hex()).map(str::to_owned));
            if rest.is_some_and(|rest| rest.starts_with(['.', '-'])) {
                std::fs::remove_file(entry.path()).with_context(context)?;
            }
        }
        Ok(())
    }

    /// Starts from the views of this chain are over.
    pub fn started(&self, chain: Digest) {
        for view in self.lock().values().filter(|view| view.id.chain == chain) {
            view.readahead.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// Takes down views that nobody uses and for which `which` says yes; returns the layer files of those in use.
    pub fn release(&self, mut which: impl FnMut(&MountedView) -> bool) -> Vec<LayerId> {
        let mut busy = Vec::new();
        self.lock().retain(|_, view| {
            if Arc::strong_count(view) > 1 {
                busy.extend(view.layers.iter().map(|l| l.id()));
                return true;
            }
            let keep = !which(view);
            if !keep {
                self.discard(view);
            }
            keep
        });
        busy
    }

    /// Deletes the metadata images of all chains but these, and those with adopted indexes that are not mounted. Those
    /// still mounted live on until unmounted.
    ///
    /// # Errors
    /// When the directory can't be read or a file can't be deleted.
    pub fn delete_except(&self, chains: &[Digest]) -> Result<()> {
        let mut ids: Vec<ViewId> = chains.iter().map(|c| ViewId::plain(*c)).collect();
        ids.extend(self.lock().keys().map(|(id, _)| id.clone()).filter(|id| chains.contains(&id.chain)));
        let keep: Vec<PathBuf> =
            ids.iter().flat_map(|id| [self.image_path(id), self.appendix_path(id)]).collect();
        delete_others(&self.dir, &keep)
    }

    fn mount_erofs(
        &self,
        id: ViewId,
        layers: Vec<Arc<Layer>>,
        purpose: Purpose,
        runtime: &tokio::runtime::Handle,
    ) -> Result<MountedView> {
        let image = self.image_path(&id);
        let appendix = self.appendix_path(&id);
        if !image.exists() {
            self.build(&layers, &image, &appendix, runtime)?;
        }
        // Held before the look: what is whole then stays whole.
        let mut pins = pin(&layers);
        let direct = purpose != Purpose::Recorded && layers.iter().all(|l| l.is_hydrated());
        if !direct {
            pins.clear();
        }
        let device = |layer: &Arc<Layer>| match direct {
            true => Device::Local(layer.data_path()),
            false => Device::Flat(layer.file_name().to_owned()),
        };
        let mut devices: Vec<Device> = layers.iter().map(device).collect();
        if appendix.exists() {
            devices.push(Device::Local(appendix));
        }
        let request = Request::Erofs { image, devices, directio: self.past_the_cache };
        // What is read ahead of a start would be taken for touched, or, where it is missing, be waited for.
        let before = (purpose != Purpose::Use && !direct).then(Devices::now);
        // The view reads layer files, which are read ahead as well: as far as it is allowed when they are opened.
        let while_opened = before.as_ref().and_then(|_| ShortReadahead::of_fuse(&*self.flat));
        let tree = self
            .mounter
            .mount(&request, &[self.flat.as_fd()])
            .with_context(|| format!("mounting the EROFS view of {}", id.chain))?;
        self.kept.keep(&kept_name(&id, Plan::Erofs, direct), &tree)?;
        drop(while_opened);
        let readahead = Mutex::new(before.and_then(|before| before.shorten_new()));
        Ok(MountedView { id, plan: Plan::Erofs, tree, direct, layers, _pins: pins, readahead, _server: None })
    }

    fn mount_fuse(&self, id: ViewId, layers: Vec<Arc<Layer>>, plan: Plan) -> Result<MountedView> {
        let mount =
            fuse::mount(FuseKind::View).with_context(|| format!("mounting the FUSE view of {}", id.chain))?;
        let server = self.serve_view(&layers, &mount.tree, mount.dev, self.options(false, None))?;
        self.kept.keep_served(&kept_name(&id, plan, false), &mount.tree, &server)?;
        Ok(MountedView {
            id,
            plan,
            tree: mount.tree,
            direct: false,
            layers,
            _pins: Vec::new(),
            readahead: Mutex::default(),
            _server: Some(server),
        })
    }

    fn serve_view(
        &self,
        layers: &[Arc<Layer>],
        tree: &OwnedFd,
        dev: OwnedFd,
        options: ServeOptions,
    ) -> Result<ServerHandle> {
        let view = self.tree(layers)?;
        let inodes = layers.iter().map(|l| inode_of(l.file_name())).collect();
        let server = fuse::ViewFs::new(view, Arc::clone(&self.service), inodes);
        let server = server.counting_in(Arc::clone(&self.requests));
        Ok(fuse::serve(server, tree.as_fd(), dev, options)?)
    }

    fn options(&self, adopt: bool, journal: Option<OwnedFd>) -> ServeOptions {
        ServeOptions { adopt, journal, resend: self.resend, ..ServeOptions::default() }
    }

    fn build(
        &self,
        layers: &[Arc<Layer>],
        image: &Path,
        appendix: &Path,
        runtime: &tokio::runtime::Handle,
    ) -> Result<()> {
        let started = std::time::Instant::now();
        let view = self.tree(layers)?;
        let devices: Vec<DeviceSpec> =
            layers.iter().map(|l| DeviceSpec::layer(l.file_name(), l.index().layer_size())).collect();
        let content = Content { layers, fetcher: &self.fetcher, runtime };
        let mut image_file = tempfile::NamedTempFile::new_in(&self.dir)?;
        let mut appendix_file = tempfile::NamedTempFile::new_in(&self.dir)?;
        let mut appendix_out = BufWriter::new(appendix_file.as_file_mut());
        let mut image_out = BufWriter::with_capacity(1 << 20, image_file.as_file_mut());
        let summary = erofs::write(&view, &devices, &content, &mut image_out, &mut appendix_out)
            .context("writing the EROFS view")?;
        image_out.flush()?;
        appendix_out.flush()?;
        drop((image_out, appendix_out));
        // The appendix first: an image that needs one never stands without it.
        if summary.appendix_size > 0 {
            appendix_file.as_file().sync_data()?;
            appendix_file.persist(appendix)?;
        }
        image_file.as_file().sync_data()?;
        image_file.persist(image)?;
        std::fs::File::open(&self.dir)?.sync_all()?;
        self.counted.view_builds.observe(started.elapsed());
        tracing::info!(view = %image.display(), inodes = view.len(), took = ?started.elapsed(), "view built");
        Ok(())
    }

    pub(super) fn image_path(&self, id: &ViewId) -> PathBuf {
        self.dir.join(format!("{}.v{BUILDER_VERSION}.erofs", id.file_stem()))
    }

    pub(super) fn appendix_path(&self, id: &ViewId) -> PathBuf {
        self.dir.join(format!("{}.v{BUILDER_VERSION}.appendix", id.file_stem()))
    }

    fn discard(&self, view: &MountedView) {
        let name = kept_name(&view.id, view.plan, view.direct);
        // A keeper that is gone keeps nothing, which is what is wanted.
        let _ = self.kept.discard_served(&name);
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(ViewId, Plan), Arc<MountedView>>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pin(layers: &[Arc<Layer>]) -> Vec<LayerPin> {
    layers.iter().map(Layer::pin_direct).collect()
}

struct Content<'a> {
    layers: &'a [Arc<Layer>],
    fetcher: &'a Fetcher,
    runtime: &'a tokio::runtime::Handle,
}

impl LayerContent for Content<'_> {
    fn read_at(&self, layer: u16, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let layer = self.layers.get(usize::from(layer)).ok_or(io::ErrorKind::NotFound)?;
        let bytes =
            self.runtime.block_on(self.fetcher.read(layer, offset, buf.len())).map_err(io::Error::other)?;
        if bytes.len() != buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.copy_from_slice(&bytes);
        Ok(())
    }
}
