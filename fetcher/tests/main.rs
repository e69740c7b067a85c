//! The tests of this crate in one binary, which links once. `evil` stands apart: it measures its process.

mod common;
#[path = "../../index/tests/common/listed.rs"]
mod listed;

mod adopted;
mod artifacts;
mod bombs;
mod cache;
mod faults;
mod http2;
mod mirrors;
mod parts;
mod proxies;
mod redirects;
mod referrers;
mod registry;
mod root_disk_full;
mod secured;
mod soci;
mod tables;
mod tokens;
mod twins;

#[test]
fn every_test_file_is_in_this_binary() {
    listed::assert_all_named(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"), &["evil"]);
}
