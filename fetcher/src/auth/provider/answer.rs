//! What a plugin answers.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use super::{config, pattern};

/// For what an answer is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum CacheKey {
    /// The image that was asked for.
    Image,
    /// All images of its registry.
    Registry,
    /// All images for which the plugin is asked.
    Global,
}

/// A plugin's answer.
pub(super) struct Answer {
    pub(super) key: CacheKey,
    /// How long it is good; none: as long as the configuration says.
    pub(super) time: Option<Duration>,
    /// User and password by pattern of images.
    auth: BTreeMap<String, Auth>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("key", &self.key).field("time", &self.time).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    api_version: String,
    cache_key_type: CacheKey,
    cache_duration: Option<String>,
    auth: Option<BTreeMap<String, Auth>>,
}

impl Answer {
    /// Reads an answer in the version that was asked for.
    pub(super) fn parse(bytes: &[u8], api_version: &str) -> Option<Answer> {
        let response: Response = serde_json::from_slice(bytes).ok()?;
        if response.kind != "CredentialProviderResponse" || response.api_version != api_version {
            return None;
        }
        let time = match &response.cache_duration {
            None => None,
            Some(text) => Some(config::duration(text)?),
        };
        Some(Answer { key: response.cache_key_type, time, auth: response.auth.unwrap_or_default() })
    }

    /// User and password for an image. As with the kubelet the pattern that is last in the alphabet counts, which of two
    /// paths in a registry is the longer.
    pub(super) fn credential(&self, image: &str) -> Option<(String, String)> {
        let (_, auth) = self.auth.iter().rev().find(|(pattern, _)| pattern::matches(pattern, image))?;
        let empty = auth.username.is_empty() && auth.password.is_empty();
        (!empty).then(|| (auth.username.clone(), auth.password.clone()))
    }
}
