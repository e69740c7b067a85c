//! The demonstration: a real image made of the host's own files, an embedded registry, a shaped link, and the
//! four ways of starting it measured one after the other.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

mod hostfiles;
pub mod image;
pub mod layout;
pub mod registry;
pub mod shaper;

use crate::bench::report::megabytes;
use crate::bench::{BenchError, BenchOptions, Report, bench};
use image::{HostImageOptions, ImageError, TAG};
use registry::Registry;
use shaper::Shape;

/// How to demonstrate.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// The lazyrun program.
    pub exe: PathBuf,
    /// The link to imitate.
    pub shape: Shape,
    /// Rounds; medians are taken over them.
    pub rounds: usize,
    /// Where the image is kept from one demonstration to the next.
    pub cache: PathBuf,
    /// How large the image should be.
    pub image: HostImageOptions,
    /// `--network` of the containers; the default when `None`.
    pub network: Option<String>,
}

/// Why a demonstration ended early.
#[derive(Debug, Error)]
pub enum DemoError {
    /// No image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No registry.
    #[error("cannot serve the image on loopback: {0}")]
    Registry(#[source] io::Error),
    /// A measured command failed.
    #[error(transparent)]
    Bench(#[from] BenchError),
}

/// Makes the image, serves it and measures; `progress` is told in a line what is under way.
///
/// # Errors
/// When the host has no interpreter, no port can be had or a measured command fails.
pub fn run(options: &DemoOptions, progress: &dyn Fn(&str)) -> Result<Report, DemoError> {
    progress("making an image of this host's own files (kept for the next time)");
    let image = image::build(&options.cache, &options.image)?;
    progress(&format!(
        "{} with its libraries and other files of /usr: {} layers, {} entries, {} compressed, {} unpacked",
        image.interpreter,
        image.layers.len(),
        image.entries,
        megabytes(image.compressed()),
        megabytes(image.uncompressed()),
    ));
    let registry = Registry::serve(&image.layout, options.shape).map_err(DemoError::Registry)?;
    progress(&format!("served at {}, {}", registry.addr(), describe(options.shape)));
    let bench_options = BenchOptions {
        exe: options.exe.clone(),
        image: registry.reference("demo", TAG),
        args: image.args.clone(),
        rounds: options.rounds,
        network: options.network.clone(),
        insecure_registries: Vec::new(),
        hosts_dirs: Vec::new(),
        parent: None,
        compressed: Some(image.compressed()),
    };
    Ok(bench(&bench_options, Some(&registry), progress)?)
}

fn describe(shape: Shape) -> String {
    let bandwidth = if shape.mbit > 0.0 { format!("{} Mbit/s", shape.mbit) } else { "full speed".into() };
    format!("{bandwidth}, {} ms round trip", shape.rtt_ms)
}
