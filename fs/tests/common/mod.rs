//! What the tests of views and images share.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod layer;
pub mod mount;
pub mod oddlayers;
pub mod tree;
