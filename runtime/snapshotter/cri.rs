//! The kubelet's image service (CRI), forwarded to containerd as it comes. With a pod's image goes its pull secret, which
//! containerd uses and tells no snapshotter: who pulls lazily has to have seen it on its way.

use std::future::poll_fn;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use lazyrun_fetcher::{Keychain, PullSecret, Reference, Trial};
use prost::Message as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::codegen::http::{HeaderMap, Request, Response};

use crate::containerd::Containerd;
use crate::daemon::Daemon;

/// Of the CRI that kubelets speak, and of what those before Kubernetes 1.26 did.
const SERVICES: [&str; 2] = ["runtime.v1.ImageService", "runtime.v1alpha2.ImageService"];
/// Bytes of the longest request to pull an image, and of its answer.
const MAX_PULL: usize = 1 << 20;
/// Bytes of a message's length and kind, before it (gRPC over HTTP2, "Length-Prefixed-Message").
const FRAME: usize = 5;

/// CRI's `PullImageRequest`, as far as it matters here.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct PullImage {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

impl std::fmt::Debug for PullImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PullImage({:?}, {:?})", self.image, self.auth)
    }
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthConfig(…)")
    }
}

/// Who forwards.
#[derive(Clone)]
pub(super) struct Cri {
    containerd: Containerd,
    daemon: Arc<Daemon>,
}

impl Cri {
    pub(super) fn new(containerd: Containerd, daemon: Arc<Daemon>) -> Self {
        Cri { containerd, daemon }
    }

    /// Whether a gRPC service is one that is forwarded.
    pub(super) fn serves(service: &str) -> bool {
        SERVICES.contains(&service)
    }

    /// Answers a request as containerd does.
    pub(super) async fn call(&self, request: Request<Incoming>) -> Response<Body> {
        let pull = request.uri().path().ends_with("/PullImage");
        let answer = match pull {
            true => self.pull(request).await,
            false => self.forward(request.map(Body::new)).await,
        };
        answer.unwrap_or_else(Status::into_http)
    }

    async fn forward(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let mut channel = self.containerd.channel();
        let answer = match poll_fn(|cx| channel.poll_ready(cx)).await {
            Ok(()) => channel.call(request).await,
            Err(error) => Err(error),
        };
        answer.map_err(|error| Status::unavailable(self.containerd.unreachable(&error).to_string()))
    }

    async fn pull(&self, request: Request<Incoming>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, MAX_PULL).collect().await;
        let body = body.map_err(|e| Status::resource_exhausted(format!("the request to pull: {e}")))?;
        let body = body.to_bytes();
        let keychain = self.daemon.images().keychain();
        let trial = secret_of(&body).map(|(image, secret)| keychain.try_out(&image, secret));
        let request = Request::from_parts(head, Body::new(Full::new(body)));
        let (head, answer) = self.forward(request).await?.into_parts();
        // Whether it succeeded is said behind the answer, which comes when all has been pulled.
        let answer = Limited::new(answer, MAX_PULL).collect().await;
        let answer =
            answer.map_err(|e| Status::unavailable(format!("containerd's answer broke off: {e}")))?;
        let behind = answer.trailers().cloned();
        if let Some(trial) = trial.filter(|_| succeeded(behind.as_ref().unwrap_or(&head.headers))) {
            self.take(keychain, trial).await;
        }
        let answer = Full::new(answer.to_bytes()).with_trailers(async move { behind.map(Ok) });
        Ok(Response::from_parts(head, Body::new(answer)))
    }

    async fn take(&self, keychain: &Arc<Keychain>, trial: Trial) {
        if !trial.succeeded() {
            return;
        }
        let (daemon, keychain) = (Arc::clone(&self.daemon), Arc::clone(keychain));
        let kept = tokio::task::spawn_blocking(move || daemon.keep_secrets(&keychain)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(%error, "pull secrets will be lost with this daemon");
        }
    }
}

fn succeeded(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| status.as_bytes() == b"0")
}

/// The image and the secret of a request to pull, by containerd's own rules for what an `AuthConfig` means.
fn secret_of(body: &Bytes) -> Option<(Reference, PullSecret)> {
    let (frame, message) = body.split_at_checked(FRAME)?;
    if frame[0] != 0 {
        tracing::warn!("a request to pull is compressed: its pull secret is not seen");
        return None;
    }
    let PullImage { image, auth } = PullImage::decode(message).ok()?;
    let image: Reference = image?.image.parse().ok()?;
    let secret = auth.filter(|auth| is_for(&auth.server_address, &image.registry)).and_then(secret)?;
    Some((image, secret))
}

fn secret(auth: AuthConfig) -> Option<PullSecret> {
    if !auth.username.is_empty() {
        return Some(PullSecret::password(auth.username, auth.password));
    }
    if !auth.identity_token.is_empty() {
        return Some(PullSecret::identity_token(auth.identity_token));
    }
    if !auth.auth.is_empty() {
        let text = String::from_utf8(STANDARD.decode(auth.auth).ok()?).ok()?;
        let (user, password) = text.split_once(':')?;
        return Some(PullSecret::password(user.to_owned(), password.trim_end_matches('\0').to_owned()));
    }
    (!auth.registry_token.is_empty()).then(|| PullSecret::registry_token(auth.registry_token))
}

/// Whether a secret that names a server, as a host or a URL, is for the registry.
fn is_for(server: &str, registry: &str) -> bool {
    let rest = server.strip_prefix("https://").or_else(|| server.strip_prefix("http://")).unwrap_or(server);
    let host = rest.split('/').next().unwrap_or_default();
    let hub = ["docker.io", "index.docker.io", "registry-1.docker.io"];
    server.is_empty() || host == registry || (registry == "docker.io" && hub.contains(&host))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(image: &str, auth: Option<AuthConfig>) -> Bytes {
        let message = PullImage { image: Some(ImageSpec { image: image.to_owned() }), auth }.encode_to_vec();
        let mut body = vec![0];
        body.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        body.extend_from_slice(&message);
        body.into()
    }

    #[test]
    fn secrets_are_read_as_containerd_reads_them() {
        let password = |user: &str, password: &str| PullSecret::password(user.into(), password.into());
        let auth = AuthConfig::default;
        for (given, meant) in [
            (
                AuthConfig { username: "u".into(), password: "p".into(), auth: "x".into(), ..auth() },
                Some(password("u", "p")),
            ),
            (AuthConfig { auth: "dTpwOnE=".into(), ..auth() }, Some(password("u", "p:q"))),
            (AuthConfig { auth: "no base64".into(), ..auth() }, None),
            (
                AuthConfig { identity_token: "t".into(), ..auth() },
                Some(PullSecret::identity_token("t".into())),
            ),
            (
                AuthConfig { registry_token: "t".into(), ..auth() },
                Some(PullSecret::registry_token("t".into())),
            ),
            (auth(), None),
        ] {
            let seen = secret_of(&framed("r.example/x:1", Some(given)));
            assert_eq!(seen, meant.map(|secret| ("r.example/x:1".parse().unwrap(), secret)));
        }
        assert_eq!(secret_of(&framed("redis", None)), None);
    }

    #[test]
    fn a_secret_for_another_server_is_not_used() {
        for (server, image, is) in [
            ("https://r.example", "r.example/x", true),
            ("r.example", "r.example/x", true),
            ("https://r.example/v2/", "r.example/x", true),
            ("https://index.docker.io/v1/", "redis", true),
            ("r.example:5000", "r.example/x", false),
            ("https://s.example", "r.example/x", false),
            ("https://docker.io.example", "redis", false),
        ] {
            let auth =
                AuthConfig { username: "u".into(), server_address: server.into(), ..AuthConfig::default() };
            assert_eq!(secret_of(&framed(image, Some(auth))).is_some(), is, "{server} {image}");
        }
    }

    #[test]
    fn nonsense_is_no_secret() {
        for body in [&b""[..], &[0, 0, 0], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 2, 0xff, 0xff]] {
            assert_eq!(secret_of(&Bytes::copy_from_slice(body)), None);
        }
        let auth = AuthConfig { username: "u".into(), ..AuthConfig::default() };
        assert_eq!(secret_of(&framed("NO REFERENCE", Some(auth))), None);
    }
}
