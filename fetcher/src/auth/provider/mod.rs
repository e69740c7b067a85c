//! Credentials from the plugins that the kubelet has for images (`CredentialProviderConfig` of kubelet.config.k8s.io,
//! the protocol `credentialprovider.kubelet.k8s.io/v1`): how nodes of cloud providers reach their registries.

mod answer;
mod config;
mod exec;
mod pattern;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::{Credential, Found};
use answer::{Answer, CacheKey};
use config::Provider;

/// No answer is kept longer, whatever it says.
const MAX_KEPT: Duration = Duration::from_secs(24 * 3600);

/// So long after a plugin failed it is not run again for the same registry: a node that starts many images would else run
/// one that hangs for each of them, one after the other.
const FAILURE_KEPT: Duration = Duration::from_secs(10);

/// Where the kubelet's credential providers are: what its flags `--image-credential-provider-config` and
/// `--image-credential-provider-bin-dir` name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProviderFiles {
    /// The `CredentialProviderConfig`, as YAML or JSON.
    pub config: PathBuf,
    /// The directory of the programs.
    pub bin_dir: PathBuf,
}

/// For what an answer is kept: the provider's name and the image, registry or everything.
type Key = (String, String);
/// What a plugin answered, or why it failed.
type Known = Result<Arc<Answer>, String>;

/// Asks the plugins, and keeps what they answer for as long as they say.
#[derive(Debug)]
pub(crate) struct Providers {
    files: ProviderFiles,
    /// Until when each is good.
    kept: Mutex<HashMap<Key, (Instant, Known)>>,
    /// One run of a plugin at a time, by its name; who waited finds what the other got.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Providers {
    pub(crate) fn new(files: ProviderFiles) -> Self {
        Providers { files, kept: Mutex::default(), turns: Mutex::default() }
    }

    /// The credential for a repository, from the first plugin that is for it and has one.
    ///
    /// # Errors
    /// When the configuration is malformed, or a plugin fails and no other has a credential. What plugins say may be a
    /// secret and is in no error.
    pub(crate) async fn get(&self, registry: &str, repository: &str) -> Result<Option<Found>, String> {
        let image = format!("{registry}/{repository}");
        let path = self.files.config.clone();
        let read = tokio::task::spawn_blocking(move || config::read(&path)).await;
        let providers =
            read.unwrap_or_else(|_| Err("reading the credential providers was interrupted".to_owned()))?;
        let mut failed = None;
        for provider in providers.iter().filter(|provider| provider.is_for(&image)) {
            match self.answer(provider, registry, &image).await {
                Ok(answer) => {
                    if let Some((user, password)) = answer.credential(&image) {
                        let source =
                            format!("the plugin {}, named in {}", provider.name, self.files.config.display());
                        return Ok(Some(Found {
                            credential: Credential::Password { user, password },
                            source,
                        }));
                    }
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn answer(&self, provider: &Provider, registry: &str, image: &str) -> Known {
        if let Some(known) = self.known(provider, registry, image) {
            return known;
        }
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(provider.name.clone()).or_default())
        };
        let _turn = turn.lock().await;
        if let Some(known) = self.known(provider, registry, image) {
            return known;
        }
        let asked = exec::ask(&self.files.bin_dir, provider, image).await.map(Arc::new);
        let (of, time) = match &asked {
            Ok(answer) => {
                let of = match answer.key {
                    CacheKey::Image => image,
                    CacheKey::Registry => registry,
                    CacheKey::Global => "",
                };
                (of, answer.time.unwrap_or(provider.kept_for).min(MAX_KEPT))
            }
            Err(_) => (registry, FAILURE_KEPT),
        };
        if !time.is_zero() {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            kept.retain(|_, (until, _)| *until > now);
            kept.insert((provider.name.clone(), of.to_owned()), (now + time, asked.clone()));
        }
        asked
    }

    /// What needs no run of the plugin.
    fn known(&self, provider: &Provider, registry: &str, image: &str) -> Option<Known> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // An image's name has a slash and a registry's has none. Failures are kept by registry, so that comes last.
        [image, "", registry].into_iter().find_map(|of| {
            let (until, known) = kept.get(&(provider.name.clone(), of.to_owned()))?;
            (*until > Instant::now()).then(|| known.clone())
        })
    }
}

/// The names of the plugins that a file names, and what is wrong with them (blocking).
///
/// # Errors
/// When the file can't be read or is malformed.
pub(crate) fn summary(files: &ProviderFiles) -> Result<(Vec<String>, Vec<String>), String> {
    let providers = config::read(&files.config)?;
    let wrong = providers.iter().filter_map(|provider| {
        let path = exec::program(&files.bin_dir, provider);
        (!is_program(&path))
            .then(|| format!("{} is no program: its images get no credentials", path.display()))
    });
    let wrong = wrong.collect();
    Ok((providers.into_iter().map(|provider| provider.name).collect(), wrong))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests;
