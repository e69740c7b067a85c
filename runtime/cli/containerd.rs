//! `lazyrun containerd`: what is done with images that containerd has.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lazyrun_fetcher::Platform;

use super::{Context, output, progress};
use crate::failure::Failure;
use crate::ipc::containerd::{FetchRequest, Fetched, Platforms};
use crate::ipc::protocol::Request;

/// `lazyrun containerd`
#[derive(Debug, Subcommand)]
pub enum ContainerdCommand {
    /// Download the layers of lazily pulled images into containerd's content store, for export, save and push
    Fetch(FetchArgs),
}

/// The flags of `lazyrun containerd fetch`.
#[derive(Debug, Args)]
pub struct FetchArgs {
    /// containerd's namespace
    #[arg(short, long, env = "CONTAINERD_NAMESPACE", value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// Unix socket of containerd [default: the one that the snapshotter was told, or
    /// /run/containerd/containerd.sock]
    #[arg(short, long, env = "CONTAINERD_ADDRESS", value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// The variant to fetch of images for several platforms, such as linux/arm64 [default: that of this machine]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
    /// Every variant of them, also manifests and configs that containerd lacks
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// `json`, or a template such as '{{.Image}} {{.Bytes}}'
    #[arg(long)]
    format: Option<String>,
    /// Name of an image in containerd
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

pub(super) fn containerd(context: &Context, command: ContainerdCommand) -> Result<(), Failure> {
    let ContainerdCommand::Fetch(args) = command;
    let platforms = match args.platform {
        _ if args.all_platforms => Platforms::All,
        platform => Platforms::Best(platform.unwrap_or_else(Platform::host)),
    };
    let request = Request::ContainerdFetch(FetchRequest {
        address: args.address.as_deref().map(crate::containerd::socket),
        namespace: args.namespace,
        images: args.images,
        platforms,
        registry: context.registry(),
    });
    // One that is started for this would be in the way of the snapshotter.
    let Some(mut daemon) = context.running_daemon() else {
        let root = context.paths.root().display();
        return Err(Failure::daemon(format!(
            "no snapshotter runs at the root {root}; start `lazyrun snapshotter`, or say --root"
        )));
    };
    let mut shown = progress::Shown::new(context.progress);
    let fetched: Vec<Fetched> = daemon.call(&request, &mut shown)?;
    drop(shown);
    output::rows(
        &fetched,
        args.format.as_deref(),
        &[
            ("IMAGE", |f| f.image.clone()),
            ("DIGEST", |f| f.digest.to_string()),
            ("BLOBS", |f| f.blobs.to_string()),
            ("FETCHED", |f| f.fetched.to_string()),
            ("BYTES", |f| output::bytes(f.bytes)),
        ],
    )
}
