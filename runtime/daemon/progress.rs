//! What a caller hears while it waits.

use std::sync::Arc;

use anyhow::Result;
use lazyrun_fetcher::Progress;
use lazyrun_index::Digest;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::Daemon;
use crate::failure::Failure;
use crate::ipc::frame;
use crate::ipc::protocol::Reply;

// Progress is a picture of now: when the reader is slow, frames are dropped, never queued without bound.
const PROGRESS_QUEUE: usize = 64;

struct Reporter(mpsc::Sender<Reply>);

impl Progress for Reporter {
    fn advance(&self, layer: Digest, done: u64, total: u64) {
        let _ = self.0.try_send(Reply::Progress { layer, done, total });
    }

    fn note(&self, text: &str) {
        let _ = self.0.try_send(Reply::Note(text.to_owned()));
    }
}

impl Daemon {
    /// Runs a job while its progress goes to the caller; a caller that hangs up cancels the job.
    pub(super) async fn with_progress<T, F>(
        &self,
        stream: &mut UnixStream,
        job: impl FnOnce(Arc<dyn Progress>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let (reports, mut queue) = mpsc::channel(PROGRESS_QUEUE);
        let job = job(Arc::new(Reporter(reports)));
        tokio::pin!(job);
        loop {
            tokio::select! {
                biased;
                done = &mut job => {
                    // Progress that comes too late is of no interest, a note is.
                    while let Ok(reply) = queue.try_recv() {
                        if matches!(reply, Reply::Note(_)) {
                            frame::send(stream, &reply).await?;
                        }
                    }
                    return done;
                }
                Some(reply) = queue.recv() => frame::send(stream, &reply).await?,
                ready = stream.readable() => {
                    ready?;
                    if let Ok(0) = stream.try_read(&mut [0; 1]) {
                        return Err(Failure::daemon("the caller hung up").into());
                    }
                }
            }
        }
    }
}
