//! Makes the first inputs of each target, in `corpus/TARGET`, of the odd layers and of what is written here.
//!
//! `cargo run --example seeds` in this folder; `make fuzz` does it.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use lazyrun_index::{Compression, StreamOptions, index_layer};

/// Larger blobs make slow seeds.
const MAX: usize = 16 << 10;

/// Inputs that begin with the byte telling what they are.
const OCI: [&str; 15] = [
    r#"hBearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#,
    r#"hNegotiate, basic realm="a\"b" , BEARER realm = https://a.example/x?y=z ,scope="""#,
    r#"t{"token":"abc","access_token":"def","expires_in":300,"issued_at":"2020-01-01T00:00:00Z"}"#,
    "rdebian",
    "rr.example:5000/a/b.c__d-e:tag.1@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "r[::1]:5000/a:b",
    "rindex.docker.io/library/a",
    r#"d{"auths":{"https://r.example/v1/":{"auth":"dTpw"},"x":{"username":"u","password":"p"}},"credsStore":"x"}"#,
    r#"d{"auths":{"r.example":{"identitytoken":"x"}},"credHelpers":{"r.example":"y"}}"#,
    r#"c{"rootfs":{"type":"layers","diff_ids":["sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"]}}"#,
    r#"m{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"application/vnd.docker.container.image.v1+json","size":1,"digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","size":1,"digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}]}"#,
    r#"m{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef","platform":{"os":"linux","architecture":"arm","variant":"v7"}}]}"#,
    r#"a{"schemaVersion":2,"artifactType":"application/vnd.lazyrun.index.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","size":2,"digest":"@L"},"layers":[{"mediaType":"application/vnd.lazyrun.layer-index.v2+zstd","size":9,"digest":"@D","annotations":{"org.lazyrun.index.layer":"@L","org.lazyrun.index.diff-id":"@D"}}],"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":9,"digest":"@M"},"annotations":{"org.lazyrun.index.format":"2","org.lazyrun.index.span-size":"524288"}}"#,
    r#"a{"schemaVersion":2,"artifactType":"application/vnd.amazon.soci.index.v1+json","config":{"mediaType":"application/vnd.amazon.soci.index.v1+json","size":2,"digest":"@L"},"layers":[{"mediaType":"application/octet-stream","size":9,"digest":"@D","annotations":{"com.amazon.soci.image-layer-digest":"@L","com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip"}}],"subject":{"size":9,"digest":"@M"}}"#,
    r#"a{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"@D","artifactType":"application/vnd.amazon.soci.index.v2+json","annotations":{"com.amazon.soci.image-manifest-digest":"@M","org.lazyrun.index.format":"1","org.opencontainers.image.created":"2026-01-01T00:00:00Z"}},{"size":1,"digest":"@L","artifactType":"application/vnd.lazyrun.index.v1+json"}]}"#,
];

/// What tables of contents hold.
const TABLES: [&str; 2] = [
    r#"j{"version":1,"entries":[{"name":"a/","type":"dir","modtime":"2020-01-02T03:04:05.6Z","mode":493,"uid":1,"gid":2,"xattrs":{"user.x":"eQ=="}},{"name":"a/f","type":"reg","size":9000,"mode":420,"offset":100,"digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef","chunkSize":4000,"chunkDigest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},{"name":"a/f","type":"chunk","offset":900,"chunkOffset":4000,"chunkSize":5000,"chunkType":"zeros"},{"name":"a/l","type":"symlink","linkName":"f"},{"name":"a/h","type":"hardlink","linkName":"a/f"},{"name":"n","type":"char","devMajor":1,"devMinor":3},{"name":"p","type":"fifo"},{"name":".prefetch.landmark","type":"reg","size":1,"offset":2000,"chunkSize":1}]}"#,
    r#"j{"version":1,"entries":[{"name":"s","type":"reg","size":300000,"mode":420,"offset":50,"endOffset":99,"chunkSize":100000,"innerOffset":7},{"name":"s","type":"chunk","offset":99,"chunkOffset":100000,"chunkSize":200000,"chunkType":"zeros"},{"name":"e","type":"reg","size":0}],"tarSplitDigest":"sha256:00"}"#,
];

/// Entries of PAX headers: see `pax::archive`.
const PAX: [&[u8]; 5] = [
    b"\x000\x05xpath=a/b\nsize=5\nmtime=-1.5\nuid=4294967294\ngid=0\nSCHILY.xattr.user.x=y\nLIBARCHIVE.xattr.user.z=eA\n",
    b"\x000\x08xGNU.sparse.major=0\nGNU.sparse.minor=1\nGNU.sparse.name=s\nGNU.sparse.size=900\nGNU.sparse.map=1,4,700,4\n",
    b"\x000\x04xGNU.sparse.size=90\nGNU.sparse.numblocks=2\nGNU.sparse.offset=0\nGNU.sparse.numbytes=2\nGNU.sparse.offset=9\nGNU.sparse.numbytes=2\n",
    b"\x001\x00xpath=l\nlinkpath=../t\n\xff2\x00xlinkpath=t\n\xff5\x00gcomment=x\n\xff0\x01xatime=1.5\nctime=1\n",
    b"\x000\x04LA-long-name\n\xff2\x00KA-long-link\n",
];

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = root.join("corpus");
    let put = |target: &str, name: &str, parts: &[&[u8]]| {
        let dir = corpus.join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("seed-{name}")), parts.concat())
    };
    for (i, text) in OCI.iter().enumerate() {
        put("oci", &i.to_string(), &[text.as_bytes()])?;
    }
    for (i, bytes) in PAX.iter().enumerate() {
        put("tar", &format!("pax-{i}"), &[bytes])?;
    }
    for (i, text) in TABLES.iter().enumerate() {
        put("estargz", &i.to_string(), &[text.as_bytes()])?;
        put("chunked", &i.to_string(), &[text.as_bytes()])?;
    }
    for (i, bytes) in lazyrun_fuzz::soci_seeds().iter().enumerate() {
        put("soci", &i.to_string(), &[bytes])?;
    }
    put("chunked", "position", &[b"a12577:3008:29347:1"])?;
    for file in fs::read_dir(root.join("../index/tests/data/tables"))? {
        let file = file?;
        let (name, blob) = (file.file_name(), fs::read(file.path())?);
        let target = match Compression::detect(&blob) {
            Compression::Gzip => "estargz",
            Compression::Zstd => "chunked",
            Compression::None => continue,
        };
        let name = name.to_string_lossy();
        put(target, &name, &[b"b", &blob])?;
        let tail = &blob[blob.len().saturating_sub(72)..];
        put(target, &format!("tail-{name}"), &[b"t", &(blob.len() as u64).to_le_bytes(), tail])?;
    }
    for blob in fs::read_dir(root.join("../tests/oddlayers/layout/blobs/sha256"))? {
        let blob = blob?;
        let name = blob.file_name().to_string_lossy()[..16].to_owned();
        let bytes = fs::read(blob.path())?;
        if bytes.len() > MAX {
            continue;
        }
        match (Compression::detect(&bytes), bytes.first()) {
            (Compression::None, Some(b'{')) if bytes.windows(8).any(|w| w == b"\"rootfs\"") => {
                put("oci", &name, &[b"c", &bytes])?;
            }
            (Compression::None, Some(b'{')) => put("oci", &name, &[b"m", &bytes])?,
            (Compression::None, _) => put("tar", &name, &[&bytes])?,
            (Compression::Zstd, _) => {
                put("zstd", &name, &[&bytes])?;
                put("zstd", &format!("behind-{name}"), &[b"\0", &bytes])?;
            }
            (Compression::Gzip, _) => {
                put("gzip", &name, &[&bytes])?;
                let end = bytes.len().saturating_sub(8);
                put("gzip", &format!("raw-{name}"), &[b"\0", bytes.get(10..end).unwrap_or_default()])?;
                let mut tar = Vec::new();
                let gunzip = flate2::read::MultiGzDecoder::new(&bytes[..]);
                if gunzip.take(MAX as u64 + 1).read_to_end(&mut tar).is_ok() && tar.len() <= MAX {
                    put("tar", &name, &[&tar])?;
                    put("gzip", &format!("content-{name}"), &[b"\x01\x06\x03", &tar])?;
                    put("zstd", &format!("content-{name}"), &[b"\x01\x06\x03", &tar])?;
                }
            }
        }
        let mut index = io::Cursor::new(Vec::new());
        let options = StreamOptions { span_size: 4096, span_len: 1 << 16, max_span_len: 1 << 17, ..StreamOptions::default() };
        if index_layer(&bytes[..], &mut (), &mut index, &options).is_ok_and(|summary| summary.entries > 0) {
            put("index", &name, &[index.get_ref()])?;
        }
    }
    Ok(())
}
