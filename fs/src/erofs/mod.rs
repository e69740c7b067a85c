//! Writes a view as an EROFS image that holds metadata only: names, attributes, and where in the layer files
//! the contents are. The layout is the one that erofs-utils calls tar index: blocks of 512 bytes, one device
//! per layer. What a layer file does not hold block by block goes to one more device, the appendix.
//!
//! Equal inputs give equal bytes; the UUID is a digest of all of them.

mod chunks;
mod dirs;
mod error;
mod format;
mod plan;
mod write;
mod xattrs;

pub use error::ErofsError;
pub use write::write;

/// Version of the writer: part of the UUID, and to be made part of the image's file name.
pub const BUILDER_VERSION: u32 = 1;

/// A layer file as a device of the image.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec {
    /// Bytes of the layer file.
    pub size: u64,
    /// What names it in the device table, see [`DeviceSpec::layer`].
    pub tag: [u8; 64],
}

impl DeviceSpec {
    /// The device of the layer file with this name; a name that is too long for the table is told by its sha256.
    pub fn layer(name: &str, size: u64) -> DeviceSpec {
        let mut tag = [0; 64];
        let long = if name.len() > tag.len() {
            lazyrun_index::Digest::of(name.as_bytes()).hex()
        } else {
            String::new()
        };
        let name = if long.is_empty() { name } else { &long };
        tag[..name.len()].copy_from_slice(name.as_bytes());
        DeviceSpec { size, tag }
    }
}

/// Gives contents of layers: only of what is not block-aligned in its layer file, while the image is written.
pub trait LayerContent {
    /// Fills `buf` from the layer file of layer `layer` (0 at the bottom) at `offset`.
    fn read_at(&self, layer: u16, offset: u64, buf: &mut [u8]) -> std::io::Result<()>;
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErofsSummary {
    /// Bytes of the image.
    pub image_size: u64,
    /// Bytes of the appendix. Unless 0 it is the last device, after those of the layers.
    pub appendix_size: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// The image's UUID: equal for equal images.
    pub uuid: [u8; 16],
}
