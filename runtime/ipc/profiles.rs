//! What can be asked about profiles, and what comes back.

use serde::{Deserialize, Serialize};

/// What to do with the profile of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProfileAction {
    /// Tells which files the starts of an image touch; answers a list of [`PathTouches`], in order of first touch.
    Show,
    /// Takes it over from the registry; answers the digest of the image's manifest.
    Pull,
    /// Deletes the one that is here and ends a recording; answers whether there was one.
    Forget,
}

/// What the starts of an image touch of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PathTouches {
    /// Path relative to the root; for what belongs to no file (headers between files) `-`.
    pub path: String,
    /// The layer that has it, 0 at the bottom.
    pub layer: u16,
    /// Milliseconds from the start to its first touch.
    #[serde(rename = "AtMS")]
    pub at_ms: u32,
    /// Bytes that are touched, in whole pages.
    pub touched: u64,
    /// Bytes of the file.
    pub size: u64,
    /// Those of the touched bytes that are on this machine.
    pub local: u64,
}
