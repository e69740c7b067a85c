//! Any bytes as an index.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::index(bytes));
