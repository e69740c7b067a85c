//! The tests of this crate in one binary, which links once. `view_scale` stands apart: it measures its process.

mod common;
mod fuse_support;
#[path = "../../index/tests/common/listed.rs"]
mod listed;
mod union_support;

mod erofs_image;
mod erofs_kernel;
mod erofs_oddlayers;
mod erofs_real;
mod root_fuse_mounts;
mod root_fuse_plans;
mod root_fuse_view;
mod root_union_data;
mod root_union_files;
mod root_union_flags;
mod root_union_model;
mod root_union_nameless;
mod root_union_upper;
mod view_model;
mod view_oddlayers;
mod view_rules;

#[test]
fn every_test_file_is_in_this_binary() {
    listed::assert_all_named(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"), &["view_scale"]);
}
