//! Why a view cannot be written as an EROFS image.

use thiserror::Error;

/// The image was not written, or only in part: throw it away.
#[derive(Debug, Error)]
pub enum ErofsError {
    /// Writing the image or the appendix failed.
    #[error("cannot write the {what} of the EROFS view: {source}")]
    Write {
        /// `image` or `appendix`.
        what: &'static str,
        /// The failure.
        source: std::io::Error,
    },
    /// Reading layer contents for the appendix failed.
    #[error(
        "cannot read {len} bytes at {offset} of layer {layer}, which '{path}' needs in the appendix: {source}"
    )]
    Read {
        /// The file.
        path: String,
        /// Number of the layer, 1 at the bottom.
        layer: usize,
        /// Position in the layer file.
        offset: u64,
        /// Bytes wanted.
        len: usize,
        /// The failure.
        source: std::io::Error,
    },
    /// An extent points to a layer that has no device, or past its end.
    #[error("'{path}' has contents at {offset} of layer {layer}, past the end of that layer file")]
    OutsideDevice {
        /// The file.
        path: String,
        /// Number of the layer, 1 at the bottom.
        layer: usize,
        /// Position in the layer file.
        offset: u64,
    },
    /// More devices than the device table may have.
    #[error("the view needs {0} devices, more than the 65000 an EROFS image can name")]
    TooManyDevices(usize),
    /// A layer file, the appendix or the image is larger than 32-bit block numbers reach.
    #[error("the {0} is larger than the 2 TiB an EROFS device can have with blocks of 512 bytes")]
    DeviceTooLarge(String),
    /// A sparse file whose map would need an absurd amount of metadata.
    #[error("'{0}' is sparse in a way that would need more than 1 GiB of metadata")]
    TooSparse(String),
    /// Extended attributes above what an inode can hold.
    #[error("'{0}' has more than 256 KiB of extended attributes")]
    XattrsTooLarge(String),
    /// A device number above 12 bits of major or 20 bits of minor.
    #[error("'{path}' is a device node {major}:{minor}, which Linux cannot number")]
    DeviceNumber {
        /// The node.
        path: String,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}
