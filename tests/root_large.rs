//! Large things through real starts: files beyond 4 GiB, directories of 100,000, long paths, many containers of one image.

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};

use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;

use crate::support::fixture::{BIG, Fixture, Layer, TAG, big, on_busybox, sha256};
use crate::support::instance::Lazyrun;

const HUGE: u64 = (4 << 30) + (300 << 20) + 7;
/// Where the huge file is no zeros: at its beginning, beyond what 32 bits count, at its end.
const MARKS: [(u64, &[u8]); 3] =
    [(0, b"the first bytes"), ((4 << 30) + 4095, b"beyond four GiB"), (HUGE - 14, b"the last bytes")];
const MANY: usize = 100_000;
/// Directories in each other; with their names a path of over 3,600 bytes.
const DEPTH: usize = 190;
const DEEP_NAME: &str = "a-name-of-18-bytes";

/// Zeros, with marks.
struct Huge {
    at: u64,
}

impl Read for Huge {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(usize::try_from(HUGE - self.at).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..len];
        buffer.fill(0);
        for (offset, mark) in MARKS {
            for (i, byte) in (offset..).zip(mark) {
                if let Some(place) =
                    i.checked_sub(self.at).and_then(|i| buffer.get_mut(usize::try_from(i).ok()?))
                {
                    *place = *byte;
                }
            }
        }
        self.at += len as u64;
        Ok(len)
    }
}

fn deep() -> String {
    [DEEP_NAME].repeat(DEPTH).join("/")
}

fn large(layer: &mut Layer) -> std::io::Result<()> {
    layer.dir("data", 0o755)?;
    layer.stream("data/huge", HUGE, Huge { at: 0 })?;
    layer.dir("data/many", 0o755)?;
    for i in 0..MANY {
        layer.file(&format!("data/many/{i:06}"), 0o644, if i % 1000 == 0 { b"some" } else { b"" })?;
    }
    layer.file(&format!("data/deep/{}/end", deep()), 0o644, b"far down\n")
}

/// What the container is asked: sizes, marks, the directory as a whole, single ones of it, and the far end.
fn questions() -> String {
    let mut script = "stat -c %s huge; ".to_owned();
    for (offset, mark) in MARKS {
        script += &format!("dd if=huge bs=1 skip={offset} count={} 2>/dev/null; echo; ", mark.len());
    }
    script += "dd if=huge bs=4096 skip=1048577 count=1 2>/dev/null | tr -d '\\0' | wc -c; ";
    script +=
        "ls many | wc -l; ls many | sha256sum; cat many/000000 many/099000; test -e many/100000 || echo; ";
    script += "cd deep; while cd * 2>/dev/null; do :; done; cat end; pwd | wc -c";
    format!("cd /data; {script}")
}

fn answers() -> String {
    let names: String = (0..MANY).map(|i| format!("{i:06}\n")).collect();
    let marks: Vec<_> = MARKS.iter().map(|(_, mark)| String::from_utf8_lossy(mark)).collect();
    let path = "/data/deep/".len() + deep().len() + "\n".len();
    format!(
        "{HUGE}\n{}\n14\n{MANY}\n{}  -\nsomesome\nfar down\n{path}\n",
        marks.join("\n"),
        sha256(names.as_bytes())
    )
}

#[test]
fn large_files_directories_and_paths_are_whole_by_every_plan() {
    let layout = on_busybox(large);
    let registry = Registry::serve(layout.path(), Shape::default()).expect("serve the image");
    let image = registry.reference("large", TAG);
    let lazyrun = Lazyrun::new();
    for plan in ["erofs", "overlay", "fuse"] {
        let run = ["run", "--rm", "--network", "none", "--union", plan, &image, "sh", "-c", &questions()];
        assert_eq!(lazyrun.ok(&run), answers(), "plan {plan}");
    }
}

/// 64 containers of one image are started at once: the image is fetched once, and all see the same.
#[test]
fn many_containers_share_a_view() {
    const CONTAINERS: usize = 64;
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let (image, expected) = (fixture.image(), format!("{}  /data/big.bin\n", sha256(&big())));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < CONTAINERS) {
                    let name = format!("one-of-many-{i}");
                    let script = format!("echo {i} >/data/own; sha256sum /data/big.bin; exec sleep 1000");
                    let run =
                        ["run", "-d", "--name", &name, "--network", "none", &image, "sh", "-c", &script];
                    lazyrun.ok(&run);
                }
            });
        }
    });
    for i in 0..CONTAINERS {
        let name = format!("one-of-many-{i}");
        let script = "cat /data/own; sha256sum /data/big.bin";
        assert_eq!(lazyrun.ok(&["exec", &name, "sh", "-c", script]), format!("{i}\n{expected}"));
    }
    let fetched = fixture.registry.stats().bytes_down;
    assert!(fetched < fixture.compressed() + BIG as u64 / 8, "{fetched} bytes were fetched");
    // Each page is asked for once by the view that all share, and again when another test drops the page cache.
    let (requests, pages) = (lazyrun.info()["fuse_requests"].as_u64().expect("a number"), BIG / 4096);
    assert!(requests < 16 * pages as u64, "{requests} requests for {pages} pages in {CONTAINERS} containers");
}
