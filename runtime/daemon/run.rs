//! Making and starting a container: image, view, network and bundle come together here.

use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use lazyrun_fetcher::{Progress, ResolvedImage};
use lazyrun_fs::mount::Shown;
use lazyrun_fs::plan::Plan;
use oci_spec::image::ImageConfiguration;

use super::Daemon;
use super::containers::{Container, Holds, Record, write_record};
use super::views::MountedView;
use super::why::Recorder;
use crate::container::config::{ShimConfig, StatusLine};
use crate::container::spec;
use crate::failure::Failure;
use crate::file_limit;
use crate::ipc::fds;
use crate::ipc::protocol::{NetworkMode, RunRequest, Started};
use crate::ipc::why;
use crate::network::{self, Attachment};
use crate::{names, proc};

const ROOTFS_FD: RawFd = 3;
const NETNS_FD: RawFd = 4;
const STATUS_FD: RawFd = 5;

// A network that is taken down again unless the container it was made for takes it over.
struct Network<'a> {
    daemon: &'a Arc<Daemon>,
    id: String,
    netns: Option<OwnedFd>,
    attachment: Option<Attachment>,
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        if let Some(attachment) = self.attachment.take() {
            let (daemon, id) = (Arc::clone(self.daemon), self.id.clone());
            tokio::task::spawn_blocking(move || daemon.detach_network(&id, &attachment));
        }
    }
}

// A container directory that is deleted unless the container came to be.
struct HalfMade<'a>(Option<&'a Path>);

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        if let Some(dir) = self.0 {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

impl Daemon {
    /// Makes a container and starts its shim. With `wait_attach` its command starts once a client has attached;
    /// otherwise it runs when this returns.
    ///
    /// # Errors
    /// Anything on the way, with nothing left behind.
    pub async fn run(self: &Arc<Self>, request: RunRequest, progress: &Arc<dyn Progress>) -> Result<Started> {
        let name = self.containers.reserve(request.name.as_deref())?;
        let id = names::id();
        let plan = self.plan_for(request.plan)?;
        let what = why::Started::Container { id: id.clone(), name: name.as_str().to_owned() };
        let start = self.seen.starts.begin(&request.image.reference, what);
        let started = start.watch(self.make(&start, &id, name.as_str(), plan, request, progress)).await?;
        start.started();
        Ok(started)
    }

    async fn make(
        self: &Arc<Self>,
        start: &Recorder,
        id: &str,
        name: &str,
        plan: Plan,
        request: RunRequest,
        progress: &Arc<dyn Progress>,
    ) -> Result<Started> {
        // The network is made while the image comes.
        let image = async {
            let ready = self.images.found(&request.image, progress).await?;
            self.uses(start, &ready);
            let kept_lazy = self.keep_lazy(request.hydrate, id, &ready.layers);
            let purpose = self.foresee(&ready, &request, start)?;
            let (view, ()) = tokio::try_join!(
                self.views.get(ready.layers.clone(), plan, purpose),
                self.images.record_apart(&ready.image, &request.image.registry)
            )?;
            self.seen.mounted(start, &view);
            start.phase("network");
            anyhow::Ok((ready.image, view, kept_lazy))
        };
        let network = async {
            let began = Instant::now();
            let made = self.prepare_network(id, &request).await;
            start.beside("network", began);
            made
        };
        let ((image, view, kept_lazy), mut network) = tokio::try_join!(image, network)?;
        start.phase("bundle");
        let dir = self.paths.containers().join(id);
        let mut half_made = HalfMade(Some(&dir));
        let record = self.write_bundle(&dir, id, name, &request, &image, &view, &network)?;
        start.phase("rootfs");
        let rootfs = self.mount_rootfs(&dir, &view, request.options.read_only).await?;
        start.phase("shim");
        let shim = self.spawn_shim(&dir, &request, &record, rootfs.as_fd(), network.netns.as_ref())?;
        let holds = Holds { view: Some(Arc::clone(&view)), kept_lazy };
        let started = self.adopt_shim(&dir, record, shim, &mut network, holds).await?;
        half_made.0 = None;
        Ok(started)
    }

    async fn prepare_network<'a>(self: &'a Arc<Self>, id: &str, request: &RunRequest) -> Result<Network<'a>> {
        let mut network = Network { daemon: self, id: id.to_owned(), netns: None, attachment: None };
        if request.network == NetworkMode::Host {
            return Ok(network);
        }
        let (this, id, ports) = (Arc::clone(self), id.to_owned(), request.ports.clone());
        let bridged = request.network == NetworkMode::Bridge;
        let made = tokio::task::spawn_blocking(move || {
            let netns = network::new_netns()?;
            let attachment = if bridged {
                Some(this.network.attach(&id, netns.as_fd(), &ports)?)
            } else {
                network::loopback_up(netns.as_fd())?;
                None
            };
            anyhow::Ok((netns, attachment))
        });
        let (netns, attachment) = made.await.context("preparing the network")??;
        network.netns = Some(netns);
        network.attachment = attachment;
        Ok(network)
    }

    #[expect(clippy::too_many_arguments, reason = "this is where everything a container is made of meets")]
    fn write_bundle(
        &self,
        dir: &Path,
        id: &str,
        name: &str,
        request: &RunRequest,
        image: &ResolvedImage,
        view: &MountedView,
        network: &Network<'_>,
    ) -> Result<Record> {
        let config =
            ImageConfiguration::from_reader(image.config.as_ref()).context("reading the image's config")?;
        for sub in ["rootfs", "upper", "work"] {
            std::fs::create_dir_all(dir.join(sub)).with_context(|| format!("creating {}", dir.display()))?;
        }
        let hostname = match (&request.options.hostname, &request.network) {
            (Some(name), _) => name.clone(),
            (None, NetworkMode::Host) => nix::unistd::gethostname()?.to_string_lossy().into_owned(),
            (None, _) => id[..12].to_owned(),
        };
        let host = request.network == NetworkMode::Host;
        let own = network
            .attachment
            .as_ref()
            .map(|a| network::HostEntry { ip: a.ip.into(), names: vec![hostname.clone(), name.to_owned()] });
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let files = [
            ("hostname", format!("{hostname}\n")),
            ("hosts", if host { read("/etc/hosts") } else { network::hosts(own.as_slice()) }),
            ("resolv.conf", if host { read("/etc/resolv.conf") } else { network::host_resolv_conf() }),
        ];
        for (file, text) in files {
            std::fs::write(dir.join(file), text)
                .with_context(|| format!("writing {file} of the container"))?;
        }
        let mut options = request.options.clone();
        options.hostname = Some(hostname);
        let paths = spec::BundlePaths {
            rootfs: "rootfs".into(),
            hostname: Some(dir.join("hostname")),
            hosts: Some(dir.join("hosts")),
            resolv_conf: Some(dir.join("resolv.conf")),
            cgroup: Some(cgroup_of(id)),
        };
        let bundle = spec::generate(&config, &options, &paths)?;
        let args = bundle.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
        std::fs::write(dir.join("config.json"), serde_json::to_vec(&bundle)?)
            .context("writing config.json")?;
        Ok(Record {
            id: id.to_owned(),
            name: name.to_owned(),
            image: request.image.reference.clone(),
            image_id: image.config_digest,
            diff_ids: view.layers.iter().map(|l| l.diff_id()).collect(),
            layers: view.layers.iter().map(|l| l.id()).collect(),
            plan: view.plan.to_string(),
            args,
            created: std::time::SystemTime::now(),
            network: request.network.clone(),
            attachment: network.attachment.clone(),
            ports: request.ports.clone(),
            remove: request.remove,
            terminal: request.options.tty,
            stop_signal: config.config().as_ref().and_then(|c| c.stop_signal().clone()),
            shim: None,
            pid: None,
            socket: self.paths.shim_socket(id),
            hydrate: request.hydrate,
        })
    }

    async fn mount_rootfs(&self, dir: &Path, view: &Arc<MountedView>, read_only: bool) -> Result<OwnedFd> {
        let writable = (!read_only).then(|| (dir.join("upper"), dir.join("work")));
        let (views, view) = (Arc::clone(&self.views), Arc::clone(view));
        let mounted = tokio::task::spawn_blocking(move || views.stack(&view, writable, &Shown::default()));
        mounted.await.context("mounting the container's root")?.context("mounting the container's root")
    }

    fn spawn_shim(
        &self,
        dir: &Path,
        request: &RunRequest,
        record: &Record,
        rootfs: BorrowedFd<'_>,
        netns: Option<&OwnedFd>,
    ) -> Result<(proc::Identity, std::fs::File)> {
        let config = ShimConfig {
            id: record.id.clone(),
            dir: dir.to_owned(),
            socket: record.socket.clone(),
            terminal: record.terminal,
            open_stdin: request.open_stdin,
            wait_attach: request.wait_attach,
            stop_signal: record.stop_signal.clone(),
            log: Some(dir.join("log.json")),
            runtime: request.runtime.clone(),
            rootfs_fd: Some(ROOTFS_FD),
            netns_fd: netns.map(|_| NETNS_FD),
            status_fd: Some(STATUS_FD),
            cgroup: Some(cgroup_of(&record.id)),
        };
        let path = dir.join("shim.json");
        std::fs::write(&path, serde_json::to_vec(&config)?).context("writing shim.json")?;
        let (status, status_in) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let shim_log = std::fs::File::create(dir.join("shim.log"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lazyrun").arg("shim").arg("--config").arg(&path).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(shim_log);
        let mut placed = vec![(rootfs, ROOTFS_FD), (status_in.as_fd(), STATUS_FD)];
        if let Some(netns) = netns {
            placed.push((netns.as_fd(), NETNS_FD));
        }
        fds::place(&mut command, &placed)?;
        fds::own_session(&mut command);
        // Containers are not to see how many the daemon needs.
        file_limit::give_back(&mut command);
        let child = command.spawn().context("starting the shim")?;
        drop(command);
        let shim = proc::Identity::of(child.id()).context("the shim ended at once; see shim.log")?;
        proc::reap(child).context("watching the shim")?;
        Ok((shim, std::fs::File::from(status)))
    }

    // Waits for the shim's word: that the command runs, or, with a client to come, that all is prepared.
    async fn adopt_shim(
        self: &Arc<Self>,
        dir: &Path,
        mut record: Record,
        (shim, status): (proc::Identity, std::fs::File),
        network: &mut Network<'_>,
        holds: Holds,
    ) -> Result<Started> {
        let mut unwanted = KillOnDrop(Some(shim));
        record.shim = Some(shim);
        write_record(dir, &record)?;
        let said = tokio::task::spawn_blocking(move || {
            let mut said = String::new();
            std::io::BufReader::new(status).read_line(&mut said).map(|_| said)
        });
        let said = said.await.context("waiting for the shim")??;
        match serde_json::from_str(said.trim()) {
            Ok(StatusLine::Started { pid }) => record.pid = u32::try_from(pid).ok(),
            Ok(StatusLine::Failed { error, code }) => return Err(Failure::new(code, error).into()),
            Err(_) => {
                let log = std::fs::read_to_string(dir.join("shim.log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing").to_owned();
                return Err(Failure::daemon(format!("the container's shim ended too early: {last}")).into());
            }
        }
        write_record(dir, &record)?;
        let started =
            Started { id: record.id.clone(), name: record.name.clone(), socket: record.socket.clone() };
        let container = Arc::new(Container::new(dir.to_owned(), record, holds, false));
        unwanted.0 = None;
        network.attachment = None;
        self.containers.insert(Arc::clone(&container));
        self.watch(container);
        Ok(started)
    }
}

// A shim that goes, with its container, unless somebody is there to look after it.
struct KillOnDrop(Option<proc::Identity>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(shim) = self.0 {
            shim.signal(libc::SIGKILL);
        }
    }
}

/// Where a container's cgroup is, from the root of each hierarchy.
fn cgroup_of(id: &str) -> String {
    format!("/lazyrun/{id}")
}
