//! What a view has read is in the page cache once, not in its layer files as well.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{BIG, Fixture, TAG, big};
use crate::support::instance::Lazyrun;
use crate::support::wait_for;

const PAGE: u64 = 4096;
/// The kernel asks the server for as much at once.
const READAHEAD: u64 = 128 << 10;
/// Pages that stay of the big file: the kernel takes single pages of anything back now and then.
const MOST_PAGES: u64 = BIG as u64 / PAGE * 9 / 10;
/// Requests for those that don't, one each; for the whole file there are more.
const FEW: u64 = BIG as u64 / READAHEAD * 3 / 4;

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

/// Other tests drop the page cache of the whole machine now and then, and with it what is looked for here.
fn at_some_time(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let tries: Vec<_> = (0..6).map_while(|_| holds().err()).collect();
    assert!(tries.len() < 6, "never: {what}: {tries:#?}");
}

fn most_stay(file: &Path) -> Result<(), String> {
    let own = cached_pages(file).expect("cachestat");
    (own >= MOST_PAGES).then_some(()).ok_or_else(|| format!("{own} pages"))
}

fn wait_until_dropped(lazyrun: &Lazyrun) {
    wait_for("layer files to leave the page cache", Duration::from_secs(60), || {
        (pages_of_layers(lazyrun) == 0).then_some(())
    });
}

fn mounted(lazyrun: &Lazyrun, image: &str, options: &[&str]) -> PathBuf {
    let at = lazyrun.scratch("mounted");
    fs::create_dir_all(&at).expect("a mount point");
    lazyrun.ok(&[&["mount"], options, &[image, &at.display().to_string()]].concat());
    at
}

fn leave_the_page_cache(plan: &str) {
    let ((_registry, image), lazyrun) = (indexed(), Lazyrun::new());
    let at = mounted(&lazyrun, &image, &["--hydrate", "never", "--union", plan]);
    let file = at.join("data/big.bin");
    at_some_time("the view's own pages stay", || {
        read(&at);
        wait_until_dropped(&lazyrun);
        most_stay(&file)
    });
    let before = requests(&lazyrun);
    let_go(&file);
    read(&at);
    assert!(requests(&lazyrun) - before >= BIG as u64 / READAHEAD, "it was there twice");
    at_some_time("what is there is not asked for", || {
        read(&at);
        let before = requests(&lazyrun);
        read(&at);
        few(requests(&lazyrun) - before)
    });
}

fn few(requests: u64) -> Result<(), String> {
    (requests <= FEW).then_some(()).ok_or_else(|| format!("{requests} requests"))
}

#[test]
fn layer_files_below_erofs_leave_the_page_cache_when_reads_pause() {
    leave_the_page_cache("erofs");
}

#[test]
fn layer_files_of_plan_overlay_leave_the_page_cache_when_reads_pause() {
    leave_the_page_cache("overlay");
}

#[test]
fn layer_files_that_are_read_directly_leave_the_page_cache() {
    let (fixture, lazyrun) = (Fixture::new(), Lazyrun::new());
    lazyrun.ok(&["pull", "--quiet", &fixture.image()]);
    let at = mounted(&lazyrun, &fixture.image(), &["--union", "erofs"]);
    let before = requests(&lazyrun);
    at_some_time("the view's own pages stay", || {
        read(&at);
        wait_until_dropped(&lazyrun);
        most_stay(&at.join("data/big.bin"))
    });
    assert_eq!(requests(&lazyrun), before, "it was to be read without FUSE");
    read(&at);
}

#[test]
fn they_stay_where_that_is_asked_for() {
    let ((_registry, image), lazyrun) = (indexed(), Lazyrun::new().with_options(&["--page-cache", "keep"]));
    let at = mounted(&lazyrun, &image, &["--hydrate", "never", "--union", "erofs"]);
    at_some_time("the layer file is in the page cache", || {
        read(&at);
        let before = requests(&lazyrun);
        let_go(&at.join("data/big.bin"));
        read(&at);
        assert!(before >= BIG as u64 / READAHEAD, "it was to be read through FUSE");
        few(requests(&lazyrun) - before)
    });
}

#[test]
fn past_the_page_cache_all_is_right_and_nothing_is_there_twice() {
    let ((_registry, image), lazyrun) = (indexed(), Lazyrun::new().with_options(&["--page-cache", "direct"]));
    let at = mounted(&lazyrun, &image, &["--hydrate", "never", "--union", "erofs"]);
    read(&at);
    let before = requests(&lazyrun);
    let_go(&at.join("data/big.bin"));
    read(&at);
    assert!(requests(&lazyrun) > before, "the layer file was in the page cache");
}

#[test]
fn a_read_that_waits_for_its_registry_holds_nothing_up() {
    let ((registry, image), lazyrun) = (indexed(), Lazyrun::new().with_options(&["--fault-timeout", "120s"]));
    let at = mounted(&lazyrun, &image, &["--hydrate", "never", "--union", "erofs"]);
    let big_file = File::open(at.join("data/big.bin")).expect("open");
    let mut page = vec![0; 4096];
    big_file.read_exact_at(&mut page, 0).expect("a first read");
    registry.signal(Signal::SIGSTOP);
    let waiting = std::thread::spawn(move || big_file.read_exact_at(&mut page, 16 << 20).map(|()| page));
    // Letting go must wait for no page that the registry is to bring,
    wait_until_dropped(&lazyrun);
    // or a daemon that is killed meanwhile could not end, and nobody would take its place.
    let old = lazyrun.daemon_pid().expect("a daemon");
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("kill the daemon");
    wait_for("another daemon", Duration::from_secs(30), || lazyrun.daemon_pid().filter(|new| *new != old));
    assert!(!waiting.is_finished(), "it was to wait for the registry");
    registry.signal(Signal::SIGCONT);
    assert!(waiting.join().expect("the reader").expect("read") == big()[16 << 20..][..4096]);
}
