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

/// A test file that is not named above would never run.
#[test]
fn every_test_file_is_in_this_binary() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let text = std::fs::read_to_string(format!("{dir}/main.rs")).expect("read this file");
    for entry in std::fs::read_dir(dir).expect("list the tests").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        if let Some(module) = name.strip_suffix(".rs").filter(|module| !matches!(*module, "main")) {
            assert!(text.contains(&format!("\nmod {module};")), "tests/{name} is not named in tests/main.rs");
        }
    }
}
