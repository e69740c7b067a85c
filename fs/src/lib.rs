//! Views of images and the mounts that serve them.

pub mod erofs;
pub mod view;
