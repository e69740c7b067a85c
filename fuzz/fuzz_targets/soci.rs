//! Any bytes as a zTOC, with or without the blob it is of.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::soci(bytes));
