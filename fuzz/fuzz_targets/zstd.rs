//! Any bytes as zstd frames, or as content to compress.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::zstd(bytes));
