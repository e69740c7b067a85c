//! The tests of this crate in one binary, which links once.

mod common;
mod tables_common;

mod along;
mod builder;
mod chunked;
mod estargz;
mod estargz_hostile;
mod formats;
mod hostile;
mod oddlayers;
mod prove;
mod restart;
mod soci;

#[test]
fn every_test_file_is_in_this_binary() {
    common::listed::assert_all_named(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"), &[]);
}
