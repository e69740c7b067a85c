//! The integration tests: one binary, real registries, real mounts, a real containerd. They need root.

#[path = "../index/tests/common/listed.rs"]
mod listed;
mod support;

mod root_cache;
mod root_config_check;
mod root_containerd_docker;
mod root_containerd_fetch;
mod root_containerd_versions;
mod root_cri;
mod root_demo;
mod root_diffs;
mod root_evil;
mod root_faults;
mod root_hydrate;
mod root_index;
mod root_input;
mod root_large;
mod root_loading;
mod root_machine;
mod root_manage;
mod root_metrics;
mod root_mount_options;
mod root_network;
mod root_offline;
mod root_page_cache;
mod root_plan_fuse;
mod root_profile;
mod root_registries;
mod root_rootless;
mod root_run;
mod root_snapshotter;
mod root_snapshotter_api;
mod root_snapshotter_crash;
mod root_snapshotter_scale;
mod root_start;
mod root_support;
mod root_takeover;
mod root_trees;
mod root_twins;
mod root_why;

#[test]
fn every_test_file_is_in_this_binary() {
    listed::assert_all_named(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"), &[]);
}
