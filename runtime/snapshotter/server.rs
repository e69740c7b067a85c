//! The socket that containerd connects to.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::codegen::Service as _;

use super::cri::Cri;
use super::diff::DiffService;
use super::proto::services::diff::v1::diff_server::{self, DiffServer};
use super::proto::services::snapshots::v1::snapshots_server::SnapshotsServer;
use super::service::{Peer, Service};
use crate::containerd::Containerd;
use crate::daemon::Daemon;

/// Most connections at a time; containerd has one.
const MAX_CONNECTIONS: usize = 64;
/// Most requests at a time on one connection; others wait in it.
const MAX_REQUESTS: u32 = 256;

/// Answers containerd on a listening socket until the task is aborted.
///
/// # Errors
/// When the descriptor is no socket.
pub fn serve(daemon: &Arc<Daemon>, listener: OwnedFd) -> Result<JoinHandle<()>> {
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true).context("using the socket for containerd")?;
    let listener = UnixListener::from_std(listener).context("using the socket for containerd")?;
    let snapshots = daemon.snapshots().context("the snapshots are not open")?;
    let containerd = Containerd::at(&snapshots.containerd).context("finding containerd")?;
    let services = Services {
        cri: snapshots.cri.then(|| Cri::new(containerd.clone(), Arc::clone(daemon))),
        snapshots: SnapshotsServer::new(Service::new(Arc::clone(daemon), Arc::clone(snapshots))),
        diff: DiffServer::new(DiffService::new(Arc::clone(snapshots), containerd)),
    };
    Ok(tokio::spawn(accept(listener, services)))
}

/// What is served at the socket.
#[derive(Clone)]
struct Services {
    snapshots: SnapshotsServer<Service>,
    diff: DiffServer<DiffService>,
    cri: Option<Cri>,
}

async fn accept(listener: UnixListener, services: Services) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Ends them all when this task ends.
    let mut open = tokio::task::JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let services = services.clone();
                open.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = answer(stream, services).await {
                        tracing::debug!(%error, "a connection of containerd's broke");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection of containerd's can't be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
        while open.try_join_next().is_some() {}
    }
}

async fn answer(stream: UnixStream, services: Services) -> hyper::Result<()> {
    let peer = Peer(stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid > 0));
    let answer = service_fn(move |mut request: hyper::Request<Incoming>| {
        let Services { mut snapshots, mut diff, cri } = services.clone();
        request.extensions_mut().insert(peer);
        async move {
            let service = request.uri().path().split('/').nth(1).unwrap_or_default();
            let answer = match cri {
                Some(cri) if Cri::serves(service) => Ok(cri.call(request).await),
                _ if service == diff_server::SERVICE_NAME => diff.call(request).await,
                _ => snapshots.call(request).await,
            };
            Ok::<_, Infallible>(answer.unwrap_or_else(|never: Infallible| match never {}))
        }
    });
    http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_REQUESTS)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}
