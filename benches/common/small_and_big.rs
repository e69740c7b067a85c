//! An image of many small files and a big one, and the same files unpacked under overlay2.

#![allow(dead_code, reason = "each bench uses a part")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use lazyrun::demo::layout::{Encoding, ImageSettings, LayerBlob, LayerWriter, Layout};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::support::fixture::noise;

pub(crate) const SMALL_FILES: usize = 20_000;
pub(crate) const PER_DIRECTORY: usize = 100;

/// The same files unpacked, with overlay2 on top.
pub(crate) struct Native {
    /// Where they are seen.
    pub(crate) root: PathBuf,
}

impl Native {
    pub(crate) fn new(dir: &Path, layers: &[(LayerBlob, PathBuf)]) -> io::Result<Native> {
        let path = |name: &str| dir.join("native").join(name);
        for name in ["lower", "upper", "work", "root"] {
            fs::create_dir_all(path(name))?;
        }
        for (layer, blob) in layers {
            let file = io::BufReader::with_capacity(1 << 20, File::open(blob)?);
            if layer.media_type.ends_with("gzip") {
                tar::Archive::new(flate2::read::GzDecoder::new(file)).unpack(path("lower"))?;
            } else {
                tar::Archive::new(file).unpack(path("lower"))?;
            }
        }
        nix::unistd::sync();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower").display(),
            path("upper").display(),
            path("work").display()
        );
        mount(Some("overlay"), &path("root"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        Ok(Native { root: path("root") })
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let _ = umount2(&self.root, MntFlags::MNT_DETACH);
    }
}

/// Writes the image as `latest`; returns its layers and where their blobs are.
pub(crate) fn write_layout(dir: &Path, big_mib: usize) -> io::Result<Vec<(LayerBlob, PathBuf)>> {
    let mut layout = Layout::create(dir)?;
    let header = |kind, mode, size: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_mtime(1_700_000_000);
        header
    };
    let mut tar = tar::Builder::new(layout.layer(Encoding::Gzip(1))?);
    for i in 0..SMALL_FILES {
        let sub = format!("small/{:03}", i / PER_DIRECTORY);
        if i % PER_DIRECTORY == 0 {
            tar.append_data(&mut header(tar::EntryType::Directory, 0o755, 0), &sub, io::empty())?;
        }
        // 100 bytes to 8 KiB, as in a source tree or an interpreter's library.
        let content = noise(i as u64, 100 + (i * 7919) % 8092);
        let path = format!("{sub}/{i:05}");
        tar.append_data(&mut header(tar::EntryType::Regular, 0o644, content.len()), path, &content[..])?;
    }
    let small = tar.into_inner().and_then(LayerWriter::finish)?;
    let mut tar = tar::Builder::new(layout.layer(Encoding::Plain)?);
    let size = big_mib << 20;
    let block = noise(1, 1 << 20);
    let content = Repeated { block: &block, left: size };
    tar.append_data(&mut header(tar::EntryType::Regular, 0o644, size), "big", content)?;
    let big = tar.into_inner().and_then(LayerWriter::finish)?;
    let settings = ImageSettings { cmd: vec!["/big".into()], ..ImageSettings::default() };
    layout.add_image("latest", &[small.clone(), big.clone()], &settings)?;
    Ok([small, big].map(|layer| (layer.clone(), layout.blob_path(&layer.digest))).into())
}

/// One block of noise over and over, up to a length.
struct Repeated<'a> {
    block: &'a [u8],
    left: usize,
}

impl Read for Repeated<'_> {
    fn read(&mut self, mut buffer: &mut [u8]) -> io::Result<usize> {
        let at = self.left % self.block.len();
        let from = if at == 0 { 0 } else { self.block.len() - at };
        let len = buffer.len().min(self.left).min(self.block.len() - from);
        buffer.write_all(&self.block[from..from + len])?;
        self.left -= len;
        Ok(len)
    }
}

/// Opens and reads every small file.
pub(crate) fn read_small_files(root: &Path) -> io::Result<u64> {
    let mut total = 0;
    let mut buffer = vec![0; 16 << 10];
    for i in 0..SMALL_FILES {
        let mut file = File::open(root.join(format!("small/{:03}/{i:05}", i / PER_DIRECTORY)))?;
        loop {
            let len = file.read(&mut buffer)?;
            if len == 0 {
                break;
            }
            total += len as u64;
        }
    }
    Ok(total)
}

/// Reads the big file from end to end.
pub(crate) fn read_sequentially(root: &Path) -> io::Result<u64> {
    let mut file = File::open(root.join("big"))?;
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(total);
        }
        total += len as u64;
    }
}
