//! Commands about images.

use std::process::ExitCode;

use super::{Context, hydrate, output, progress};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::hydration::HydrateMode;
use crate::ipc::protocol::{ImageSummary, PullPolicy, Request};

pub(super) fn list(context: &Context, quiet: bool, lazy: bool, format: Option<&str>) -> Result<(), Failure> {
    if lazy {
        return hydrate::images(context, format);
    }
    let images: Vec<ImageSummary> = context.list(&Request::Images)?;
    let format = if quiet { Some("{{.ID}}") } else { format };
    output::rows(
        &images,
        format,
        &[
            ("REPOSITORY", |i| i.repository.clone()),
            ("TAG", |i| i.tag.clone()),
            ("IMAGE ID", |i| i.id.hex()[..12].to_owned()),
            ("LAYERS", |i| i.layers.to_string()),
            ("SIZE", |i| output::bytes(i.size)),
            ("LOCAL", |i| format!("{}%", (i.local * 100).checked_div(i.total).unwrap_or(0))),
        ],
    )
}

pub(super) fn pull(context: &Context, quiet: bool, hydrate: HydrateMode, image: &str) -> Result<(), Failure> {
    let request = Request::Pull { image: context.image(image, PullPolicy::Always), hydrate };
    let style = if quiet { progress::Style::None } else { context.progress };
    let summary: ImageSummary = context.daemon()?.call(&request, &mut progress::Shown::new(style))?;
    output::print(&format!("{}\n", summary.digest))
}

pub(super) fn remove(context: &Context, force: bool, images: &[String]) -> Result<ExitCode, Failure> {
    let mut code = 0;
    for image in images {
        let request = Request::RemoveImage { image: image.clone(), force };
        match context.daemon()?.call::<Vec<String>>(&request, &mut Quiet) {
            Ok(removed) => {
                for reference in removed {
                    output::print(&format!("Untagged: {reference}\n"))?;
                }
            }
            Err(failure) => {
                eprintln!("lazyrun: {failure}");
                code = failure.code;
            }
        }
    }
    Ok(ExitCode::from(code))
}

pub(super) fn cache_drop(context: &Context, image: Option<String>) -> Result<(), Failure> {
    let freed: u64 = context.daemon()?.call(&Request::CacheDrop { image }, &mut Quiet)?;
    eprintln!("lazyrun: {} of local layer data dropped", output::bytes(freed));
    Ok(())
}
