//! `lazyrun index`.

use std::ops::Range;

use serde::de::DeserializeOwned;

use super::args::IndexCommand;
use super::{Context, index_lists, output, progress};
use crate::failure::Failure;
use crate::ipc::indexes::{ArtifactSummary, IndexAction, IndexedImage, Pushed};
use crate::ipc::protocol::{PullPolicy, Request};
use lazyrun_index::Digest;

pub(super) fn index(context: &Context, command: IndexCommand) -> Result<(), Failure> {
    match command {
        IndexCommand::Build { profile, image } => {
            manifest_digest(context, &image, IndexAction::Build { along_profile: profile })
        }
        IndexCommand::Pull { image } => manifest_digest(context, &image, IndexAction::Pull),
        IndexCommand::Verify { image } => manifest_digest(context, &image, IndexAction::Verify),
        IndexCommand::Push { no_profile, created, format, image } => {
            let action = IndexAction::Push { without_profile: no_profile, created };
            let pushed: Pushed = call(context, &image, action)?;
            match format {
                Some(format) => output::value(&pushed, Some(&format)),
                None => output::print(&format!("{}\n", pushed.digest)),
            }
        }
        IndexCommand::Ls { format, image } => {
            let artifacts: Vec<ArtifactSummary> = call(context, &image, IndexAction::List)?;
            list(&artifacts, format.as_deref())
        }
        IndexCommand::Inspect { entries, spans, layer, format, image } => {
            let indexed: IndexedImage = call(context, &image, IndexAction::Inspect)?;
            if entries || spans {
                let layers = chosen(&indexed, layer.as_deref())?;
                let list = if entries { index_lists::entries } else { index_lists::spans };
                return list(&|action| call(context, &image, action), layers, format.as_deref());
            }
            match format {
                Some(format) => output::value(&indexed, Some(&format)),
                None => output::print(&described(&indexed)),
            }
        }
        IndexCommand::Rm { image } => {
            let removed: Vec<Digest> = call(context, &image, IndexAction::Remove)?;
            removed.iter().try_for_each(|digest| output::print(&format!("Deleted: {digest}\n")))
        }
    }
}

/// The layers that `--layer` means.
fn chosen(image: &IndexedImage, layer: Option<&str>) -> Result<Range<usize>, Failure> {
    let Some(layer) = layer else { return Ok(0..image.layers.len()) };
    let hex = layer.strip_prefix("sha256:").unwrap_or(layer);
    let found = match layer.parse::<usize>() {
        Ok(number) if number < image.layers.len() => Some(number),
        _ if hex.len() < 4 => None,
        _ => image
            .layers
            .iter()
            .position(|l| l.digest.hex().starts_with(hex) || l.diff_id.hex().starts_with(hex)),
    };
    match found {
        Some(number) => Ok(number..number + 1),
        None => Err(Failure::new(
            1,
            format!(
                "{} has no layer {layer}; its {} count from 0 at the bottom",
                image.reference,
                image.layers.len()
            ),
        )),
    }
}

pub(super) fn call<T: DeserializeOwned>(
    context: &Context,
    image: &str,
    action: IndexAction,
) -> Result<T, Failure> {
    let request = Request::Index { image: context.image(image, PullPolicy::Missing), action };
    context.daemon()?.call(&request, &mut progress::Shown::new(context.progress))
}

fn manifest_digest(context: &Context, image: &str, action: IndexAction) -> Result<(), Failure> {
    let indexed: IndexedImage = call(context, image, action)?;
    output::print(&format!("{}\n", indexed.digest))
}

fn list(artifacts: &[ArtifactSummary], format: Option<&str>) -> Result<(), Failure> {
    output::rows(
        artifacts,
        format,
        &[
            ("DIGEST", |a| a.digest.to_string()),
            ("KIND", |a| a.kind.to_string()),
            ("TRUST", |a| a.trust.to_string()),
            ("LAYERS", |a| a.layers.to_string()),
            ("SIZE", |a| output::bytes(a.size)),
            ("CREATED", |a| a.created.clone().unwrap_or_else(|| "-".into())),
        ],
    )
}

fn described(image: &IndexedImage) -> String {
    let header =
        ["LAYER", "ORIGIN", "PROVEN", "COMPRESSION", "LAYOUT", "ENTRIES", "SPANS", "BLOB", "LAYER FILE"];
    let header = header.iter().chain(&["INDEX", "OVERHEAD", "LOCAL"]).map(|s| (*s).to_owned()).collect();
    let mut lines: Vec<Vec<String>> = vec![header];
    for layer in &image.layers {
        let mut line = vec![layer.digest.hex()[..12].to_owned()];
        match &layer.index {
            None => line.extend(["none".to_owned(), "-".to_owned()]),
            Some(index) => line.extend([
                index.origin.clone(),
                if index.proven { "yes" } else { "no" }.to_owned(),
                index.compression.clone(),
                index.layout.clone(),
                index.entries.to_string(),
                index.spans.to_string(),
                output::bytes(layer.size),
                output::bytes(index.layer_size),
                output::bytes(index.index_size),
                format!("{:.2}%", index.overhead),
                format!("{}%", (index.local * 100).checked_div(index.layer_size).unwrap_or(100)),
            ]),
        }
        lines.push(line);
    }
    format!("{} {}\n{}", image.reference, image.digest, output::table(&lines))
}
