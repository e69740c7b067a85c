//! Views of images and the mounts that serve them.

pub mod fuse;
pub mod mount;
pub mod mounter;
pub mod plan;
