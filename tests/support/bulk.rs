//! An image of any size, for what depends on size.

use lazyrun::demo::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout};
use tempfile::TempDir;

use super::fixture::noise;

/// The image's tag.
pub const TAG: &str = "bulk";
/// Bytes of one file.
const FILE: usize = 4 << 20;

/// Makes an image of four layers with `mib` MiB of files: three quarters do not compress, the rest does well. The layers
/// are as different as they come from builders: an ordinary gzip one, one that unpacks very well, a plain one, and one
/// that is a single deflate block, which can hardly be entered.
pub fn image(mib: usize) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let files = (mib << 20) / FILE / 4;
    let kinds = [
        (Encoding::Gzip(4), false),
        (Encoding::Gzip(4), true),
        (Encoding::Plain, false),
        (Encoding::Gzip(1), false),
    ];
    let write = |(number, (encoding, dense))| layer(&layout, number, encoding, dense, files);
    let layers: Vec<LayerBlob> = kinds.into_iter().enumerate().map(write).collect();
    layout.add_image(TAG, &layers, &ImageSettings::default()).expect("write the manifest");
    dir
}

fn layer(layout: &Layout, number: usize, encoding: Encoding, dense: bool, files: usize) -> LayerBlob {
    let mut tar = tar::Builder::new(layout.layer(encoding).expect("start a layer"));
    for i in 0..files {
        let seed = (number * 100_000 + i) as u64;
        let content = match dense {
            true => noise(seed, 1000).repeat(FILE / 1000 + 1),
            false => noise(seed, FILE),
        };
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(FILE as u64);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, format!("bulk-{number}/{i:05}"), &content[..FILE]).expect("add a file");
    }
    tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer")
}
