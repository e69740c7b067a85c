//! Any bytes as a plain tar, or as the records of PAX headers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::archive(bytes));
