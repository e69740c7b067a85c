//! containerd's content store.

use std::collections::BTreeMap;

use lazyrun_index::Digest;
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::{Containerd, ContainerdError, Scope};
use crate::snapshotter::proto::services::content::v1 as api;
use api::content_client::ContentClient;

/// What containerd knows of a blob.
#[derive(Debug, Clone)]
pub struct Info {
    /// Its size.
    pub size: u64,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

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
    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }

    /// What containerd knows of a blob; `None` if it has no such blob.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn info(&self, scope: &Scope, digest: Digest) -> Result<Option<Info>, ContainerdError> {
        let asked = async {
            let request = scope.request(api::InfoRequest { digest: digest.to_string() })?;
            match self.content().info(request).await {
                Err(status) if status.code() == Code::NotFound => Ok(None),
                answer => answer.map(|answer| answer.into_inner().info),
            }
        };
        let info = self.answer(|| format!("look for {digest}"), asked).await?;
        Ok(info.map(|info| Info { size: u64::try_from(info.size).unwrap_or(0), labels: info.labels }))
    }

    /// Sets one label of a blob.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn set_label(
        &self,
        scope: &Scope,
        digest: Digest,
        name: &str,
        value: &str,
    ) -> Result<(), ContainerdError> {
        let labels = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let info = api::Info { digest: digest.to_string(), labels, ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths: vec![format!("labels.{name}")] });
        let asked = async {
            let request = scope.request(api::UpdateRequest { info: Some(info), update_mask })?;
            self.content().update(request).await
        };
        self.answer(|| format!("label {digest}"), asked).await.map(drop)
    }

    /// Begins to write a blob. What an earlier attempt with the same `reference` wrote is written anew.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses, for example because somebody else writes it.
    pub async fn upload(&self, scope: &Scope, reference: &str) -> Result<Upload, ContainerdError> {
        // Each message is answered before the next is sent.
        let (messages, queue) = mpsc::channel(1);
        let first = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            ..Default::default()
        };
        // There is room for one.
        let _ = messages.try_send(first);
        let asked = async {
            let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
            let mut answers = self.content().write(scope.request(queue)?).await?.into_inner();
            answered(&mut answers).await?;
            Ok(answers)
        };
        let answers = self.answer(|| format!("begin the upload {reference}"), asked).await?;
        Ok(Upload { containerd: self.clone(), reference: reference.to_owned(), messages, answers, offset: 0 })
    }

    /// Forgets a blob that was not committed.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn abort(&self, scope: &Scope, reference: &str) -> Result<(), ContainerdError> {
        let asked = async {
            let request = scope.request(api::AbortRequest { r#ref: reference.to_owned() })?;
            self.content().abort(request).await
        };
        self.answer(|| format!("forget the upload {reference}"), asked).await.map(drop)
    }
}

async fn answered(answers: &mut Streaming<api::WriteContentResponse>) -> Result<i64, Status> {
    match answers.message().await? {
        Some(answer) => Ok(answer.offset),
        None => Err(Status::aborted("containerd broke the upload off")),
    }
}

impl Upload {
    async fn send(&mut self, message: api::WriteContentRequest) -> Result<i64, ContainerdError> {
        let (messages, answers) = (&self.messages, &mut self.answers);
        let asked = async {
            // Where nobody takes messages any more the answer says why.
            let _ = messages.send(message).await;
            answered(answers).await
        };
        self.containerd.answer(|| format!("write the upload {}", self.reference), asked).await
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
        self.offset = self.send(message).await?;
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
        match self.send(message).await {
            Err(error) if error.code() == Code::AlreadyExists => self.containerd.hold(scope, digest).await,
            answer => answer.map(drop),
        }
    }
}
