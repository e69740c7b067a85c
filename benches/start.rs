//! The cost of starting a container whose image is here: `lazyrun run --rm` of /bin/true against `runc run` of the
//! same bundle, interleaved, medians and ratios.
//!
//! `cargo bench --bench start`. Needs root and runc.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use lazyrun::bench::measure::median;
use serde_json::{Value, json};
use support::fixture::Fixture;
use support::instance::Lazyrun;

const ROUNDS: usize = 15;

fn main() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let image = fixture.image();
    let bare = ["run", "--rm", "--network", "none", &image, "true"];
    let bridged = ["run", "--rm", &image, "true"];
    // The first start records a profile; from the second on the view is read without FUSE.
    (0..3).for_each(|_| drop(lazyrun.ok(&bare)));
    let root = lazyrun.scratch("root");
    lazyrun.ok(&["mount", "--rw", &image, root.to_str().expect("a path in UTF-8")]);
    let bundle = lazyrun.scratch("bundle");
    fs::write(bundle.join("config.json"), config(&lazyrun, &image, &root).to_string())
        .expect("write a bundle");

    let mut samples: [Vec<f64>; 3] = Default::default();
    for round in 0..ROUNDS {
        let mut runc = Command::new("runc");
        runc.args(["run", "-b"]).arg(&bundle).arg(format!("lazyrun-bench-{round}"));
        for (all, mut command) in
            samples.iter_mut().zip([runc, lazyrun.command(&bare), lazyrun.command(&bridged)])
        {
            let began = Instant::now();
            let output = command.output().expect("start a container");
            assert!(output.status.success(), "{output:?}");
            all.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    lazyrun.ok(&["umount", root.to_str().expect("a path in UTF-8")]);
    let [runc, bare, bridged] = samples.map(|all| median(&all).unwrap_or(f64::NAN));
    println!("medians of {ROUNDS}");
    println!("runc run                    {runc:6.1} ms");
    println!("lazyrun run, network none   {bare:6.1} ms  {:.2} x", bare / runc);
    println!("lazyrun run, bridge         {bridged:6.1} ms  {:.2} x", bridged / runc);
}

/// The spec that lazyrun makes for the image, for runc on a mount of it.
fn config(lazyrun: &Lazyrun, image: &str, root: &Path) -> Value {
    let id = lazyrun.ok(&["run", "-d", "--network", "none", image, "true"]);
    let path = lazyrun.root().join("containers").join(id.trim()).join("config.json");
    let mut config: Value =
        serde_json::from_slice(&fs::read(path).expect("read the bundle")).expect("a spec in JSON");
    lazyrun.ok(&["rm", "-f", id.trim()]);
    config["root"]["path"] = json!(root);
    // The name files of that container are gone with it.
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["type"] != "bind");
    }
    if let Some(linux) = config["linux"].as_object_mut() {
        linux.remove("cgroupsPath");
    }
    config
}
