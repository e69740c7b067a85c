//! An OCI registry for one image layout on loopback: manifests by tag or digest, blobs with ranges, pull only.
//! It stands behind a [`Shaper`], which counts and, when asked, slows.
//!
//! Every repository name is accepted; tags are the layout's `org.opencontainers.image.ref.name` annotations.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ACCEPT_RANGES, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE, WWW_AUTHENTICATE,
};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use super::shaper::{self, LoggedRequest, Shape, Shaper, Traffic};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// No manifest is larger in any real registry (the distribution's own limit).
const MAX_MANIFEST: u64 = 4 << 20;
const CHUNK: usize = 64 * 1024;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A running registry; it stops when dropped.
pub struct Registry {
    shaper: Shaper,
    runtime: Option<Runtime>,
}

impl Registry {
    /// Serves the OCI layout `layout` on a free loopback port over a link of the given shape.
    ///
    /// # Errors
    /// When the layout's `index.json` cannot be read or no port can be had.
    pub fn serve(layout: &Path, shape: Shape) -> io::Result<Registry> {
        Registry::start(Content::open(layout, None)?, shape)
    }

    /// As [`Registry::serve`], but answers 401 unless the client brings this user and password (Basic).
    ///
    /// # Errors
    /// As [`Registry::serve`].
    pub fn serve_guarded(layout: &Path, shape: Shape, user: &str, password: &str) -> io::Result<Registry> {
        let wanted = format!("Basic {}", base64(format!("{user}:{password}").as_bytes()));
        Registry::start(Content::open(layout, Some(wanted))?, shape)
    }

    fn start(content: Content, shape: Shape) -> io::Result<Registry> {
        let runtime = shaper::runtime("registry")?;
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let guard = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        drop(guard);
        runtime.spawn(accept(listener, Arc::new(content)));
        Ok(Registry { shaper: Shaper::start(addr, shape)?, runtime: Some(runtime) })
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.shaper.addr()
    }

    /// The reference of an image here: `127.0.0.1:PORT/NAME:TAG`.
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.addr())
    }

    /// What passed since the start or the last [`Registry::reset`].
    pub fn stats(&self) -> Traffic {
        self.shaper.traffic()
    }

    /// The requests since the start or the last [`Registry::reset`], oldest first.
    pub fn log(&self) -> Vec<LoggedRequest> {
        self.shaper.log()
    }

    /// Sets the counters to zero and empties the log.
    pub fn reset(&self) {
        self.shaper.reset();
    }

    /// The shaper in front of it.
    pub fn shaper(&self) -> &Shaper {
        &self.shaper
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Deserialize)]
struct LayoutIndex {
    manifests: Vec<LayoutManifest>,
}

#[derive(Deserialize)]
struct LayoutManifest {
    digest: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// What there is to serve.
struct Content {
    blobs: PathBuf,
    /// Digest of the manifest that a tag names.
    tags: HashMap<String, String>,
    authorization: Option<String>,
}

impl Content {
    fn open(layout: &Path, authorization: Option<String>) -> io::Result<Content> {
        let index: LayoutIndex = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
        let tag = |manifest: LayoutManifest| {
            let tag = manifest.annotations.get(REF_NAME).map_or("latest", String::as_str);
            (tag.to_owned(), manifest.digest)
        };
        let tags = index.manifests.into_iter().map(tag).collect();
        Ok(Content { blobs: layout.join("blobs/sha256"), tags, authorization })
    }

    /// The file of a digest; `None` for what is no sha256 digest, so that a name never leaves the layout.
    fn file(&self, digest: &str) -> Option<PathBuf> {
        let hex = digest.strip_prefix("sha256:")?;
        let valid = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        valid.then(|| self.blobs.join(hex))
    }
}

async fn accept(listener: TcpListener, content: Arc<Content>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let content = content.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let content = content.clone();
                async move { Ok::<_, Infallible>(respond(&content, &request).await) }
            });
            // A client that hangs up in the middle is ordinary; there is nobody to tell.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn respond(content: &Content, request: &Request<Incoming>) -> Response<Body> {
    let head = match *request.method() {
        Method::GET => false,
        Method::HEAD => true,
        _ => return failure(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED"),
    };
    if let Some(wanted) = &content.authorization {
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        if given != Some(wanted) {
            let mut answer = failure(StatusCode::UNAUTHORIZED, "UNAUTHORIZED");
            let challenge = hyper::header::HeaderValue::from_static("Basic realm=\"registry\"");
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return answer;
        }
    }
    let path = request.uri().path();
    if path == "/v2/" || path == "/v2" {
        return json(StatusCode::OK, "{}");
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return failure(StatusCode::NOT_FOUND, "NAME_UNKNOWN") };
    let answer = if let Some((_, reference)) = rest.rsplit_once("/manifests/") {
        manifest(content, reference, head).await
    } else if let Some((_, digest)) = rest.rsplit_once("/blobs/") {
        let range = request.headers().get(RANGE).and_then(|value| value.to_str().ok());
        blob(content, digest, range, head).await
    } else {
        Ok(failure(StatusCode::NOT_FOUND, "NAME_UNKNOWN"))
    };
    answer.unwrap_or_else(|_| failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"))
}

async fn manifest(content: &Content, reference: &str, head: bool) -> io::Result<Response<Body>> {
    let unknown = || failure(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    let digest = content.tags.get(reference).map_or(reference, String::as_str);
    let Some(path) = content.file(digest) else { return Ok(unknown()) };
    let Ok(file) = File::open(&path).await else { return Ok(unknown()) };
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST).read_to_end(&mut bytes).await?;
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(&bytes) else { return Ok(unknown()) };
    let media_type = value.get("mediaType").and_then(|value| value.as_str()).unwrap_or(MANIFEST);
    let builder = Response::builder()
        .header(CONTENT_TYPE, media_type)
        .header(CONTENT_LENGTH, bytes.len())
        .header("docker-content-digest", digest);
    Ok(finish(builder, if head { empty() } else { full(bytes) }))
}

async fn blob(
    content: &Content,
    digest: &str,
    range: Option<&str>,
    head: bool,
) -> io::Result<Response<Body>> {
    let unknown = || failure(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
    let Some(path) = content.file(digest) else { return Ok(unknown()) };
    let Ok(mut file) = File::open(&path).await else { return Ok(unknown()) };
    let size = file.metadata().await?.len();
    let builder = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header("docker-content-digest", digest)
        .header(ACCEPT_RANGES, "bytes");
    let (start, end, builder) = match range.map_or(RangeRequest::Whole, |value| parse_range(value, size)) {
        RangeRequest::Whole => (0, size, builder),
        RangeRequest::Part(start, end) => {
            let value = format!("bytes {start}-{}/{size}", end - 1);
            (start, end, builder.status(StatusCode::PARTIAL_CONTENT).header(CONTENT_RANGE, value))
        }
        RangeRequest::Unsatisfiable => {
            let builder = builder.status(StatusCode::RANGE_NOT_SATISFIABLE);
            return Ok(finish(builder.header(CONTENT_RANGE, format!("bytes */{size}")), empty()));
        }
    };
    let builder = builder.header(CONTENT_LENGTH, end - start);
    if head {
        return Ok(finish(builder, empty()));
    }
    file.seek(SeekFrom::Start(start)).await?;
    Ok(finish(builder, file_body(file, end - start)))
}

#[derive(Debug, PartialEq)]
enum RangeRequest {
    Whole,
    /// From the first to one past the last byte.
    Part(u64, u64),
    Unsatisfiable,
}

/// One range of RFC 9110, section 14; several ranges or anything odd are answered with the whole, as it allows.
fn parse_range(value: &str, size: u64) -> RangeRequest {
    let Some((first, last)) = value.strip_prefix("bytes=").and_then(|spec| spec.split_once('-')) else {
        return RangeRequest::Whole;
    };
    let (start, end) = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first > last => return RangeRequest::Whole,
        (Ok(first), Ok(last)) => (first, last.saturating_add(1).min(size)),
        (Ok(first), Err(_)) if last.is_empty() => (first, size),
        (Err(_), Ok(suffix)) if first.is_empty() => (size.saturating_sub(suffix), size),
        _ => return RangeRequest::Whole,
    };
    if start >= end { RangeRequest::Unsatisfiable } else { RangeRequest::Part(start, end) }
}

fn file_body(file: File, len: u64) -> Body {
    let chunks = stream::try_unfold((file, len), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        let len = file.read(&mut chunk).await?;
        if len == 0 {
            // The file shrank: breaking the connection is the only honest end of a response with a length.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        chunk.truncate(len);
        Ok(Some((Frame::data(Bytes::from(chunk)), (file, left - len as u64))))
    });
    BodyExt::boxed_unsync(StreamBody::new(chunks))
}

fn failure(status: StatusCode, code: &str) -> Response<Body> {
    json(status, &format!(r#"{{"errors":[{{"code":"{code}","message":"{status}"}}]}}"#))
}

fn json(status: StatusCode, text: &str) -> Response<Body> {
    let builder = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/json")
        .header("docker-distribution-api-version", "registry/2.0");
    finish(builder, full(text.to_owned().into_bytes()))
}

fn finish(builder: hyper::http::response::Builder, body: Body) -> Response<Body> {
    // Only a header that cannot be encoded fails here; the media type of a manifest is the one foreign value.
    builder.body(body).unwrap_or_else(|_| {
        let mut response = Response::new(empty());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |all, &b| (all << 8) | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { digit.into() } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::layout::{Encoding, ImageSettings, Layout};
    use std::io::{Read, Write};

    fn layout() -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = Layout::create(dir.path()).unwrap();
        let mut writer = layout.layer(Encoding::Plain).unwrap();
        writer.write_all(&[42; 1024]).unwrap();
        let layer = writer.finish().unwrap();
        layout.add_image("v1", std::slice::from_ref(&layer), &ImageSettings::default()).unwrap();
        (dir, layer.digest)
    }

    /// One request on a connection of its own: status line and heads, body.
    fn request(addr: SocketAddr, request: &str) -> (String, Vec<u8>) {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        write!(stream, "{request}\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        let end = all.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        (String::from_utf8(all[..end].to_vec()).unwrap(), all[end + 4..].to_vec())
    }

    #[test]
    fn serves_manifest_blob_and_range() {
        let (dir, digest) = layout();
        let registry = Registry::serve(dir.path(), Shape::default()).unwrap();
        let (head, body) = request(registry.addr(), "GET /v2/any/name/manifests/v1 HTTP/1.1");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains(MANIFEST), "{head}");
        assert!(String::from_utf8(body).unwrap().contains(&digest));
        let (head, body) = request(registry.addr(), &format!("GET /v2/n/blobs/{digest} HTTP/1.1"));
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(body, [42; 1024]);
        let part = format!("GET /v2/n/blobs/{digest} HTTP/1.1\r\nRange: bytes=10-19");
        let (head, body) = request(registry.addr(), &part);
        assert!(head.starts_with("HTTP/1.1 206"), "{head}");
        assert!(head.contains("content-range: bytes 10-19/1024"), "{head}");
        assert_eq!(body, [42; 10]);
        let (head, _) =
            request(registry.addr(), &format!("GET /v2/n/blobs/{digest} HTTP/1.1\r\nRange: bytes=2000-"));
        assert!(head.starts_with("HTTP/1.1 416"), "{head}");
        let (head, _) = request(registry.addr(), "GET /v2/n/manifests/none HTTP/1.1");
        assert!(head.starts_with("HTTP/1.1 404"), "{head}");
        let (head, body) = request(registry.addr(), &format!("HEAD /v2/n/blobs/{digest} HTTP/1.1"));
        assert!(head.contains("content-length: 1024") && body.is_empty(), "{head}");
        assert_eq!(registry.stats().requests, 6);
        assert_eq!(registry.log()[2].range.as_deref(), Some("bytes=10-19"));
    }

    #[test]
    fn guards_with_basic_authentication() {
        let (dir, _) = layout();
        let registry = Registry::serve_guarded(dir.path(), Shape::default(), "me", "secret").unwrap();
        let (head, _) = request(registry.addr(), "GET /v2/n/manifests/v1 HTTP/1.1");
        assert!(head.starts_with("HTTP/1.1 401") && head.contains("Basic realm"), "{head}");
        let allowed = "GET /v2/n/manifests/v1 HTTP/1.1\r\nAuthorization: Basic bWU6c2VjcmV0";
        let (head, _) = request(registry.addr(), allowed);
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    }

    #[test]
    fn refuses_names_that_are_no_digest() {
        let (dir, _) = layout();
        let registry = Registry::serve(dir.path(), Shape::default()).unwrap();
        for name in ["sha256:../../index.json", "sha256:", "../index.json"] {
            let (head, _) = request(registry.addr(), &format!("GET /v2/n/blobs/{name} HTTP/1.1"));
            assert!(head.starts_with("HTTP/1.1 404"), "{name}: {head}");
        }
    }

    #[test]
    fn ranges_follow_the_rfc() {
        assert_eq!(parse_range("bytes=0-0", 10), RangeRequest::Part(0, 1));
        assert_eq!(parse_range("bytes=5-", 10), RangeRequest::Part(5, 10));
        assert_eq!(parse_range("bytes=-3", 10), RangeRequest::Part(7, 10));
        assert_eq!(parse_range("bytes=5-99", 10), RangeRequest::Part(5, 10));
        assert_eq!(parse_range("bytes=10-", 10), RangeRequest::Unsatisfiable);
        assert_eq!(parse_range("bytes=1-2,4-5", 10), RangeRequest::Whole);
        assert_eq!(parse_range("bytes=3-1", 10), RangeRequest::Whole);
        assert_eq!(parse_range("lines=1-2", 10), RangeRequest::Whole);
    }

    #[test]
    fn base64_pads() {
        assert_eq!(["", "f", "fo", "foo"].map(|s| base64(s.as_bytes())), ["", "Zg==", "Zm8=", "Zm9v"]);
    }
}
