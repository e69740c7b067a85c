//! A small real image of three layers, made for each test: busybox and what a union must get right.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lazyrun::demo::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout};
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Bytes of `/data/big.bin`, which do not compress.
pub const BIG: usize = 24 << 20;
/// The image's tag.
pub const TAG: &str = "v1";
/// The tag of another version of it, whose layer with `/data` has a file more, in front of the others.
pub const NEXT_TAG: &str = "v2";

/// A command that reads some pages from the middle of `/data/big.bin`.
pub const READ_MIDDLE: [&str; 6] =
    ["dd", "if=/data/big.bin", "of=/dev/null", "bs=4096", "skip=3000", "count=40"];

/// The image's layout and a registry that serves it.
pub struct Fixture {
    /// Counts and shapes; dropping it takes the image off the network.
    pub registry: Registry,
    /// The layers, bottom first.
    pub layers: Vec<LayerBlob>,
    dir: TempDir,
}

impl Fixture {
    /// The image on an unshaped link.
    pub fn new() -> Fixture {
        Fixture::shaped(Shape::default())
    }

    /// The image on a link of this shape.
    pub fn shaped(shape: Shape) -> Fixture {
        let (dir, layers) = image();
        let registry = Registry::serve(dir.path(), shape).expect("serve the image");
        Fixture { registry, layers, dir }
    }

    /// The image behind a user and a password.
    pub fn guarded(user: &str, password: &str) -> Fixture {
        let (dir, layers) = image();
        let registry = Registry::serve_guarded(dir.path(), Shape::default(), user, password);
        Fixture { registry: registry.expect("serve the image"), layers, dir }
    }

    /// The image's reference.
    pub fn image(&self) -> String {
        self.registry.reference("fixture", TAG)
    }

    /// The layout's directory.
    pub fn layout(&self) -> &Path {
        self.dir.path()
    }

    /// The file of a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    /// Compressed bytes of all layers.
    pub fn compressed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

/// `BIG` bytes that do not compress, always the same.
pub fn big() -> Vec<u8> {
    noise(1, BIG)
}

/// sha256 in hexadecimal, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from xorshift64*: no pattern, no dependency, the same everywhere.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// What writes a layer.
pub type Part = fn(&mut Layer) -> io::Result<()>;

fn write_layer(layout: &Layout, part: Part, encoding: Encoding) -> LayerBlob {
    let mut layer = Layer { tar: tar::Builder::new(layout.layer(encoding).expect("start a layer")) };
    part(&mut layer).expect("write a layer");
    layer.tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer")
}

fn image() -> (TempDir, Vec<LayerBlob>) {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let parts: [Part; 3] = [base, data, changes];
    let encodings = [Encoding::Gzip(6), Encoding::Gzip(4), Encoding::Plain];
    let write = |(part, encoding)| write_layer(&layout, part, encoding);
    let layers: Vec<LayerBlob> = parts.into_iter().zip(encodings).map(write).collect();
    layout.add_image(TAG, &layers, &settings()).expect("write the manifest");
    (dir, layers)
}

/// The layout of an image of busybox and a layer with these files in `/data`, under [`TAG`].
pub fn with_files(files: &[(String, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let lower = write_layer(&layout, base, Encoding::Gzip(6));
    let mut upper = Layer { tar: tar::Builder::new(layout.layer(Encoding::Gzip(4)).expect("start a layer")) };
    upper.dir("data", 0o755).expect("write a layer");
    for (name, content) in files {
        upper.file(&format!("data/{name}"), 0o644, content).expect("write a layer");
    }
    let upper = upper.tar.into_inner().and_then(LayerWriter::finish).expect("finish a layer");
    layout.add_image(TAG, &[lower, upper], &settings()).expect("write the manifest");
    dir
}

/// The layout of an image of busybox and one more layer, under [`TAG`].
pub fn on_busybox(part: Part) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let layers = [base, part].map(|part: Part| write_layer(&layout, part, Encoding::Gzip(1)));
    layout.add_image(TAG, &layers, &settings()).expect("write the manifest");
    dir
}

/// The layout of both versions of the image.
pub fn two_versions() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the images");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let base = write_layer(&layout, base, Encoding::Gzip(6));
    let old = write_layer(&layout, data, Encoding::Gzip(4));
    let more: Part = |layer| {
        layer.dir("data", 0o755)?;
        layer.file("data/another", 0o644, &noise(77, 3_000_001))?;
        data(layer)
    };
    let new = write_layer(&layout, more, Encoding::Gzip(4));
    layout.add_image(TAG, &[base.clone(), old], &settings()).expect("write a manifest");
    layout.add_image(NEXT_TAG, &[base, new], &settings()).expect("write a manifest");
    dir
}

/// The layout of an image that does nothing, for a long time.
pub fn sleeping() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory for the image");
    let mut layout = Layout::create(dir.path()).expect("create a layout");
    let layer = write_layer(&layout, base, Encoding::Gzip(6));
    let cmd = vec!["/bin/sleep".into(), "100000".into()];
    layout.add_image(TAG, &[layer], &ImageSettings { cmd, ..settings() }).expect("write the manifest");
    dir
}

fn settings() -> ImageSettings {
    ImageSettings {
        cmd: vec!["/bin/sh".into(), "-c".into(), "echo the default command".into()],
        env: vec!["PATH=/usr/local/bin:/bin:/usr/bin".into(), "GREETING=hello".into()],
        workdir: "/data".into(),
        ..ImageSettings::default()
    }
}

/// A layer under construction.
pub struct Layer {
    tar: tar::Builder<LayerWriter>,
}

impl Layer {
    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(1_700_000_000);
        header
    }

    /// Extended attributes for the next entry.
    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> io::Result<()> {
        self.tar.append_pax_extensions(records.iter().copied())
    }

    /// A directory.
    pub fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.tar.append_data(&mut Self::header(tar::EntryType::Directory, mode, 0), path, io::empty())
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let mut header = Self::header(tar::EntryType::Regular, mode, content.len() as u64);
        self.tar.append_data(&mut header, path, content)
    }

    /// A regular file of `size` bytes that come from elsewhere.
    pub fn stream(&mut self, path: &str, size: u64, content: impl io::Read) -> io::Result<()> {
        let mut header = Self::header(tar::EntryType::Regular, 0o644, size);
        self.tar.append_data(&mut header, path, content)
    }

    /// A symlink (the target is kept as it is) or a hard link (the target is a path of the layer).
    pub fn link(&mut self, kind: tar::EntryType, path: &str, target: &str) -> io::Result<()> {
        // A hard link's entry repeats the attributes of its file, and containerd applies them once more.
        let mode = if kind == tar::EntryType::Link { 0o644 } else { 0o777 };
        self.tar.append_link(&mut Self::header(kind, mode, 0), path, target)
    }

    /// A device or fifo.
    pub fn node(&mut self, kind: tar::EntryType, path: &str, device: (u32, u32)) -> io::Result<()> {
        let mut header = Self::header(kind, 0o640, 0);
        header.set_device_major(device.0)?;
        header.set_device_minor(device.1)?;
        self.tar.append_data(&mut header, path, io::empty())
    }
}

fn base(layer: &mut Layer) -> io::Result<()> {
    const APPLETS: &[&str] = &[
        "cat",
        "chmod",
        "chown",
        "cp",
        "cut",
        "dd",
        "echo",
        "env",
        "false",
        "find",
        "grep",
        "head",
        "hostname",
        "httpd",
        "id",
        "ip",
        "kill",
        "ln",
        "ls",
        "md5sum",
        "mkdir",
        "mount",
        "mv",
        "nc",
        "ping",
        "ps",
        "pwd",
        "readlink",
        "rm",
        "seq",
        "sh",
        "sha256sum",
        "sleep",
        "sort",
        "stat",
        "stty",
        "tail",
        "test",
        "touch",
        "tr",
        "true",
        "tty",
        "umount",
        "uname",
        "wc",
        "wget",
    ];
    let busybox = fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox"));
    let busybox = busybox.expect("a static busybox is needed: apt-get install busybox-static");
    for (path, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("var", 0o755),
    ] {
        layer.dir(path, mode)?;
    }
    layer.file("bin/busybox", 0o755, &busybox)?;
    for applet in APPLETS {
        layer.link(tar::EntryType::Symlink, &format!("bin/{applet}"), "busybox")?;
    }
    layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n")?;
    layer.file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    layer.file("etc/removed", 0o644, b"a later layer removes this\n")?;
    layer.dir("var/opaque", 0o755)?;
    layer.file("var/opaque/below", 0o644, b"hidden by the opaque directory\n")?;
    layer.dir("var/becomes-file", 0o755)?;
    layer.file("var/becomes-file/inside", 0o644, b"gone\n")?;
    layer.file("var/becomes-dir", 0o644, b"gone\n")
}

fn data(layer: &mut Layer) -> io::Result<()> {
    layer.dir("data", 0o755)?;
    layer.dir("data/small", 0o755)?;
    for i in 0..300 {
        layer.file(&format!("data/small/{i:03}"), 0o644, &noise(1000 + i, 64 + 37 * i as usize))?;
    }
    layer.file("data/first", 0o644, b"before the big file\n")?;
    layer.file("data/big.bin", 0o644, &big())?;
    layer.file("data/last", 0o644, b"behind the big file\n")?;
    layer.link(tar::EntryType::Link, "data/last-again", "data/last")?;
    layer.pax(&[("mtime", b"1700000000.123456789"), ("SCHILY.xattr.user.note", b"kept")])?;
    layer.file("data/attributes", 0o4755, b"setuid, nanoseconds, xattr\n")?;
    layer.link(tar::EntryType::Symlink, "data/dangling", "/no/such/file")?;
    layer.node(tar::EntryType::Fifo, "data/fifo", (0, 0))?;
    layer.node(tar::EntryType::Char, "data/null", (1, 3))?;
    layer.pax(&[("path", format!("data/{}", "n".repeat(255)).as_bytes())])?;
    layer.file("data/long", 0o600, b"a name of 255 bytes\n")?;
    layer.file("data/empty", 0o644, b"")
}

fn changes(layer: &mut Layer) -> io::Result<()> {
    // As real layers do; containerd gives a directory that a layer leaves out the time of unpacking.
    for dir in ["data", "etc", "usr", "var"] {
        layer.dir(dir, 0o755)?;
    }
    layer.file("etc/.wh.removed", 0o644, b"")?;
    layer.dir("var/opaque", 0o711)?;
    layer.file("var/opaque/.wh..wh..opq", 0o644, b"")?;
    layer.file("var/opaque/above", 0o644, b"seen\n")?;
    layer.file("var/becomes-file", 0o644, b"a file now\n")?;
    layer.dir("var/becomes-dir", 0o755)?;
    layer.file("var/becomes-dir/inside", 0o644, b"a directory now\n")?;
    layer.file("data/first", 0o600, b"replaced\n")?;
    layer.dir("usr/local", 0o755)?;
    layer.dir("usr/local/bin", 0o755)?;
    layer.file("usr/local/bin/hello", 0o755, b"#!/bin/sh\necho \"$GREETING from a script\"\n")
}

/// Breaks a file in the middle: one byte changed, the length kept.
pub fn corrupt(path: &Path) {
    let mut bytes = fs::read(path).expect("read a blob");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    fs::write(path, bytes).expect("write a blob");
}

/// Cuts a file in half.
pub fn truncate(path: &Path) {
    let file = fs::OpenOptions::new().write(true).open(path).expect("open a blob");
    let len = file.metadata().expect("a blob's length").len();
    file.set_len(len / 2).expect("cut a blob");
}

/// A file of the given content.
pub fn write(path: &Path, content: &str) {
    fs::File::create(path).and_then(|mut file| file.write_all(content.as_bytes())).expect("write a file");
}
