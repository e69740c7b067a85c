//! What can be typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use lazyrun_fetcher::TrustMode;
use lazyrun_fs::plan::Plan;
use lazyrun_index::Digest;

pub use super::bench_args::{BenchArgs, DemoArgs};
pub use super::config_args::{ConfigCommand, Shell};
pub use super::container_args::{ExecArgs, HydrateArgs, LogsArgs};
pub use super::containerd::ContainerdCommand;
pub use super::index_args::{IndexCommand, ProfileCommand};
use super::progress::Style;
pub use super::registry_args::{LoginArgs, RegistryCommand};
pub use super::snapshotter::SnapshotterArgs;
use crate::ipc::hydration::HydrateMode;
use crate::ipc::protocol::PullPolicy;
use crate::ipc::system::LimitValue;
use crate::settings::Settings;

/// Starts containers before their image is local.
#[derive(Debug, Parser)]
#[command(name = "lazyrun", version, about, max_term_width = 110)]
pub struct Cli {
    /// Directory of the instance; each root is an instance of its own [default: /var/lib/lazyrun, of a user
    /// who is not root ~/.local/share/lazyrun]
    #[arg(long, global = true, env = "LAZYRUN_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// How progress is shown on stderr
    #[arg(long, global = true, value_enum, default_value_t, value_name = "STYLE")]
    pub progress: Style,
    /// Registry that may use plain HTTP or an unknown certificate; can be given several times
    #[arg(long, global = true, value_name = "HOST[:PORT]")]
    pub insecure_registry: Vec<String>,
    /// Directory with mirrors and certificates of registries, as containerd's certs.d; can be given several times
    /// [default: /etc/{lazyrun,containerd,docker,containers}/certs.d, or LAZYRUN_HOSTS_DIR]
    #[arg(long, global = true, value_name = "DIR")]
    pub hosts_dir: Vec<PathBuf>,
    /// The kubelet's configuration of credential providers: plugins that are asked for credentials when no file has any
    #[arg(
        long,
        global = true,
        env = "LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_CONFIG",
        value_name = "FILE",
        requires = "image_credential_provider_bin_dir"
    )]
    pub image_credential_provider_config: Option<PathBuf>,
    /// Directory with the programs of those plugins
    #[arg(
        long,
        global = true,
        env = "LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_BIN_DIR",
        value_name = "DIR",
        requires = "image_credential_provider_config"
    )]
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    /// Which indexes made elsewhere may be used: proven, bound or repository [default: repository for references by
    /// tag, bound for references by digest]
    #[arg(long, global = true, value_name = "MODE")]
    pub index_trust: Option<TrustMode>,
    /// Use the index artifact with this digest and no other
    #[arg(long, global = true, value_name = "DIGEST")]
    pub index_digest: Option<Digest>,
    /// Most that the local copies of layers may take, such as 20GiB or 80% of the disk; none takes a limit away. Kept
    /// for this root until another is given
    #[arg(long, global = true, env = "LAZYRUN_CACHE_LIMIT", value_name = "LIMIT")]
    pub cache_limit: Option<LimitValue>,
    /// Bytes of the disk that the local copies of layers leave free, such as 2GiB [default: 512MiB, or a twentieth of a
    /// small disk]. Kept for this root until another is given
    #[arg(long, global = true, env = "LAZYRUN_DISK_RESERVE", value_name = "BYTES", value_parser = disk_bytes)]
    pub disk_reserve: Option<u64>,
    /// Settings of the daemon.
    #[command(flatten)]
    pub settings: Settings,
    #[command(subcommand)]
    /// The command.
    pub command: Command,
}

fn disk_bytes(text: &str) -> Result<u64, String> {
    lazyrun_fetcher::parse_bytes(text).ok_or_else(|| format!("{text:?} is no size; write for example 2GiB"))
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container and start it
    Run(Box<RunArgs>),
    /// Run a command in a running container
    Exec(ExecArgs),
    /// List containers
    Ps {
        /// Also those that have ended
        #[arg(short, long)]
        all: bool,
        /// Only ids
        #[arg(short, long)]
        quiet: bool,
        /// How far their images are local, and what hydration does
        #[arg(long, conflicts_with = "quiet")]
        lazy: bool,
        /// `json`, or a template such as '{{.ID}} {{.Names}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Stop containers
    Stop {
        /// Seconds to wait before SIGKILL
        #[arg(short, long, default_value_t = 10)]
        time: u64,
        /// Name, id, or beginning of an id
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Send a signal to containers
    Kill {
        /// Name or number
        #[arg(short, long, default_value = "KILL")]
        signal: String,
        /// Name, id, or beginning of an id
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Remove containers
    Rm {
        /// Kill those that run
        #[arg(short, long)]
        force: bool,
        /// Name, id, or beginning of an id
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Show what a container has written
    Logs(LogsArgs),
    /// Show everything known of containers or images, as JSON
    Inspect {
        /// A template such as '{{.State.Pid}}'
        #[arg(short, long)]
        format: Option<String>,
        /// Containers or images
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// List images
    Images {
        /// Only ids
        #[arg(short, long)]
        quiet: bool,
        /// How far they are local, and what hydration does
        #[arg(long, conflicts_with = "quiet")]
        lazy: bool,
        /// `json`, or a template such as '{{.Repository}}:{{.Tag}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Make an image wholly local
    Pull {
        /// No progress
        #[arg(short, long)]
        quiet: bool,
        /// Whether to fetch all of it, or only what it takes to start from it
        #[arg(long, value_enum, default_value_t)]
        hydrate: HydrateMode,
        /// Reference of the image
        image: String,
    },
    /// Make an image wholly local in the background, or control how that is done
    Hydrate(HydrateArgs),
    /// Remove images
    Rmi {
        /// Also when containers use them
        #[arg(short, long)]
        force: bool,
        /// Reference, id, or beginning of an id
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Indexes of images
    Index {
        /// What to do.
        #[command(subcommand)]
        command: IndexCommand,
    },
    /// Profiles: what starts of an image touch, in order
    Profile {
        /// What to do.
        #[command(subcommand)]
        command: ProfileCommand,
    },
    /// Registries: which hosts are asked, and how
    Registry {
        /// What to do.
        #[command(subcommand)]
        command: RegistryCommand,
    },
    /// Check a user's password at a registry and keep it, as docker does
    Login(LoginArgs),
    /// Forget what `login` has kept
    Logout {
        /// Host and port of the registry
        #[arg(default_value = "docker.io", value_name = "REGISTRY")]
        registry: String,
    },
    /// The local copies of layers
    Cache {
        /// What to do.
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Mount an image at a directory
    Mount(MountArgs),
    /// Unmount what `mount` mounted
    Umount {
        /// The directory
        directory: PathBuf,
    },
    /// Run a command, or a shell, in a user namespace in which users who are not root can mount images
    Unshare {
        /// The command with its arguments [default: $SHELL]
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Show why a start took what it took: where the time went, requests, and reads that waited
    Why {
        /// Which start, counted back from the last one
        #[arg(short, long, default_value_t = 1, value_name = "NR")]
        number: usize,
        /// List the starts that are known
        #[arg(short, long, conflicts_with = "number")]
        list: bool,
        /// `json` for everything, or a template such as '{{.Summary.Total_ms}}'
        #[arg(long)]
        format: Option<String>,
        /// Container (also one that was removed) or image
        #[arg(value_name = "CONTAINER|IMAGE")]
        name: String,
    },
    /// Print the daemon's metrics in Prometheus' text format
    Metrics {
        /// As OpenMetrics
        #[arg(long)]
        openmetrics: bool,
    },
    /// Show the state of the instance; starts no daemon
    Info {
        /// `json`, or a template such as '{{.mount_plan}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Show the version
    Version {
        /// `json`
        #[arg(long)]
        format: Option<String>,
    },
    /// Show directories as one, writable, without the kernel's overlayfs; called as fuse-overlayfs is
    #[command(disable_help_flag = true)]
    Union {
        /// `-o lowerdir=A:B[,upperdir=U,workdir=W][,OPTION...] MOUNTPOINT`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Show what this machine can do: kernel features, mount plans and why, networking
    Doctor {
        /// `json`
        #[arg(long)]
        format: Option<String>,
    },
    /// The configuration of containerd, registries and lazyrun
    Config {
        /// What to do.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// The instance as a whole
    System {
        /// What to do.
        #[command(subcommand)]
        command: SystemCommand,
    },
    /// Make a real image of this machine's files and start it in four ways
    Demo(DemoArgs),
    /// Measure pull versus lazy start of an image
    Bench(BenchArgs),
    /// Run the daemon in the foreground, or have this program take over from the daemon that runs
    Daemon {
        /// Replace the daemon that runs, and its keeper, by this program; containers and mounts stay
        #[arg(long)]
        takeover: bool,
        /// Started by a keeper.
        #[arg(long, hide = true)]
        kept: bool,
        /// Serves containerd with these options.
        #[arg(long, hide = true, requires = "kept")]
        snapshotter: Option<String>,
    },
    /// Run the daemon in the foreground and serve snapshots to containerd
    Snapshotter(SnapshotterArgs),
    /// Images that containerd has pulled through the snapshotter
    Containerd {
        /// What to do.
        #[command(subcommand)]
        command: ContainerdCommand,
    },
    /// Print what makes a shell complete the commands and flags of lazyrun
    Completion {
        /// Which shell
        shell: Shell,
    },
    /// The daemon's parent.
    #[command(hide = true)]
    Keeper {
        /// Descriptor of what this process was before it ran this program.
        #[arg(long, hide = true)]
        state: Option<i32>,
    },
    /// What `unshare` needs outside of its namespace.
    #[command(hide = true)]
    MapIds {
        /// Whose namespace it is
        pid: u32,
    },
}

/// `lazyrun cache`
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Stop hydrating and forget local bytes that no mount uses; indexes stay
    Drop {
        /// Reference of the image; all images without it
        image: Option<String>,
    },
}

/// `lazyrun system`
#[derive(Debug, Subcommand)]
pub enum SystemCommand {
    /// Show what takes how much of the disk
    Df {
        /// Each image, layer, view and container
        #[arg(short, long)]
        verbose: bool,
        /// `json`, or a template such as '{{.Type}} {{.Size}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Remove containers that have ended, views that no container uses, and what interrupted work has left
    Prune {
        /// Also images without a container
        #[arg(short, long)]
        all: bool,
        /// Also local bytes of layers that can be fetched again and that nothing in use reads
        #[arg(long)]
        cache: bool,
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// `json`, or a template such as '{{.SpaceReclaimed}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Verify every local byte of layers against their indexes; exits with 1 when something is wrong
    Check {
        /// Drop what is wrong, so that it is fetched again
        #[arg(long)]
        repair: bool,
        /// `json`, or a template such as '{{.Spans}}'
        #[arg(long)]
        format: Option<String>,
    },
    /// Stop everything, unmount, delete the root directory
    Reset {
        /// Also with containers running
        #[arg(long, short)]
        force: bool,
    },
}

/// `lazyrun run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Run in the background and print the id
    #[arg(short, long)]
    pub detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Name of the container
    #[arg(long)]
    pub name: Option<String>,
    /// Environment: NAME=VALUE, or NAME to pass the caller's
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Bind mount: SOURCE:TARGET[:ro]
    #[arg(short, long, value_name = "SRC:DST[:OPTS]")]
    pub volume: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User and group: name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Replaces the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Host name
    #[arg(long)]
    pub hostname: Option<String>,
    /// bridge, host or none
    #[arg(long, visible_alias = "net", default_value = "bridge", value_name = "MODE")]
    pub network: String,
    /// Publish a port: [IP:]HOST:CONTAINER[/udp]
    #[arg(short, long, value_name = "PORTS")]
    pub publish: Vec<String>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value_t)]
    pub pull: PullPolicy,
    /// Whether to fetch the rest of the image in the background
    #[arg(long, value_enum, default_value_t)]
    pub hydrate: HydrateMode,
    /// Force a mount plan
    #[arg(long, value_name = "PLAN")]
    pub union: Option<Plan>,
    /// Memory limit, such as 512m
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// Limit of processors, such as 1.5
    #[arg(long, value_name = "N")]
    pub cpus: Option<f64>,
    /// Limit of processes
    #[arg(long, value_name = "N")]
    pub pids_limit: Option<i64>,
    /// Mount the root read-only
    #[arg(long)]
    pub read_only: bool,
    /// All capabilities and devices, no seccomp
    #[arg(long)]
    pub privileged: bool,
    /// Add a capability
    #[arg(long, value_name = "CAP")]
    pub cap_add: Vec<String>,
    /// Drop a capability
    #[arg(long, value_name = "CAP")]
    pub cap_drop: Vec<String>,
    /// An OCI runtime to use in place of the built-in runner
    #[arg(long, value_name = "PATH")]
    pub runtime: Option<PathBuf>,
    /// Reference of the image
    pub image: String,
    /// Command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `lazyrun mount`
#[derive(Debug, Args)]
pub struct MountArgs {
    /// Force a mount plan
    #[arg(long, value_name = "PLAN")]
    pub union: Option<Plan>,
    /// With a writable layer on top
    #[arg(long)]
    pub rw: bool,
    /// Options as of mount(8): ro, rw, nosuid, nodev, noexec, noatime, nodiratime, context=LABEL (SELinux; also
    /// fscontext, defcontext, rootcontext), X-mount.idmap=MAPPING
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value_t)]
    pub pull: PullPolicy,
    /// Whether to fetch the rest of the image in the background
    #[arg(long, value_enum, default_value_t)]
    pub hydrate: HydrateMode,
    /// Reference of the image
    pub image: String,
    /// Where to mount it
    pub directory: PathBuf,
}
