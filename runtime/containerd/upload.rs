//! Writing a blob into containerd's content store.

use std::collections::BTreeMap;
use std::time::Duration;

use lazyrun_index::Digest;
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream;
use tonic::{Code, Status, Streaming};

use super::{ANSWER, BLOB_ANSWER, Containerd, ContainerdError, Scope};
use crate::snapshotter::proto::services::content::v1 as api;

/// A blob on its way into the content store. It must be committed; one that is dropped before stays until it is aborted
/// or the garbage collector comes.
#[derive(Debug)]
pub struct Upload {
    containerd: Containerd,
    reference: String,
    messages: mpsc::Sender<api::WriteContentRequest>,
    answers: Streaming<api::WriteContentResponse>,
    offset: i64,
}

impl Containerd {
    /// Begins to write a blob. What an earlier attempt with the same `reference` wrote is written anew.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses, for example because somebody else writes it.
    pub async fn upload(&self, scope: &Scope, reference: &str) -> Result<Upload, ContainerdError> {
        let first = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            ..Default::default()
        };
        let upload = self.begin(scope, reference, first).await?;
        Ok(Upload { offset: 0, ..upload })
    }

    /// Goes on to write a blob of this size and digest where an earlier attempt with the same `reference` ended, or
    /// begins. A blob that another namespace has is complete at once.
    ///
    /// # Errors
    /// [`Code::AlreadyExists`] when the blob is there, [`Code::Unavailable`] when somebody else writes it; when
    /// containerd can't be reached or refuses.
    pub async fn resume(
        &self,
        scope: &Scope,
        reference: &str,
        digest: Digest,
        size: u64,
    ) -> Result<Upload, ContainerdError> {
        let first = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            total: i64::try_from(size).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            ..Default::default()
        };
        self.begin(scope, reference, first).await
    }

    async fn begin(
        &self,
        scope: &Scope,
        reference: &str,
        first: api::WriteContentRequest,
    ) -> Result<Upload, ContainerdError> {
        // Only who knows the blob goes on with it.
        let limit = if first.expected.is_empty() { ANSWER } else { BLOB_ANSWER };
        // Each message is answered before the next is sent.
        let (messages, queue) = mpsc::channel(1);
        // There is room for one.
        let _ = messages.try_send(first);
        let asked = async {
            let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
            let mut answers = self.content().write(scope.request(queue)?).await?.into_inner();
            let offset = answered(&mut answers).await?;
            Ok((answers, offset))
        };
        let (answers, offset) =
            self.answer_within(limit, || format!("begin the upload {reference}"), asked).await?;
        Ok(Upload { containerd: self.clone(), reference: reference.to_owned(), messages, answers, offset })
    }
}

async fn answered(answers: &mut Streaming<api::WriteContentResponse>) -> Result<i64, Status> {
    match answers.message().await? {
        Some(answer) => Ok(answer.offset),
        None => Err(Status::aborted("containerd broke the upload off")),
    }
}

impl Upload {
    /// Bytes that are written.
    pub fn offset(&self) -> u64 {
        u64::try_from(self.offset).unwrap_or(0)
    }

    /// Forgets what was written: the next bytes are the blob's first.
    pub fn restart(&mut self) {
        self.offset = 0;
    }

    async fn send(
        &mut self,
        message: api::WriteContentRequest,
        limit: Duration,
    ) -> Result<i64, ContainerdError> {
        let (messages, answers) = (&self.messages, &mut self.answers);
        let asked = async {
            // Where nobody takes messages any more the answer says why.
            let _ = messages.send(message).await;
            answered(answers).await
        };
        self.containerd.answer_within(limit, || format!("write the upload {}", self.reference), asked).await
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn write(&mut self, data: Vec<u8>) -> Result<(), ContainerdError> {
        if data.is_empty() {
            return Ok(());
        }
        let message = api::WriteContentRequest {
            action: api::WriteAction::Write.into(),
            offset: self.offset,
            data,
            ..Default::default()
        };
        self.offset = self.send(message, ANSWER).await?;
        Ok(())
    }

    /// Makes the blob part of the content store; containerd compares size and digest. A blob that is there already is
    /// as good, and then held by the scope's lease too.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn commit(
        mut self,
        scope: &Scope,
        digest: Digest,
        labels: BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let message = api::WriteContentRequest {
            action: api::WriteAction::Commit.into(),
            offset: self.offset,
            total: self.offset,
            expected: digest.to_string(),
            labels,
            ..Default::default()
        };
        match self.send(message, BLOB_ANSWER).await {
            Err(error) if error.code() == Code::AlreadyExists => self.containerd.hold(scope, digest).await,
            answer => answer.map(drop),
        }
    }
}
