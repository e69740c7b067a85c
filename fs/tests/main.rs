//! The tests of this crate in one binary, which links once. `view_scale` stands apart: it measures its process.

mod common;
mod fuse_support;
mod union_support;

mod erofs_image;
mod erofs_kernel;
mod erofs_oddlayers;
mod erofs_real;
mod root_fuse_mounts;
mod root_fuse_plans;
mod root_fuse_view;
mod root_union_files;
mod root_union_model;
mod view_model;
mod view_oddlayers;
mod view_rules;

/// A test file that is not named above would never run.
#[test]
fn every_test_file_is_in_this_binary() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let text = std::fs::read_to_string(format!("{dir}/main.rs")).expect("read this file");
    for entry in std::fs::read_dir(dir).expect("list the tests").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        if let Some(module) =
            name.strip_suffix(".rs").filter(|module| !matches!(*module, "main" | "view_scale"))
        {
            assert!(text.contains(&format!("\nmod {module};")), "tests/{name} is not named in tests/main.rs");
        }
    }
}
