//! The demonstration, small: an image of the host's files, all four phases, the table and the JSON.

use serde_json::Value;

use crate::support::instance::{EXE, Lazyrun};

#[test]
fn the_demonstration_tells_four_phases() {
    // Only for the check that the tests run as root and for a directory that goes away.
    let lazyrun = Lazyrun::new();
    let cache = lazyrun.scratch("cache");
    let output = std::process::Command::new(EXE)
        .args([
            "demo",
            "--mbit",
            "400",
            "--rtt-ms",
            "5",
            "--rounds",
            "1",
            "--size-mb",
            "40",
            "--format",
            "json",
        ])
        .arg("--cache")
        .arg(&cache)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("only JSON on standard output");
    let phases = report["phases"].as_array().expect("phases");
    let names: Vec<&str> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert_eq!(names, ["full-pull", "lazy-bare", "lazy-indexed", "warm"]);
    let bytes = |i: usize| phases[i]["bytes"].as_u64().unwrap();
    let compressed = report["compressed"].as_u64().unwrap();
    assert!(bytes(0) >= compressed && bytes(0) < compressed + 200_000, "{report:#}");
    assert!(bytes(2) < compressed, "an indexed start fetched everything: {report:#}");
    assert!(bytes(3) < 50_000, "a warm start fetched {} bytes", bytes(3));
}
