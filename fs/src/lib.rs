//! Views of images and the mounts that serve them.

pub mod erofs;
pub mod fuse;
pub mod mount;
pub mod mounter;
pub mod plan;
pub mod union;
pub mod view;
