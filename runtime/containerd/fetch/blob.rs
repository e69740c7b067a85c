//! One blob from its registry into the content store.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lazyrun_fetcher::{BlobReader, Class, FetchError, Reference};
use lazyrun_index::Digest;
use tonic::Code;

use super::Fetch;
use super::walk::{Blob, source_label};
use crate::containerd::{ContainerdError, Scope, Upload};

/// Bytes in one message to containerd.
const PIECE: usize = 1 << 20;
/// How long somebody else may write the same blob without getting on.
const STUCK: Duration = Duration::from_secs(60);
/// How often it is looked whether they have.
const LOOK: Duration = Duration::from_millis(500);
/// How often a blob is tried again when containerd went away, as in a restart.
const TRIES: u32 = 5;

/// What went wrong with a copy.
enum CopyError {
    Registry(FetchError),
    Containerd(ContainerdError),
}

impl From<FetchError> for CopyError {
    fn from(error: FetchError) -> Self {
        Self::Registry(error)
    }
}

impl From<ContainerdError> for CopyError {
    fn from(error: ContainerdError) -> Self {
        Self::Containerd(error)
    }
}

/// Sees to it that the content store has a blob. Returns the bytes that came from a registry for it; `None` if it was
/// there.
///
/// # Errors
/// When it can't be had or can't be stored. What came of it stays for the next call.
pub(super) async fn fetch(fetch: &Fetch<'_>, scope: &Scope, blob: &Blob) -> Result<Option<u64>> {
    let mut tries = 0;
    loop {
        let error = match attempt(fetch, scope, blob).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => error,
        };
        match error.downcast_ref::<ContainerdError>() {
            Some(ContainerdError::Unreachable { .. }) if tries < TRIES => {}
            // Another call for the same image has ended, and the lease of both with it. Then the blob is there.
            Some(cause) if cause.code() == Code::NotFound => {
                let known = fetch.containerd.info(scope, blob.entry.digest).await;
                return if matches!(known, Ok(Some(_))) { Ok(None) } else { Err(error) };
            }
            _ => return Err(error),
        }
        tries += 1;
        tracing::debug!(%error, blob = %blob.entry.digest, "a blob is tried again");
        tokio::time::sleep(Duration::from_secs(1 << tries)).await;
    }
}

async fn attempt(fetch: &Fetch<'_>, scope: &Scope, blob: &Blob) -> Result<Option<u64>> {
    let (digest, size) = (blob.entry.digest, blob.entry.size);
    // As containerd itself calls it, which so never writes the same blob at the same time.
    let reference = format!("{}-{digest}", blob.entry.kind());
    let mut bytes = 0;
    loop {
        if fetch.containerd.info(scope, digest).await?.is_some() {
            return Ok(None);
        }
        let Some(mut upload) = begin(fetch, scope, &reference, digest, size).await? else { return Ok(None) };
        if upload.offset() > size {
            upload.restart();
        }
        let resumed = upload.offset() > 0;
        fetch.progress.advance(digest, upload.offset(), size);
        let copied = copy(fetch, blob, &mut upload).await?;
        let labels = BTreeMap::from_iter(copied.as_ref().map(|(_, source)| source_label(source)));
        bytes += copied.as_ref().map_or(0, |(reader, _)| reader.read);
        let error = match upload.commit(scope, digest, labels).await {
            Ok(()) => return Ok(Some(bytes)),
            Err(error) => error,
        };
        if error.code() != Code::FailedPrecondition {
            return Err(error.into());
        }
        // These are not the blob's bytes. Others may come from the start on, or without the mirror that gave them.
        fetch.containerd.abort(scope, &reference).await?;
        let again = resumed || copied.is_some_and(|(reader, _)| reader.blob.disown());
        if !again {
            let place = blob.sources.first().map_or_else(String::new, Reference::name);
            return Err(error).context(format!("{place} gives other bytes for blob {digest}"));
        }
    }
}

/// Opens a blob for writing, once nobody else does. `None`: it is there.
///
/// # Errors
/// When containerd can't be reached or refuses, and when somebody else does not get on with it.
pub(super) async fn begin(
    fetch: &Fetch<'_>,
    scope: &Scope,
    reference: &str,
    digest: Digest,
    size: u64,
) -> Result<Option<Upload>> {
    let (mut written, mut since) = (None, Instant::now());
    loop {
        let error = match fetch.containerd.resume(scope, reference, digest, size).await {
            Ok(upload) => return Ok(Some(upload)),
            Err(error) => error,
        };
        let busy = matches!(&error, ContainerdError::Refused { .. }) && error.code() == Code::Unavailable;
        match error.code() {
            Code::AlreadyExists => return Ok(None),
            _ if !busy => return Err(error.into()),
            _ => {}
        }
        let now = fetch.containerd.written(scope, reference).await?;
        if now != written {
            (written, since) = (now, Instant::now());
        }
        if since.elapsed() > STUCK {
            return Err(error.into());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Reads of one blob.
struct Copied {
    blob: BlobReader,
    /// Bytes that came.
    read: u64,
}

/// Writes what is missing of a blob, from the first repository that has it. `None` if nothing was missing.
async fn copy(fetch: &Fetch<'_>, blob: &Blob, upload: &mut Upload) -> Result<Option<(Copied, Reference)>> {
    let digest = blob.entry.digest;
    if upload.offset() == blob.entry.size {
        return Ok(None);
    }
    let mut failure = None;
    for source in blob.sources.iter() {
        let mut result = copy_from(fetch, blob, upload, source).await;
        if let Err(CopyError::Registry(FetchError::RangeIgnored { .. })) = &result {
            upload.restart();
            result = copy_from(fetch, blob, upload, source).await;
        }
        match result {
            Ok(copied) => return Ok(Some((copied, source.clone()))),
            Err(CopyError::Registry(error)) => failure = failure.or(Some(error)),
            Err(CopyError::Containerd(error)) => return Err(error.into()),
        }
    }
    match failure {
        Some(error) => Err(error).with_context(|| format!("fetching blob {digest}")),
        None => anyhow::bail!("containerd has not noted from which registry blob {digest} came"),
    }
}

async fn copy_from(
    fetch: &Fetch<'_>,
    blob: &Blob,
    upload: &mut Upload,
    source: &Reference,
) -> Result<Copied, CopyError> {
    let (digest, size, from) = (blob.entry.digest, blob.entry.size, upload.offset());
    let reader = fetch.client.blobs(source).reader(digest, from..size, Some(size));
    let mut copied = Copied { blob: reader.for_class(Class::Hydrate), read: 0 };
    let mut piece = Vec::with_capacity(PIECE);
    loop {
        let chunk = copied.blob.next().await?;
        if let Some(chunk) = &chunk {
            copied.read += chunk.len() as u64;
            piece.extend_from_slice(chunk);
        }
        if piece.len() >= PIECE || chunk.is_none() {
            let len = piece.len() as u64;
            upload.write(std::mem::replace(&mut piece, Vec::with_capacity(PIECE))).await?;
            fetch.progress.advance(digest, upload.offset(), size);
            // Once a piece: a turn may take seconds while readers wait for the link, and what comes at a time is little.
            if let Some(fetcher) = fetch.background.filter(|_| chunk.is_some()) {
                fetcher.background_turn(len).await;
            }
        }
        if chunk.is_none() {
            return Ok(copied);
        }
    }
}
