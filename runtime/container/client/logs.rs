//! `logs`: reading a container's json-file log, once or following it.

use crate::container::error::{Attempt, Result};
use crate::container::shim::LogEntry;
use crate::container::sys;
use crate::container::time::parse_rfc3339;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest line of a log that is read, in bytes; a line of the shim's is at most about 100 KiB.
const LONGEST_LINE: u64 = 1 << 20;

/// What of a log to show.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// Go on with what comes until the container has ended.
    pub follow: bool,
    /// Only so many last lines.
    pub tail: Option<usize>,
    /// Only what came at or after this time: RFC 3339, seconds since 1970, or an age like `10m`, `1h30m`.
    pub since: Option<String>,
    /// Only what came at or before this time, in the same forms.
    pub until: Option<String>,
    /// Put the time before each line.
    pub timestamps: bool,
}

/// Writes a log's lines to `out` and `err`. `ended` is asked whether more can come: when following, reading
/// stops once it says true and everything has been shown.
///
/// # Errors
/// A time cannot be understood, the log cannot be read, or a writer fails.
pub fn read_logs(
    log: &Path,
    options: &LogOptions,
    ended: &dyn Fn() -> bool,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<()> {
    let bound = |text: &Option<String>| text.as_deref().map(parse_time).transpose();
    let mut show = Show { since: bound(&options.since)?, until: bound(&options.until)?, options, out, err };
    let file = match File::open(log) {
        // A container that was never started has no log yet.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !options.follow => return Ok(()),
        opened => opened.attempt(|| format!("open the log {}", log.display()))?,
    };
    let watch = if options.follow { Some(Watch::new(log)?) } else { None };
    let mut lines = Lines { reader: BufReader::new(file), partial: Vec::new() };
    if let Some(tail) = options.tail {
        let mut last: VecDeque<LogEntry> = VecDeque::new();
        while let Some(entry) = lines.next()? {
            if show.wants(&entry) && tail > 0 {
                if last.len() == tail {
                    last.pop_front();
                }
                last.push_back(entry);
            }
        }
        for entry in &last {
            show.entry(entry)?;
        }
    }
    loop {
        // Asked before reading, so that what was written before the end is never missed.
        let over = ended();
        while let Some(entry) = lines.next()? {
            if show.wants(&entry) {
                show.entry(&entry)?;
            }
        }
        show.flush()?;
        match &watch {
            Some(watch) if !over => watch.wait()?,
            _ => return Ok(()),
        }
    }
}

struct Show<'a> {
    options: &'a LogOptions,
    since: Option<i128>,
    until: Option<i128>,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
}

impl Show<'_> {
    fn wants(&self, entry: &LogEntry) -> bool {
        if self.since.is_none() && self.until.is_none() {
            return true;
        }
        let time = parse_rfc3339(&entry.time).unwrap_or(0);
        self.since.is_none_or(|s| time >= s) && self.until.is_none_or(|u| time <= u)
    }

    fn entry(&mut self, entry: &LogEntry) -> Result<()> {
        let to = if entry.stream == "stderr" { &mut *self.err } else { &mut *self.out };
        let stamp = if self.options.timestamps { format!("{} ", entry.time) } else { String::new() };
        to.write_all(stamp.as_bytes())
            .and_then(|()| to.write_all(entry.log.as_bytes()))
            .attempt(|| "write the log")
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush().and_then(|()| self.err.flush()).attempt(|| "write the log")
    }
}

/// Complete lines of a file that grows.
struct Lines {
    reader: BufReader<File>,
    partial: Vec<u8>,
}

impl Lines {
    /// The next entry that is there in full. Lines that are no entries are skipped.
    fn next(&mut self) -> Result<Option<LogEntry>> {
        use std::io::Read;
        loop {
            let room = LONGEST_LINE - (self.partial.len() as u64).min(LONGEST_LINE);
            let read = self.reader.by_ref().take(room).read_until(b'\n', &mut self.partial);
            let n = read.attempt(|| "read the log")?;
            let complete = self.partial.ends_with(b"\n");
            if !complete && self.partial.len() as u64 >= LONGEST_LINE {
                self.partial.clear();
                continue;
            }
            if !complete {
                debug_assert!(n as u64 <= LONGEST_LINE);
                return Ok(None);
            }
            let line = std::mem::take(&mut self.partial);
            if let Ok(entry) = serde_json::from_slice(&line) {
                return Ok(Some(entry));
            }
        }
    }
}

/// Wakes when the log grows, and now and then, because a container can end without writing.
struct Watch(OwnedFd);

impl Watch {
    fn new(log: &Path) -> Result<Self> {
        let what = || format!("watch the log {}", log.display());
        let inotify = sys::inotify().attempt(what)?;
        sys::inotify_watch(inotify.as_fd(), log, libc::IN_MODIFY).attempt(what)?;
        if let Some(dir) = log.parent() {
            // exit.json appears beside the log.
            sys::inotify_watch(inotify.as_fd(), dir, libc::IN_MOVED_TO).attempt(what)?;
        }
        Ok(Self(inotify))
    }

    fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(1000u16)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).attempt(|| "watch the log"),
        }
        // Only the waking counts.
        let mut events = [0u8; 4096];
        let _ = nix::unistd::read(&self.0, &mut events);
        Ok(())
    }
}

/// Nanoseconds since the epoch of a time as users write it.
fn parse_time(text: &str) -> Result<i128> {
    if let Some(time) = parse_rfc3339(text) {
        return Ok(time);
    }
    if let Some((secs, fraction)) = Some(text.split_once('.').unwrap_or((text, "0"))) {
        let digits = |s: &str| !s.is_empty() && s.len() <= 18 && s.bytes().all(|b| b.is_ascii_digit());
        if digits(secs) && digits(fraction) {
            let padded = format!("{fraction:0<9}");
            let nanos: i128 = padded.get(..9).and_then(|p| p.parse().ok()).unwrap_or(0);
            return Ok(secs.parse::<i128>().unwrap_or(0) * 1_000_000_000 + nanos);
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let age = parse_age(text).ok_or_else(|| {
        crate::container::error::ContainerError::Invalid(format!("\"{text}\" is neither a time nor an age"))
    })?;
    Ok(i128::try_from(now).unwrap_or(i128::MAX) - age)
}

/// Nanoseconds of `1h30m`, `90s`, `500ms`.
fn parse_age(text: &str) -> Option<i128> {
    let mut rest = text;
    let mut total = 0i128;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: i128 = rest.get(..digits.min(15))?.parse().ok()?;
        rest = rest.get(digits..)?;
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit = match rest.get(..letters)? {
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            _ => return None,
        };
        total += number * unit;
        rest = rest.get(letters..)?;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        file
    }

    const LINES: &str = r#"{"log":"a\n","stream":"stdout","time":"2024-01-01T00:00:00.000000001Z"}
{"log":"b\n","stream":"stderr","time":"2024-01-01T00:00:01Z"}
nonsense
{"log":"c\n","stream":"stdout","time":"2024-01-01T00:00:02Z"}
{"log":"unfinished"#;

    fn show(options: &LogOptions) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        read_logs(log(LINES).path(), options, &|| true, &mut out, &mut err).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn streams_tails_and_times() {
        assert_eq!(show(&LogOptions::default()), ("a\nc\n".into(), "b\n".into()));
        assert_eq!(show(&LogOptions { tail: Some(1), ..Default::default() }), ("c\n".into(), String::new()));
        assert_eq!(show(&LogOptions { tail: Some(0), ..Default::default() }), Default::default());
        let since = Some("2024-01-01T00:00:01Z".to_owned());
        let got = show(&LogOptions { since, timestamps: true, ..Default::default() });
        assert_eq!(got, ("2024-01-01T00:00:02Z c\n".into(), "2024-01-01T00:00:01Z b\n".into()));
    }

    #[test]
    fn following_sees_what_comes_until_the_end() {
        let mut file = log(LINES);
        let path = file.path().to_path_buf();
        let finished = std::sync::atomic::AtomicBool::new(false);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let options = LogOptions { follow: true, tail: Some(0), ..Default::default() };
            let done = &finished;
            let reader = scope.spawn(move || {
                read_logs(
                    &path,
                    &options,
                    &|| done.load(std::sync::atomic::Ordering::SeqCst),
                    &mut out,
                    &mut err,
                )
                .unwrap();
                out
            });
            file.write_all(b" line\\n\",\"stream\":\"stdout\",\"time\":\"2024-01-01T00:00:03Z\"}\n").unwrap();
            finished.store(true, std::sync::atomic::Ordering::SeqCst);
            let out = reader.join().unwrap();
            // Whether the tail was cut before or after the new line came is a race; nothing else may come.
            assert!(out.is_empty() || out == b"unfinished line\n");
        });
    }

    #[test]
    fn ages() {
        assert_eq!(parse_age("1h30m"), Some(5_400_000_000_000));
        assert_eq!(parse_age("500ms"), Some(500_000_000));
        for bad in ["", "5", "m", "1y", "-1s"] {
            assert_eq!(parse_age(bad), None, "{bad}");
        }
        assert_eq!(parse_time("1700000000.5").unwrap(), 1_700_000_000_500_000_000);
    }
}
