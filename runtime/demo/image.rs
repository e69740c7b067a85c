//! Makes a real image of several layers out of the host's own files: a base, an interpreter with its libraries,
//! a small application, and large layers of what else lies under `/usr`. Nothing is padded: a host that has
//! little gives a small image, and its true size is told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::hostfiles::{Candidate, HostFiles, walk};
use super::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout, hex};

/// Raised when the same files would give another image; part of the cache key.
const RECIPE: u32 = 1;
const STAMP: &str = "image.json";
/// The one tag in the layout.
pub const TAG: &str = "latest";
/// Files larger than this stay out of the bulk layers: a few of them would fill a layer.
const MAX_BULK_FILE: u64 = 16 << 20;

/// Why no image could be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Neither interpreter is there.
    #[error(
        "no python3 or perl with its standard library was found on this host: install one (Debian: apt-get install python3)"
    )]
    NoInterpreter,
    /// Reading the host's files or writing the layout failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { what, path, source }
}

/// How large the image should be.
#[derive(Clone, Debug)]
pub struct HostImageOptions {
    /// Compressed bytes that the whole image should have at least, if the host has that much.
    pub compressed: u64,
    /// Number of bulk layers.
    pub bulk_layers: usize,
}

impl Default for HostImageOptions {
    fn default() -> HostImageOptions {
        HostImageOptions { compressed: 210 << 20, bulk_layers: 4 }
    }
}

/// An image made of the host's files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostImage {
    /// The OCI layout directory; the image's tag in it is [`TAG`].
    pub layout: PathBuf,
    /// The command to run: an interpreter program that imports a good part of the standard library.
    pub args: Vec<String>,
    /// The interpreter, such as `python3`.
    pub interpreter: String,
    /// Bottom first.
    pub layers: Vec<LayerBlob>,
    /// Files, links and directories in all layers.
    pub entries: u64,
}

impl HostImage {
    /// Compressed bytes of all layers: what a pull transfers.
    pub fn compressed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }

    /// Uncompressed bytes of all layers.
    pub fn uncompressed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.uncompressed).sum()
    }
}

/// Makes the image below `cache`, or finds the one made there earlier from the same files.
///
/// # Errors
/// When the host has no interpreter or a file cannot be read or written.
pub fn build(cache: &Path, options: &HostImageOptions) -> Result<HostImage, ImageError> {
    let interpreter = Interpreter::find().ok_or(ImageError::NoInterpreter)?;
    let base = base_files();
    let runtime: BTreeSet<PathBuf> = interpreter.files().difference(&base).cloned().collect();
    let mut taken: BTreeSet<PathBuf> = base.union(&runtime).cloned().collect();
    taken.extend(fs::canonicalize(cache));
    let bulk = bulk_groups(&taken, options.bulk_layers);

    let key = cache_key(options, &interpreter, &[&base, &runtime], &bulk);
    let dir = cache.join(key);
    if let Some(image) = cached(&dir) {
        return Ok(image);
    }
    fs::create_dir_all(cache).map_err(io_error("create", cache))?;
    let temporary = tempfile::tempdir_in(cache).map_err(io_error("create a directory in", cache))?;
    let mut image = write_image(temporary.path(), &interpreter, &base, &runtime, &bulk, options)?;
    image.layout.clone_from(&dir);
    let stamp = temporary.path().join(STAMP);
    let text = serde_json::to_vec_pretty(&image).map_err(|error| io_error("write", &stamp)(error.into()))?;
    fs::write(&stamp, text).map_err(io_error("write", &stamp))?;
    // Another run may have been faster; its image is the same.
    match fs::rename(temporary.keep(), &dir) {
        Ok(()) => Ok(image),
        Err(error) => cached(&dir).ok_or_else(|| io_error("create", &dir)(error)),
    }
}

fn cached(dir: &Path) -> Option<HostImage> {
    let image: HostImage = serde_json::from_slice(&fs::read(dir.join(STAMP)).ok()?).ok()?;
    Some(HostImage { layout: dir.to_owned(), ..image })
}

fn write_image(
    dir: &Path,
    interpreter: &Interpreter,
    base: &BTreeSet<PathBuf>,
    runtime: &BTreeSet<PathBuf>,
    bulk: &[Vec<Candidate>],
    options: &HostImageOptions,
) -> Result<HostImage, ImageError> {
    let failed = |error| io_error("write the image in", dir)(error);
    let mut layout = Layout::create(dir).map_err(failed)?;
    let mut entries = 0;
    let mut layers = Vec::new();
    let mut keep = |layer: TarLayer| -> Result<u64, ImageError> {
        let (blob, count) = layer.finish().map_err(failed)?;
        entries += count;
        let size = blob.size;
        layers.push(blob);
        Ok(size)
    };

    let mut layer = TarLayer::start(&layout).map_err(failed)?;
    add_skeleton(&mut layer).map_err(failed)?;
    layer.add_all(base)?;
    let mut size = keep(layer)?;
    let mut layer = TarLayer::start(&layout).map_err(failed)?;
    layer.add_all(runtime)?;
    size += keep(layer)?;

    let share = options.compressed.saturating_sub(size) / bulk.len().max(1) as u64;
    for layer in write_bulk(&layout, bulk, share)? {
        if layer.entries > 0 {
            keep(layer)?;
        }
    }
    let mut layer = TarLayer::start(&layout).map_err(failed)?;
    layer.directory("app", 0o755).map_err(failed)?;
    layer.file(interpreter.script_path(), interpreter.script().as_bytes(), 0o644).map_err(failed)?;
    keep(layer)?;

    let args =
        vec![interpreter.program.to_string_lossy().into_owned(), format!("/{}", interpreter.script_path())];
    let settings = ImageSettings {
        cmd: args.clone(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()],
        workdir: "/".into(),
        ..ImageSettings::default()
    };
    layout.add_image(TAG, &layers, &settings).map_err(failed)?;
    Ok(HostImage { layout: dir.to_owned(), args, interpreter: interpreter.name.to_owned(), layers, entries })
}

/// Writes the bulk layers, each on a thread of its own, until each has its share of compressed bytes.
fn write_bulk(layout: &Layout, bulk: &[Vec<Candidate>], share: u64) -> Result<Vec<TarLayer>, ImageError> {
    let write = |files: &[Candidate]| -> Result<TarLayer, ImageError> {
        let mut layer = TarLayer::start(layout).map_err(io_error("write", Path::new("a layer")))?;
        for file in files {
            if layer.blob_size() >= share {
                break;
            }
            layer.add(&file.path)?;
        }
        Ok(layer)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = bulk.iter().map(|files| scope.spawn(|| write(files))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// What every image needs: the shell and the small tools.
fn base_files() -> BTreeSet<PathBuf> {
    const PROGRAMS: &[&str] = &[
        "bash", "cat", "chmod", "chown", "cp", "date", "dd", "df", "dirname", "du", "echo", "env", "expr",
        "false", "find", "grep", "head", "hostname", "id", "kill", "ln", "ls", "mkdir", "mv", "printf", "ps",
        "pwd", "readlink", "rm", "rmdir", "sed", "seq", "sh", "sleep", "sort", "stat", "tail", "tee", "test",
        "touch", "tr", "true", "uname", "wc", "which", "xargs",
    ];
    let mut files = HostFiles::new();
    for program in PROGRAMS {
        for dir in ["/usr/bin", "/bin"] {
            files.add(&Path::new(dir).join(program));
        }
    }
    for file in ["/etc/ld.so.cache", "/etc/os-release", "/etc/nsswitch.conf", "/usr/share/zoneinfo/UTC"] {
        files.add(Path::new(file));
    }
    files.into_paths()
}

/// The root's directories and links as the host has them, and accounts of the image's own.
fn add_skeleton(layer: &mut TarLayer) -> io::Result<()> {
    for (dir, mode) in [("dev", 0o755), ("etc", 0o755), ("proc", 0o555), ("root", 0o700), ("run", 0o755)] {
        layer.directory(dir, mode)?;
    }
    for (dir, mode) in [("sys", 0o555), ("tmp", 0o1777), ("var", 0o755), ("var/tmp", 0o1777)] {
        layer.directory(dir, mode)?;
    }
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let path = Path::new("/").join(name);
        if let Ok(target) = fs::read_link(&path) {
            layer.symlink(name, &target)?;
        }
    }
    layer.file(
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        0o644,
    )?;
    layer.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644)
}

/// Splits what else lies under `/usr` into groups of about equal size, whole directories together.
fn bulk_groups(taken: &BTreeSet<PathBuf>, count: usize) -> Vec<Vec<Candidate>> {
    let mut found = Vec::new();
    for dir in ["/usr/lib", "/usr/share", "/usr/bin", "/usr/libexec", "/usr/local", "/usr/include"] {
        walk(Path::new(dir), taken, &mut found);
    }
    found.retain(|file| file.size <= MAX_BULK_FILE);
    // /usr/share/doc and the like: the first four components.
    let mut units: BTreeMap<PathBuf, Vec<Candidate>> = BTreeMap::new();
    for file in found {
        let unit = file.path.components().take(4).collect();
        units.entry(unit).or_default().push(file);
    }
    let mut units: Vec<Vec<Candidate>> = units.into_values().collect();
    let size = |files: &[Candidate]| files.iter().map(|file| file.size).sum::<u64>();
    units.sort_by_key(|files| std::cmp::Reverse(size(files)));
    let mut groups = vec![Vec::new(); count.max(1)];
    let mut sizes = vec![0; count.max(1)];
    for unit in units {
        let smallest = (0..sizes.len()).min_by_key(|i| sizes[*i]).unwrap_or(0);
        sizes[smallest] += size(&unit);
        groups[smallest].extend(unit);
    }
    groups
}

fn cache_key(
    options: &HostImageOptions,
    interpreter: &Interpreter,
    sets: &[&BTreeSet<PathBuf>],
    bulk: &[Vec<Candidate>],
) -> String {
    let mut hash = Sha256::new();
    let mut feed = |text: String| {
        hash.update(text.as_bytes());
        hash.update(b"\0");
    };
    feed(format!("{RECIPE} {} {}", options.compressed, interpreter.script()));
    for path in sets.iter().flat_map(|set| set.iter()) {
        let (size, mtime) = fs::symlink_metadata(path).map_or((0, 0), |m| (m.len(), m.mtime()));
        feed(format!("{} {size} {mtime}", path.display()));
    }
    for file in bulk.iter().flatten() {
        feed(format!("{} {} {}", file.path.display(), file.size, file.mtime));
    }
    hex(&hash.finalize()[..8])
}

/// An interpreter of the host.
struct Interpreter {
    name: &'static str,
    program: PathBuf,
    /// Directories of the standard library.
    library: Vec<PathBuf>,
}

impl Interpreter {
    fn find() -> Option<Interpreter> {
        Interpreter::python().or_else(Interpreter::perl)
    }

    fn python() -> Option<Interpreter> {
        let code = "import sysconfig as s; print(s.get_path('stdlib')); print(s.get_path('platstdlib'))";
        Interpreter::ask("python3", &["-I", "-c", code])
    }

    fn perl() -> Option<Interpreter> {
        let code = r#"use Config; print join("\n", @Config{qw(privlibexp archlibexp)})"#;
        let mut perl = Interpreter::ask("perl", &["-e", code])?;
        // Debian splits the core library into a small base and the rest.
        perl.library
            .extend(fs::canonicalize(format!("/usr/lib/{}-linux-gnu/perl-base", std::env::consts::ARCH)));
        Some(perl)
    }

    /// Asks the interpreter where its library is; it prints one directory a line.
    fn ask(name: &'static str, args: &[&str]) -> Option<Interpreter> {
        let program = Path::new("/usr/bin").join(name);
        let output = Command::new(&program).args(args).env_clear().output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let library: BTreeSet<PathBuf> =
            text.lines().filter_map(|line| fs::canonicalize(line).ok()).collect();
        let found = output.status.success() && !library.is_empty();
        found.then(|| Interpreter { name, program, library: library.into_iter().collect() })
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        let mut files = HostFiles::new();
        files.add(&self.program);
        for dir in &self.library {
            files.add_tree(dir, &["site-packages", "dist-packages", "test", "idlelib", "pod"]);
        }
        files.into_paths()
    }

    fn script_path(&self) -> &'static str {
        if self.name == "perl" { "app/main.pl" } else { "app/main.py" }
    }

    fn script(&self) -> &'static str {
        if self.name == "perl" { PERL } else { PYTHON }
    }
}

/// Imports what a usual service imports; a module that a host's build lacks is passed over.
const PYTHON: &str = r#"import importlib, sys
names = """argparse asyncio base64 bisect calendar collections concurrent.futures configparser contextlib copy csv
ctypes dataclasses datetime decimal difflib email.mime.multipart enum fractions functools gzip hashlib heapq hmac
html.parser http.client http.server inspect io itertools json logging.handlers lzma math multiprocessing.pool
operator os pathlib pickle platform pprint queue random re sched secrets select shutil signal smtplib socket
sqlite3 ssl statistics string struct subprocess tarfile tempfile textwrap threading time traceback types typing
unittest.mock urllib.request uuid weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib""".split()
loaded = []
for name in names:
    try:
        loaded.append(importlib.import_module(name))
    except ImportError:
        pass
import json
print("ready:", len(loaded), "modules,", len(sys.modules), "loaded in all, python", sys.version.split()[0], flush=True)
total = sum(len(json.dumps(sorted(vars(module)))) for module in loaded)
print("done:", total, "bytes of names")
"#;

const PERL: &str = r#"my @loaded = grep { eval "require $_; 1" } qw(strict warnings POSIX Socket IO::Socket IO::File Data::Dumper
  Storable List::Util Scalar::Util Time::HiRes Time::Local File::Spec File::Find File::Temp File::Copy Getopt::Long
  Encode MIME::Base64 Digest::MD5 Digest::SHA JSON::PP HTTP::Tiny Text::Wrap Text::ParseWords Term::ANSIColor
  Math::BigInt Math::BigFloat Unicode::Normalize Compress::Zlib IO::Zlib Archive::Tar Sys::Hostname Tie::File);
$| = 1;
print "ready: ", scalar(@loaded), " modules, ", scalar(keys %INC), " files loaded, perl $^V\n";
print "done\n";
"#;

/// A layer of host files under construction.
struct TarLayer {
    tar: tar::Builder<LayerWriter>,
    directories: BTreeSet<PathBuf>,
    /// First path of each file that has several names, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    entries: u64,
}

impl TarLayer {
    fn start(layout: &Layout) -> io::Result<TarLayer> {
        let tar = tar::Builder::new(layout.layer(Encoding::Gzip(6))?);
        Ok(TarLayer { tar, directories: BTreeSet::new(), links: HashMap::new(), entries: 0 })
    }

    fn blob_size(&self) -> u64 {
        self.tar.get_ref().blob_size()
    }

    fn finish(self) -> io::Result<(LayerBlob, u64)> {
        let entries = self.entries;
        Ok((self.tar.into_inner()?.finish()?, entries))
    }

    fn add_all(&mut self, paths: &BTreeSet<PathBuf>) -> Result<(), ImageError> {
        paths.iter().try_for_each(|path| self.add(path))
    }

    /// Adds a file or symlink of the host under the same path, its directories before it.
    fn add(&mut self, path: &Path) -> Result<(), ImageError> {
        self.try_add(path).map_err(io_error("put into a layer the file", path))
    }

    fn try_add(&mut self, path: &Path) -> io::Result<()> {
        // Files may go away, or be none of ours to read, between the walk and now: then the image lacks them.
        let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
        let name = path.strip_prefix("/").unwrap_or(path);
        if metadata.is_dir() {
            return self.parents(&name.join("x"));
        }
        if metadata.is_symlink() {
            self.parents(name)?;
            return self.symlink(name, &fs::read_link(path)?);
        }
        let Ok(file) = File::open(path) else { return Ok(()) };
        self.parents(name)?;
        let mut header = header(&metadata, tar::EntryType::Regular);
        self.entries += 1;
        if metadata.nlink() > 1 {
            let key = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&key) {
                header.set_entry_type(tar::EntryType::Link);
                return self.tar.append_link(&mut header, name, first);
            }
            self.links.insert(key, name.to_owned());
        }
        let size = file.metadata()?.len();
        header.set_size(size);
        self.tar.append_data(&mut header, name, Exactly { file, left: size })
    }

    /// Adds the directories above a path that this layer has not named yet, with the host's attributes.
    fn parents(&mut self, name: &Path) -> io::Result<()> {
        let mut above: Vec<PathBuf> = name.ancestors().skip(1).map(Path::to_owned).collect();
        above.retain(|dir| dir.as_os_str() != OsStr::new(""));
        for dir in above.into_iter().rev() {
            if !self.directories.insert(dir.clone()) {
                continue;
            }
            let metadata = fs::metadata(Path::new("/").join(&dir))?;
            self.entries += 1;
            self.tar.append_data(&mut header(&metadata, tar::EntryType::Directory), &dir, io::empty())?;
        }
        Ok(())
    }

    fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.directories.insert(name.into());
        self.entries += 1;
        self.tar.append_data(&mut plain_header(mode, tar::EntryType::Directory, 0), name, io::empty())
    }

    fn file(&mut self, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        self.entries += 1;
        let mut header = plain_header(mode, tar::EntryType::Regular, content.len() as u64);
        self.tar.append_data(&mut header, name, content)
    }

    fn symlink(&mut self, name: impl AsRef<Path>, target: &Path) -> io::Result<()> {
        self.entries += 1;
        self.tar.append_link(&mut plain_header(0o777, tar::EntryType::Symlink, 0), name, target)
    }
}

fn header(metadata: &fs::Metadata, kind: tar::EntryType) -> tar::Header {
    let mut header = plain_header(metadata.mode() & 0o7777, kind, 0);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header
}

fn plain_header(mode: u32, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(1_767_225_600);
    header
}

/// Exactly as many bytes as the header promised: more are cut off, fewer are an error.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..len])?;
        if read == 0 && len > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file shrank while it was read"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_an_image_and_finds_it_again() {
        let cache = tempfile::tempdir().unwrap();
        let options = HostImageOptions { compressed: 60 << 20, bulk_layers: 2 };
        let image = build(cache.path(), &options).unwrap();
        assert!(image.layers.len() >= 4, "{} layers", image.layers.len());
        assert!(image.compressed() < 120 << 20, "{} bytes", image.compressed());
        let on_disk: u64 = image
            .layers
            .iter()
            .map(|layer| {
                fs::metadata(image.layout.join("blobs/sha256").join(&layer.digest[7..])).unwrap().len()
            })
            .sum();
        assert_eq!(on_disk, image.compressed());
        let again = build(cache.path(), &options).unwrap();
        assert_eq!(again.layout, image.layout);
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1);
    }
}
