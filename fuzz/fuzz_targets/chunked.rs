//! Any bytes as annotations, footers, tables and blobs of zstd:chunked.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::chunked(bytes));
