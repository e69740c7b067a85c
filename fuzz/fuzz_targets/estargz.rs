//! Any bytes as footers, tables and blobs of eStargz.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::estargz(bytes));
