//! What a view has read is in the page cache once, not in its layer files as well.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, Fixture, TAG, big};
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

const PAGE: u64 = 4096;
/// The kernel asks the server for as much at once.
const READAHEAD: u64 = 128 << 10;
/// Pages that stay of the big file, and requests for those that don't: where a memory cgroup has a limit, the kernel takes
/// a few pages of anything back.
const MOST_PAGES: u64 = BIG as u64 / PAGE * 9 / 10;
const FEW: u64 = BIG as u64 / READAHEAD / 10;

/// Pages of a file in the page cache, by cachestat(2).
fn cached_pages(path: &Path) -> io::Result<u64> {
    const CACHESTAT: libc::c_long = 451;
    let file = File::open(path)?;
    let (range, mut stat) = ([0u64; 2], [0u64; 5]);
    // SAFETY: the kernel reads two and writes five numbers of 64 bits, as the arrays have.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
    if done == 0 { Ok(stat[0]) } else { Err(io::Error::last_os_error()) }
}

/// Pages of all layer files.
fn pages_of_layers(lazyrun: &Lazyrun) -> u64 {
    let layers = fs::read_dir(lazyrun.root().join("layers")).expect("the layers");
    let data = layers.flatten().map(|layer| layer.path().join("data")).filter(|path| path.exists());
    data.map(|path| cached_pages(&path).expect("cachestat")).sum()
}

fn requests(lazyrun: &Lazyrun) -> u64 {
    lazyrun.info()["fuse_requests"].as_u64().expect("a number of requests")
}

/// An image with its index beside it: its layers are read through FUSE, because nobody has proven the index.
fn indexed() -> (DockerRegistry, String) {
    let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
    let image = registry.push(fixture.layout(), TAG, "fixture");
    Lazyrun::new().ok(&["index", "push", &image]);
    (registry, image)
}

/// Reads the big file of a mount, and is sure that it is right.
fn read(at: &Path) {
    assert!(fs::read(at.join("data/big.bin")).expect("read") == big());
}

fn let_go(path: &Path) {
    let file = File::open(path).expect("open");
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
    assert_eq!(cached_pages(path).expect("cachestat"), 0, "the view's pages stay");
}

#[test]
fn layer_files_leave_the_page_cache_when_reads_pause() {
    let ((_registry, image), lazyrun) = (indexed(), Lazyrun::new());
    for plan in ["erofs", "overlay"] {
        let at = lazyrun.scratch(plan);
        fs::create_dir_all(&at).expect("a mount point");
        let target = at.display().to_string();
        lazyrun.ok(&["mount", "--hydrate", "never", "--union", plan, &image, &target]);
        read(&at);
        wait_for("layer files to leave the page cache", Duration::from_secs(60), || {
            (pages_of_layers(&lazyrun) == 0).then_some(())
        });
        let file = at.join("data/big.bin");
        let own = cached_pages(&file).expect("cachestat");
        assert!(own >= MOST_PAGES, "of the view's own pages only {own} stay");
        let before = requests(&lazyrun);
        read(&at);
        assert!(requests(&lazyrun) - before <= FEW, "plan {plan} asks for what it has");
        // What EROFS reads is not cached below it: without its own pages everything is asked for.
        let_go(&file);
        read(&at);
        assert!(requests(&lazyrun) - before >= BIG as u64 / READAHEAD, "plan {plan} had it twice");
        lazyrun.ok(&["umount", &target]);
    }
}

#[test]
fn layer_files_that_are_read_directly_leave_the_page_cache() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    let at = lazyrun.scratch("direct");
    fs::create_dir_all(&at).expect("a mount point");
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    lazyrun.ok(&["mount", "--union", "erofs", &fixture.image(), &at.display().to_string()]);
    let before = requests(&lazyrun);
    read(&at);
    wait_for("layer files to leave the page cache", Duration::from_secs(60), || {
        (pages_of_layers(&lazyrun) == 0).then_some(())
    });
    let own = cached_pages(&at.join("data/big.bin")).expect("cachestat");
    assert!(own >= MOST_PAGES, "of the view's own pages only {own} stay");
    assert_eq!(requests(&lazyrun), before, "it was to be read without FUSE");
    read(&at);
}

#[test]
fn they_stay_where_that_is_asked_for() {
    let (_registry, image) = indexed();
    let lazyrun = Lazyrun::new().with_options(&["--page-cache", "keep"]);
    let at = lazyrun.scratch("kept");
    fs::create_dir_all(&at).expect("a mount point");
    lazyrun.ok(&["mount", "--hydrate", "never", "--union", "erofs", &image, &at.display().to_string()]);
    read(&at);
    let before = requests(&lazyrun);
    assert!(before >= BIG as u64 / READAHEAD, "it was to be read through FUSE");
    let_go(&at.join("data/big.bin"));
    read(&at);
    assert!(requests(&lazyrun) - before <= FEW, "the layer file was in the page cache");
}

#[test]
fn past_the_page_cache_all_is_right_and_nothing_is_there_twice() {
    let (_registry, image) = indexed();
    let lazyrun = Lazyrun::new().with_options(&["--page-cache", "direct"]);
    let at = lazyrun.scratch("past");
    fs::create_dir_all(&at).expect("a mount point");
    lazyrun.ok(&["mount", "--hydrate", "never", "--union", "erofs", &image, &at.display().to_string()]);
    read(&at);
    let before = requests(&lazyrun);
    let_go(&at.join("data/big.bin"));
    read(&at);
    assert!(requests(&lazyrun) > before, "the layer file was in the page cache");
}
