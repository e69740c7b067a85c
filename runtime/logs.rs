//! What the daemon says: to the terminal or journal that started it, or into `daemon.log`, which is cut into files of
//! bounded size.
//!
//! The log is rotated by whoever writes it, by renaming. Every line is one write in append mode, so a process that still
//! has the old file open loses nothing; the daemon's own standard output and error follow at once, so that its children
//! and panics end up in the new file, and the keeper's before it says something or starts a daemon.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Bytes of a log file after which the next one is begun.
pub const MAX_SIZE: u64 = 10 << 20;
/// Files that are kept, the current one included.
pub const FILES: usize = 3;

/// What is logged where nobody says otherwise.
const DEFAULT_LEVEL: &str = "info";
/// Libraries below us that would log headers and URLs, which hold secrets. Nobody can switch that on.
const MUTED: [&str; 7] = ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tower", "want"];

/// How log lines look (`--log-format`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Format {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Json => "json",
        }
    }
}

/// Starts to log to standard error; if that is `file`, it is rotated. A level that makes no sense is `info`, and that is
/// logged.
pub fn init(file: &Path, level: Option<&str>, format: Format) {
    let wanted = level.filter(|level| !level.is_empty()).unwrap_or(DEFAULT_LEVEL);
    let parsed = EnvFilter::try_new(wanted);
    let mistake = parsed.as_ref().err().map(ToString::to_string);
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new(DEFAULT_LEVEL)).and(filter_fn(is_fit_for_logs));
    let rotating = is_stderr(file).then(|| Rotating::open(file, MAX_SIZE, FILES)).and_then(Result::ok);
    let writer = rotating.map_or(Writer::Stderr, Writer::Rotating);
    let lines = fmt::layer().with_writer(writer).with_ansi(false);
    let lines = match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
    if let Some(error) = mistake {
        tracing::warn!(level = wanted, error, "this log level makes no sense; info is used");
    }
}

fn is_fit_for_logs(of: &tracing::Metadata<'_>) -> bool {
    let library = of.target().split("::").next().unwrap_or_default();
    *of.level() <= tracing::Level::WARN || !MUTED.contains(&library)
}

/// Whether standard error is this file.
pub fn is_stderr(path: &Path) -> bool {
    is_open_as(io::stderr().as_fd(), path)
}

/// Has standard output and error go to the file that has this name now.
pub fn follow(path: &Path) {
    let file = OpenOptions::new().create(true).append(true).open(path);
    if let Ok(file) = file.as_ref()
        && !is_open_as(io::stderr().as_fd(), path)
    {
        redirect(file);
    }
}

fn is_open_as(fd: BorrowedFd<'_>, path: &Path) -> bool {
    match (nix::sys::stat::fstat(fd), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.st_dev, open.st_ino) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn redirect(file: &File) {
    for number in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: dup2 takes two numbers; the file behind 1 and 2 is replaced, which is the aim, the numbers stay open.
        unsafe { libc::dup2(file.as_raw_fd(), number) };
    }
}

enum Writer {
    Stderr,
    Rotating(Rotating),
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        match self {
            Writer::Stderr => Box::new(io::stderr()),
            Writer::Rotating(log) => Box::new(log),
        }
    }
}

/// A file that becomes `NAME.1` when it is full, and that `NAME.2` after the next time.
#[derive(Debug)]
pub struct Rotating {
    path: PathBuf,
    limit: u64,
    files: usize,
    /// Whether standard output and error are to follow.
    is_stderr: bool,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    file: File,
    /// Bytes after which to look at the size again.
    left: u64,
}

impl Rotating {
    /// Appends to `path`; `limit` bytes a file, `files` of them.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(path: &Path, limit: u64, files: usize) -> io::Result<Rotating> {
        let file = append_to(path)?;
        // Looked at before the first line.
        let current = Mutex::new(Current { file, left: 0 });
        Ok(Rotating { path: path.to_owned(), limit, files, is_stderr: is_stderr(path), current })
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let len = line.len() as u64;
        if current.left < len {
            // Children write here too, so only the file itself knows how long it is.
            let size = current.file.metadata()?.len();
            if size > 0 && size + len > self.limit {
                // Better a log that is too long than none.
                if let Ok(file) = self.rotate() {
                    current.file = file;
                }
            }
            let size = current.file.metadata()?.len();
            current.left = self.limit.saturating_sub(size).max(len) / 4 + len;
        }
        current.left -= len;
        current.file.write_all(line)
    }

    fn rotate(&self) -> io::Result<File> {
        let name = |number: usize| match number {
            0 => self.path.clone(),
            _ => {
                let mut name = self.path.clone().into_os_string();
                name.push(format!(".{number}"));
                PathBuf::from(name)
            }
        };
        for number in (0..self.files.saturating_sub(1)).rev() {
            match std::fs::rename(name(number), name(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let file = append_to(&self.path)?;
        if self.is_stderr {
            redirect(&file);
        }
        Ok(file)
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

impl Write for &Rotating {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.append(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_is_lost_and_no_file_grows_for_ever() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("daemon.log");
        std::fs::write(&path, "before\n").expect("write");
        let log = Rotating::open(&path, 1000, 3).expect("open");
        // Somebody else has the file open the whole time, as a child of the daemon would.
        let mut child = append_to(&path).expect("open");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let log = &log;
                scope.spawn(move || {
                    for line in 0..10 {
                        let text = format!("{thread} {line} {}\n", "x".repeat(60));
                        (&*log).write_all(text.as_bytes()).expect("write");
                    }
                });
            }
        });
        child.write_all(b"from a child\n").expect("write");
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        let files = [read("daemon.log.2"), read("daemon.log.1"), read("daemon.log")];
        let all = files.concat();
        assert!(files.iter().all(|file| file.len() <= 1100 && !file.is_empty()), "{files:?}");
        assert!(all.starts_with("before\n") && all.contains("from a child\n"), "{all}");
        for thread in 0..4 {
            let lines = all.lines().filter(|line| line.starts_with(&format!("{thread} ")));
            let numbers: Vec<&str> = lines.filter_map(|line| line.split(' ').nth(1)).collect();
            assert_eq!(numbers, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], "in order and whole");
        }
        for _ in 0..100 {
            (&log).write_all(format!("{}\n", "y".repeat(99)).as_bytes()).expect("write");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 3);
        assert!(!read("daemon.log.2").contains('x'), "the oldest are gone");
    }
}
