//! containerd's content store.

use std::collections::BTreeMap;

use lazyrun_index::Digest;
use tonic::transport::Channel;
use tonic::{Code, Status};

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

impl Containerd {
    pub(super) fn content(&self) -> ContentClient<Channel> {
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

    /// Sets labels of a blob; others stay as they are.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn set_labels(
        &self,
        scope: &Scope,
        digest: Digest,
        labels: BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let info = api::Info { digest: digest.to_string(), labels, ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths });
        let asked = async {
            let request = scope.request(api::UpdateRequest { info: Some(info), update_mask })?;
            self.content().update(request).await
        };
        self.answer(|| format!("label {digest}"), asked).await.map(drop)
    }

    /// The bytes of a blob of at most `limit` bytes; `None` if there is no such blob.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses, or the blob is larger.
    pub async fn read(
        &self,
        scope: &Scope,
        digest: Digest,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, ContainerdError> {
        let asked = async {
            let request = api::ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
            let mut pieces = match self.content().read(scope.request(request)?).await {
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                answer => answer?.into_inner(),
            };
            let mut bytes = Vec::new();
            loop {
                match pieces.message().await {
                    Ok(Some(piece)) if (bytes.len() + piece.data.len()) as u64 > limit => {
                        return Err(Status::out_of_range(format!("it is larger than {limit} bytes")));
                    }
                    Ok(Some(piece)) => bytes.extend_from_slice(&piece.data),
                    Ok(None) => return Ok(Some(bytes)),
                    // Some versions find out only now.
                    Err(status) if status.code() == Code::NotFound => return Ok(None),
                    Err(status) => return Err(status),
                }
            }
        };
        self.answer(|| format!("read {digest}"), asked).await
    }

    /// How many bytes have been written of a blob that was not committed yet; `None` if nobody has begun with it.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn written(&self, scope: &Scope, reference: &str) -> Result<Option<u64>, ContainerdError> {
        let asked = async {
            let request = scope.request(api::StatusRequest { r#ref: reference.to_owned() })?;
            match self.content().status(request).await {
                Err(status) if status.code() == Code::NotFound => Ok(None),
                answer => answer.map(|answer| answer.into_inner().status),
            }
        };
        let status = self.answer(|| format!("look for the upload {reference}"), asked).await?;
        Ok(status.map(|status| u64::try_from(status.offset).unwrap_or(0)))
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
