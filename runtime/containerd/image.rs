//! containerd's images: names of what is in its content store.

use lazyrun_index::Digest;
use tonic::Code;
use tonic::transport::Channel;

use super::{Containerd, ContainerdError, Scope};
use crate::snapshotter::proto::services::images::v1 as api;
use api::images_client::ImagesClient;

impl Containerd {
    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }

    /// The digest of the manifest or index that a name stands for; `None` if containerd has no image of that name.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses, or its answer makes no sense.
    pub async fn image(&self, scope: &Scope, name: &str) -> Result<Option<Digest>, ContainerdError> {
        let asked = async {
            let request = scope.request(api::GetImageRequest { name: name.to_owned() })?;
            let image = match self.images().get(request).await {
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                answer => answer?.into_inner().image,
            };
            let target = image.and_then(|image| image.target).unwrap_or_default().digest;
            let digest = target.parse().map_err(|_| tonic::Status::internal(format!("it is {target:?}")))?;
            Ok(Some(digest))
        };
        self.answer(|| format!("find the image {name}"), asked).await
    }
}
