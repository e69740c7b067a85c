//! Any bytes as gzip members, as raw deflate or as content to compress.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::gzip(bytes));
