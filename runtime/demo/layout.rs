//! Writes OCI image layouts (image-spec, image-layout.md): blobs by digest, `index.json`, `oci-layout`.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// How a layer's tar is stored in its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// gzip of the given level (1 to 9).
    Gzip(u32),
}

/// A finished layer blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerBlob {
    /// sha256 of the blob, as `sha256:<hex>`.
    pub digest: String,
    /// sha256 of the uncompressed tar, as `sha256:<hex>`.
    pub diff_id: String,
    /// Bytes of the blob.
    pub size: u64,
    /// Bytes of the uncompressed tar.
    pub uncompressed: u64,
    /// The blob's media type.
    pub media_type: String,
}

/// What an image's config says beside its layers.
#[derive(Clone, Debug, Default)]
pub struct ImageSettings {
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Env`, each `NAME=value`.
    pub env: Vec<String>,
    /// `WorkingDir`; empty means none.
    pub workdir: String,
    /// `User`; empty means root.
    pub user: String,
}

/// A layout being written.
pub struct Layout {
    dir: PathBuf,
    manifests: Vec<serde_json::Value>,
}

impl Layout {
    /// Starts a layout in `dir`, which is created when missing.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn create(dir: &Path) -> io::Result<Layout> {
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        let layout = Layout { dir: dir.to_owned(), manifests: Vec::new() };
        fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        layout.write_index()?;
        Ok(layout)
    }

    /// The file of a blob.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    /// Starts a layer; the tar is written into it. Several may be written at once.
    ///
    /// # Errors
    /// When no file can be made.
    pub fn layer(&self, encoding: Encoding) -> io::Result<LayerWriter> {
        let file = NamedTempFile::new_in(self.dir.join("blobs/sha256"))?;
        let blob = HashingWriter::new(BufWriter::with_capacity(1 << 18, file));
        let output = match encoding {
            Encoding::Plain => Output::Plain(blob),
            Encoding::Gzip(level) => Output::Gzip(Box::new(GzEncoder::new(blob, Compression::new(level)))),
        };
        Ok(LayerWriter { output, tar: Sha256::new(), uncompressed: 0, blobs: self.dir.join("blobs/sha256") })
    }

    /// Adds an image of these layers (bottom first) under a tag; the manifest's digest is returned.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn add_image(
        &mut self,
        tag: &str,
        layers: &[LayerBlob],
        settings: &ImageSettings,
    ) -> io::Result<String> {
        let mut config = json!({
            "Env": settings.env,
            "Cmd": settings.cmd,
            "WorkingDir": settings.workdir,
            "User": settings.user,
        });
        if !settings.entrypoint.is_empty() {
            config["Entrypoint"] = json!(settings.entrypoint);
        }
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "created": "2026-01-01T00:00:00Z",
            "architecture": architecture(),
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(config.to_string().as_bytes())?;
        let describe = |layer: &LayerBlob| json!({ "mediaType": layer.media_type, "digest": layer.digest, "size": layer.size });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config.0,
                "size": config.1,
            },
            "layers": layers.iter().map(describe).collect::<Vec<_>>(),
        });
        let (digest, size) = self.blob(manifest.to_string().as_bytes())?;
        self.manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": size,
            "annotations": { "org.opencontainers.image.ref.name": tag },
        }));
        self.write_index()?;
        Ok(digest)
    }

    /// Stores a blob and returns its digest and size.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn blob(&self, bytes: &[u8]) -> io::Result<(String, u64)> {
        let digest = format!("sha256:{}", hex(&Sha256::digest(bytes)));
        fs::write(self.blob_path(&digest), bytes)?;
        Ok((digest, bytes.len() as u64))
    }

    fn write_index(&self) -> io::Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        fs::write(self.dir.join("index.json"), index.to_string())
    }
}

/// The host's architecture in the words of the image spec (those of Go).
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A layer under construction; takes the uncompressed tar.
pub struct LayerWriter {
    output: Output,
    tar: Sha256,
    uncompressed: u64,
    blobs: PathBuf,
}

type BlobWriter = HashingWriter<BufWriter<NamedTempFile>>;

enum Output {
    Plain(BlobWriter),
    Gzip(Box<GzEncoder<BlobWriter>>),
}

impl LayerWriter {
    /// Bytes of the blob so far (what the compressor still holds not counted).
    pub fn blob_size(&self) -> u64 {
        match &self.output {
            Output::Plain(blob) => blob.len,
            Output::Gzip(encoder) => encoder.get_ref().len,
        }
    }

    /// Puts the blob under its digest.
    ///
    /// # Errors
    /// When the rest cannot be written or the file not be renamed.
    pub fn finish(self) -> io::Result<LayerBlob> {
        let (blob, suffix) = match self.output {
            Output::Plain(blob) => (blob, ""),
            Output::Gzip(encoder) => (encoder.finish()?, "+gzip"),
        };
        let (size, hash) = (blob.len, hex(&blob.hash.finalize()));
        let file = blob.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
        let path = self.blobs.join(&hash);
        let file: File = file.persist(&path).map_err(|error| error.error)?;
        // Temporary files are private; a registry of another user must be able to read a layout.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok(LayerBlob {
            digest: format!("sha256:{hash}"),
            diff_id: format!("sha256:{}", hex(&self.tar.finalize())),
            size,
            uncompressed: self.uncompressed,
            media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        })
    }
}

impl Write for LayerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.output {
            Output::Plain(blob) => blob.write_all(bytes)?,
            Output::Gzip(encoder) => encoder.write_all(bytes)?,
        }
        self.tar.update(bytes);
        self.uncompressed += bytes.len() as u64;
        Ok(bytes.len())
    }

    /// Nothing: flushing a compressor in the middle would only make the blob larger.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts and hashes what passes.
struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
    len: u64,
}

impl<W> HashingWriter<W> {
    fn new(inner: W) -> HashingWriter<W> {
        HashingWriter { inner, hash: Sha256::new(), len: 0 }
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hash.update(&bytes[..len]);
        self.len += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn gzip_layer_has_both_digests() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let tar = vec![9u8; 100_000];
        let mut writer = layout.layer(Encoding::Gzip(6)).unwrap();
        writer.write_all(&tar).unwrap();
        let layer = writer.finish().unwrap();
        let blob = fs::read(layout.blob_path(&layer.digest)).unwrap();
        assert_eq!(layer.digest, format!("sha256:{}", hex(&Sha256::digest(&blob))));
        assert_eq!(layer.diff_id, format!("sha256:{}", hex(&Sha256::digest(&tar))));
        assert_eq!((layer.size, layer.uncompressed), (blob.len() as u64, 100_000));
        let mut decoded = Vec::new();
        flate2::read::GzDecoder::new(blob.as_slice()).read_to_end(&mut decoded).unwrap();
        assert_eq!(decoded, tar);
    }
}
