//! The demonstration, small: an image of the host's files, all four phases and their figures.

use lazyrun::bench::{Phase, Report};
use lazyrun::demo::image::HostImageOptions;
use lazyrun::demo::shaper::Shape;
use lazyrun::demo::{self, DemoOptions};

use crate::support::instance::EXE;
use crate::support::need_root;

#[test]
fn the_demonstration_tells_four_phases() {
    need_root();
    let cache = tempfile::tempdir().unwrap();
    let options = DemoOptions {
        exe: EXE.into(),
        shape: Shape { mbit: 100.0, rtt_ms: 5.0 },
        rounds: 1,
        cache: cache.path().to_owned(),
        image: HostImageOptions { compressed: 50 << 20, bulk_layers: 2 },
        network: None,
    };
    let report: Report = demo::run(&options, &|_| ()).unwrap_or_else(|error| panic!("{error}"));
    let phases: Vec<Phase> = report.phases.iter().map(|phase| phase.phase).collect();
    assert_eq!(phases, Phase::ALL);
    let bytes: Vec<u64> = report.phases.iter().map(|phase| phase.bytes).collect();
    let compressed = report.compressed.expect("the image's size");
    assert!(bytes[0] >= compressed && bytes[0] < compressed + 200_000, "{bytes:?} of {compressed}");
    assert!(bytes[2] < compressed, "an indexed start fetched everything: {bytes:?} of {compressed}");
    assert!(bytes[3] < 50_000, "a warm start fetched {} bytes", bytes[3]);
    assert!(report.to_string().contains("of a pull"));
}
