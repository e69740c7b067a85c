//! `lazyrun hydrate`, and the lists with `--lazy`.

use super::args::HydrateArgs;
use super::{Context, output, progress};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::hydration::{HydrationAction, LazyContainer, LazyImage, Locality};
use crate::ipc::protocol::{PullPolicy, Request};
use lazyrun_index::Digest;

pub(super) fn hydrate(context: &Context, args: HydrateArgs) -> Result<(), Failure> {
    let image = args.image;
    let action = match (args.limit, &image) {
        (Some(rate), _) => HydrationAction::Limit { bytes_per_second: rate.0 },
        (None, _) if args.pause => HydrationAction::Pause { image },
        (None, _) if args.resume => HydrationAction::Resume { image },
        (None, Some(image)) => return start(context, image, args.wait),
        (None, None) => return Err(Failure::daemon("name the image that shall become whole")),
    };
    context.daemon()?.call(&Request::Hydrate(action), &mut Quiet)
}

fn start(context: &Context, image: &str, wait: bool) -> Result<(), Failure> {
    let image = Box::new(context.image(image, PullPolicy::Missing));
    let action = HydrationAction::Start { image, wait };
    let mut shown = progress::Shown::new(context.progress);
    let digest: Digest = context.daemon()?.call(&Request::Hydrate(action), &mut shown)?;
    drop(shown);
    output::print(&format!("{digest}\n"))
}

pub(super) fn images(context: &Context, format: Option<&str>) -> Result<(), Failure> {
    let images: Vec<LazyImage> = context.list(&Request::Hydrate(HydrationAction::Images))?;
    output::rows(
        &images,
        format,
        &[
            ("REPOSITORY", |i| i.repository.clone()),
            ("TAG", |i| i.tag.clone()),
            ("IMAGE ID", |i| i.id.hex()[..12].to_owned()),
            ("LOCAL", |i| format!("{}%", i.locality.percent)),
            ("BYTES", |i| bytes(&i.locality)),
            ("STATE", |i| state(&i.locality)),
        ],
    )
}

pub(super) fn containers(context: &Context, all: bool, format: Option<&str>) -> Result<(), Failure> {
    let containers: Vec<LazyContainer> =
        context.list(&Request::Hydrate(HydrationAction::Containers { all }))?;
    output::rows(
        &containers,
        format,
        &[
            ("CONTAINER ID", |c| c.id[..12].to_owned()),
            ("IMAGE", |c| c.image.clone()),
            ("NAMES", |c| c.names.clone()),
            ("LOCAL", |c| format!("{}%", c.locality.percent)),
            ("BYTES", |c| bytes(&c.locality)),
            ("STATE", |c| state(&c.locality)),
        ],
    )
}

fn bytes(locality: &Locality) -> String {
    format!("{} / {}", output::bytes(locality.local), output::bytes(locality.total))
}

fn state(locality: &Locality) -> String {
    match locality.reason.as_str() {
        "" => locality.state.to_string(),
        reason => format!("{} ({reason})", locality.state),
    }
}
