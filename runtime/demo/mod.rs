//! The demonstration: a real image made of the host's own files, an embedded registry, a shaped link.

pub mod layout;
pub mod registry;
pub mod shaper;
