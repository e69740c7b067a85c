//! Any bytes as what a registry or docker's configuration says.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazyrun_fuzz::oci(bytes));
