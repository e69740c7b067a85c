//! Views of images and the mounts that serve them.
