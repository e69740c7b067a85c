//! What a command will load comes before it asks, without a profile.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lazyrun::demo::layout::{Encoding, ImageSettings, LayerWriter, Layout};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::noise;
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

const TAG: &str = "dynamic";
/// Bytes between all files, so that no two share a span, and behind them, which nobody needs.
const FILLER: usize = 2 << 20;
const REST: usize = 64 << 20;

/// Programs of this machine and the libraries that its dynamic loader finds for them.
fn with_libraries(programs: &[&str]) -> BTreeSet<PathBuf> {
    let mut files: BTreeSet<PathBuf> = programs.iter().map(PathBuf::from).collect();
    for program in programs {
        let told = Command::new("ldd").arg(program).output().expect("run ldd");
        let told = String::from_utf8(told.stdout).expect("text");
        files.extend(told.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    files
}

/// An image of `files`, as they are called here, with much between them.
fn image(files: &BTreeSet<PathBuf>) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let mut tar = tar::Builder::new(layout.layer(Encoding::Gzip(1)).expect("start a layer"));
    let mut add = |path: &Path, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, path.strip_prefix("/").expect("absolute"), content).expect("add a file");
    };
    for (seed, path) in files.iter().enumerate() {
        add(path, 0o755, &std::fs::read(path).expect("read a file of this machine"));
        add(&PathBuf::from(format!("/filler/{seed}")), 0o644, &noise(seed as u64, FILLER));
    }
    add(Path::new("/rest"), 0o644, &noise(1000, REST));
    let layer = tar.into_inner().and_then(LayerWriter::finish).expect("finish the layer");
    layout.add_image(TAG, &[layer], &ImageSettings::default()).expect("write the manifest");
    dir
}

fn rows(lazyrun: &Lazyrun, what: &str, image: &str) -> Vec<Value> {
    let told = lazyrun.ok(&["index", "inspect", what, "--format", "json", image]);
    told.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Bytes of a file of the image that are here, and all of them.
fn local(lazyrun: &Lazyrun, image: &str, path: &str) -> (u64, u64) {
    let number = |value: &Value| value.as_u64().expect("a number");
    let entries = rows(lazyrun, "--entries", image);
    let file = entries.iter().find(|entry| entry["Path"] == path.trim_start_matches('/')).expect(path);
    let start = number(&file["Extents"][0][1]);
    let end = start + number(&file["Size"]);
    let spans = rows(lazyrun, "--spans", image);
    let here = spans.iter().filter(|span| span["Local"] == true).map(|span| {
        let begin = number(&span["Offset"]);
        (begin + number(&span["Size"])).min(end).saturating_sub(begin.max(start))
    });
    (here.sum(), end - start)
}

#[test]
fn what_a_command_will_load_comes_before_it_asks() {
    let files = with_libraries(&["/bin/sh", "/bin/ls"]);
    assert!(files.len() > 5, "{files:?}");
    let (layout, registry) = (image(&files), DockerRegistry::start());
    let name = registry.push(layout.path(), TAG, "dynamic");
    Lazyrun::new().ok(&["index", "push", "--no-profile", &name]);
    let node = Lazyrun::new();
    // The shell ends before it comes to ls: who has it fetched has read the command.
    node.ok(&["run", "--rm", "--network", "none", "--hydrate", "never", &name, "sh", "-c", "exit 0; ls"]);
    for file in &files {
        let path = file.to_str().expect("text");
        wait_for(path, Duration::from_secs(20), || {
            let (here, all) = local(&node, &name, path);
            (here == all || all > 2 << 20).then_some(())
        });
    }
    let (rest, all) = local(&node, &name, "/rest");
    assert!(rest < all / 2, "{rest} of {all} bytes that nobody needs came as well");
}
