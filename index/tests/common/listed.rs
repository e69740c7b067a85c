//! For the one test binary of each crate: a file that it does not name would never run.

/// Checks that every file of a directory of tests is a module of its `main.rs`, or a binary of its own: one of `alone`.
pub(crate) fn assert_all_named(tests: &str, alone: &[&str]) {
    let text = std::fs::read_to_string(format!("{tests}/main.rs")).expect("read main.rs");
    for entry in std::fs::read_dir(tests).expect("list the tests").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        let Some(module) = name.strip_suffix(".rs").filter(|m| *m != "main" && !alone.contains(m)) else {
            continue;
        };
        assert!(text.contains(&format!("\nmod {module};")), "{tests}/{name} is not named in main.rs");
    }
}
