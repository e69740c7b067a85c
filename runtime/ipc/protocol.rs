//! What the command line may ask of the daemon, and what comes back.

use std::path::PathBuf;

use lazyrun_fetcher::{HostFiles, ProviderFiles, TrustMode};
use lazyrun_fs::mount::Shown;
use lazyrun_fs::plan::Plan;
use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use super::containerd::FetchRequest;
use super::hydration::{HydrateMode, HydrationAction};
use super::indexes::IndexAction;
use super::profiles::ProfileAction;
use super::system::SystemAction;
use super::why::WhyAction;
use crate::container::spec::RunOptions;
use crate::network::PortMapping;

/// How a registry is to be talked to, as the caller's environment and flags say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegistryOptions {
    /// The caller's docker `config.json`, or what takes its place.
    pub docker_config: Option<PathBuf>,
    /// Further files with the caller's credentials (`auth.json`), looked into after that one.
    #[serde(default)]
    pub auth_files: Vec<PathBuf>,
    /// The kubelet's credential providers, asked when no file has a credential.
    #[serde(default)]
    pub providers: Option<Box<ProviderFiles>>,
    /// Hosts whose certificate isn't checked and which may speak plain HTTP.
    pub insecure: Vec<String>,
    /// Files that say how registries are talked to.
    #[serde(default)]
    pub hosts: HostFiles,
    /// Whether pull secrets that pods came with are used: not for commands of users, and neither on disk nor said by them.
    #[serde(skip)]
    pub pull_secrets: bool,
}

/// When an image's manifest is asked of the registry (`--pull`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum PullPolicy {
    /// Only when the image isn't known here.
    #[default]
    Missing,
    /// Every time.
    Always,
    /// Not at all.
    Never,
}

/// What a container's network is made of (`--network`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkMode {
    /// The instance's own bridge with NAT.
    #[default]
    Bridge,
    /// The host's network namespace.
    Host,
    /// A network namespace with nothing but a loopback device.
    None,
}

/// Which indexes that were made elsewhere may be used (`--index-trust`, `--index-digest`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexOptions {
    /// The trust mode; when absent the reference decides ([`TrustMode::default_for`]).
    pub trust: Option<TrustMode>,
    /// The artifact to take, by the digest of its manifest, and no other.
    pub digest: Option<Digest>,
}

/// An image and how to get at it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageRequest {
    /// The reference as the user typed it.
    pub reference: String,
    /// When to ask the registry.
    pub pull: PullPolicy,
    /// How to ask it.
    pub registry: RegistryOptions,
    /// Whose indexes to use.
    pub index: IndexOptions,
}

/// A container to make and start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunRequest {
    /// What it starts from.
    pub image: ImageRequest,
    /// Its name; made up when absent.
    pub name: Option<String>,
    /// Everything that ends up in its OCI spec.
    pub options: RunOptions,
    /// Its network.
    pub network: NetworkMode,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Remove it when it ends.
    pub remove: bool,
    /// Wait with the start until a client has attached to the shim.
    pub wait_attach: bool,
    /// Keep its standard input open.
    pub open_stdin: bool,
    /// The mount plan the user forces.
    pub plan: Option<Plan>,
    /// An OCI runtime to use in place of the built-in runner.
    pub runtime: Option<PathBuf>,
    /// Whether the rest of the image is fetched in the background.
    pub hydrate: HydrateMode,
}

/// A request; each connection carries one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// The daemon's state, as [`Info`].
    Info,
    /// Makes and starts a container; answers [`Started`].
    Run(Box<RunRequest>),
    /// Makes the image wholly local, or just ready to be started from; answers [`ImageSummary`].
    Pull {
        /// The image.
        image: ImageRequest,
        /// Whether all of it.
        hydrate: HydrateMode,
    },
    /// Does something about hydration; [`HydrationAction`] says what it answers.
    Hydrate(HydrationAction),
    /// Fills containerd's content store; answers a list of [`Fetched`](super::containerd::Fetched).
    ContainerdFetch(FetchRequest),
    /// Does something with the indexes of an image's layers; [`IndexAction`] says what it answers.
    Index {
        /// The image.
        image: ImageRequest,
        /// What to do.
        action: IndexAction,
    },
    /// Does something with the profile of an image; [`ProfileAction`] says what it answers.
    Profile {
        /// The image.
        image: ImageRequest,
        /// What to do.
        action: ProfileAction,
    },
    /// All images, as a list of [`ImageSummary`].
    Images,
    /// Which hosts would be asked for an image, as a list of [`HostReport`](lazyrun_fetcher::HostReport).
    Hosts {
        /// A reference of the registry or image.
        reference: String,
        /// How the registry is talked to.
        registry: RegistryOptions,
    },
    /// Removes an image by reference or digest prefix.
    RemoveImage {
        /// Reference, digest or its prefix.
        image: String,
        /// Also when containers use it.
        force: bool,
    },
    /// Mounts an image; answers [`Mounted`] with the detached mount's descriptor, then waits for the
    /// caller's word (any frame) that it is attached.
    Mount {
        /// The image.
        image: ImageRequest,
        /// Where the caller will attach it.
        target: PathBuf,
        /// The forced plan.
        plan: Option<Plan>,
        /// With a writable layer on top.
        writable: bool,
        /// As whose and as what files are shown.
        #[serde(default)]
        shown: Shown,
        /// Whether the rest of the image is fetched in the background.
        hydrate: HydrateMode,
    },
    /// Forgets a mount that the caller has unmounted.
    Unmounted {
        /// Where it was.
        target: PathBuf,
    },
    /// Containers, as a list of [`ContainerSummary`].
    List {
        /// Also those that have ended.
        all: bool,
    },
    /// Stops a container: its stop signal, then SIGKILL.
    Stop {
        /// Name, id or its prefix.
        container: String,
        /// Seconds between the two.
        timeout_secs: u64,
    },
    /// Sends a signal to a container's init.
    Kill {
        /// Name, id or its prefix.
        container: String,
        /// Signal number.
        signal: i32,
    },
    /// Removes a container.
    Remove {
        /// Name, id or its prefix.
        container: String,
        /// Kill it first if it runs.
        force: bool,
    },
    /// All metrics, as text.
    Metrics {
        /// As OpenMetrics.
        open: bool,
    },
    /// Why starts took what they took; [`WhyAction`] says what it answers.
    Why {
        /// Name, id or its prefix of a container, or reference or id of an image.
        name: String,
        /// What to tell.
        action: WhyAction,
    },
    /// Everything known of a container or image, as a JSON object.
    Inspect {
        /// Name, id, reference, or a prefix of an id.
        name: String,
    },
    /// Where a container's shim and log are, as [`ContainerPaths`].
    Locate {
        /// Name, id or its prefix.
        container: String,
    },
    /// Stops hydration and forgets local bytes that no mount uses, of one image or of all.
    CacheDrop {
        /// Reference or digest; all when absent.
        image: Option<String>,
    },
    /// Does something with what the instance has on disk; [`SystemAction`] says what it answers.
    System(SystemAction),
    /// Has the program of the process that asks take over: it becomes keeper and daemon, and all that runs stays. Nothing
    /// is answered before the new daemon serves, or the old one does again.
    TakeOver,
    /// Stops containers, takes mounts down and ends the daemon, so that the root can be deleted.
    Reset {
        /// Also with containers running.
        force: bool,
    },
}

/// A frame of the daemon's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    /// How far a layer is.
    Progress {
        /// Which layer (diffID).
        layer: Digest,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Something the user should know; for stderr.
    Note(String),
    /// The result. With `fd`, a descriptor follows the frame.
    Done {
        /// The result itself.
        value: serde_json::Value,
        /// Whether a descriptor follows.
        fd: bool,
    },
    /// The request failed.
    Failed {
        /// The exit code the command line ends with.
        code: u8,
        /// One sentence.
        message: String,
    },
}

/// The state of an instance (`lazyrun info`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// Version of the program.
    pub version: String,
    /// Process id of the daemon; 0 when none runs.
    pub daemon_pid: u32,
    /// Root directory.
    pub root: PathBuf,
    /// The mount plan in use.
    pub mount_plan: String,
    /// Name of the bridge.
    pub bridge: String,
    /// Name of the nftables table.
    pub nft_table: String,
    /// Running and all containers.
    pub containers_running: usize,
    /// Containers that have ended and were not removed.
    pub containers_stopped: usize,
    /// Number of images.
    pub images: usize,
    /// Requests the kernel has sent to our FUSE servers since the daemon started.
    pub fuse_requests: u64,
    /// HTTP requests sent to registries since the daemon started.
    pub registry_requests: u64,
    /// Bytes received from registries since the daemon started.
    pub registry_bytes: u64,
    /// On-demand reads that had to wait for a registry since the daemon started.
    pub faults: u64,
    /// Resident memory of the daemon in bytes.
    pub daemon_rss: u64,
}

/// Answer to [`Request::Run`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Started {
    /// The container's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The shim's socket.
    pub socket: PathBuf,
}

/// Answer to [`Request::Locate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerPaths {
    /// The container's id.
    pub id: String,
    /// The shim's socket.
    pub socket: PathBuf,
    /// The container's log.
    pub log: PathBuf,
    /// Whether it runs.
    pub running: bool,
}

/// Answer to [`Request::Mount`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mounted {
    /// The plan that serves the mount.
    pub plan: String,
}

/// An image as `lazyrun images` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageSummary {
    /// Repository in its familiar form.
    pub repository: String,
    /// Tag, or `<none>`.
    pub tag: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the config, docker's image id.
    #[serde(rename = "ID")]
    pub id: Digest,
    /// When the image was recorded here (RFC 3339).
    pub pulled_at: String,
    /// Compressed bytes of all layers.
    pub size: u64,
    /// Bytes of layer files that are local.
    pub local: u64,
    /// Bytes of layer files in all, of the layers whose index is known.
    pub total: u64,
    /// Number of layers.
    pub layers: usize,
    /// How many of them have an index.
    pub indexed: usize,
}

/// A container as `lazyrun ps` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerSummary {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its image, as typed.
    pub image: String,
    /// What it runs.
    pub command: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// `running` or `exited`.
    pub state: String,
    /// For people: `Up 3 seconds`, `Exited (0) 2 minutes ago`.
    pub status: String,
    /// Published ports.
    pub ports: String,
    /// Its name.
    pub names: String,
}
