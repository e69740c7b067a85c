//! What version a containerd is of.

use super::{Containerd, ContainerdError};
use crate::snapshotter::proto::services::version::v1::version_client::VersionClient;

impl Containerd {
    /// Its version as it tells it, such as `1.6.20~ds1` or `v2.1.0`.
    ///
    /// # Errors
    /// When containerd can't be reached or refuses.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let mut client = VersionClient::new(self.channel.clone());
        let asked = async { client.version(()).await };
        let answer = self.answer(|| "tell its version".to_owned(), asked).await?;
        Ok(answer.into_inner().version)
    }
}
