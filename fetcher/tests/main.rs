//! The tests of this crate in one binary, which links once. `evil` stands apart: it measures its process.

mod common;

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

/// A test file that is not named above would never run.
#[test]
fn every_test_file_is_in_this_binary() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let text = std::fs::read_to_string(format!("{dir}/main.rs")).expect("read this file");
    for entry in std::fs::read_dir(dir).expect("list the tests").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        if let Some(module) = name.strip_suffix(".rs").filter(|module| !matches!(*module, "main" | "evil")) {
            assert!(text.contains(&format!("\nmod {module};")), "tests/{name} is not named in tests/main.rs");
        }
    }
}
