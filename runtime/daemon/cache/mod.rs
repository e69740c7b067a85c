//! The disk of an instance: its limits, who uses what, and what can go.

mod check;
mod prune;
mod usage;
mod views;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result};
use lazyrun_fetcher::{CacheLimits, InUse, LayerUsers};
use lazyrun_index::LayerId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Daemon, layer_ids};
use crate::ipc::system::{LimitChange, LimitValue, SystemAction};
use crate::paths::Paths;

const VERSION: u32 = 1;
/// How often the times of last use are written down. Losing them costs only the order of evictions.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// The file with the limits.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    #[serde(flatten)]
    limits: CacheLimits,
}

/// The limits of this root, or the defaults where none were set.
///
/// # Errors
/// When they can't be read: to go on without a limit that somebody has set would fill the disk.
pub fn load_limits(paths: &Paths) -> Result<CacheLimits> {
    let path = paths.cache_limits();
    let context = || format!("reading the limits of the cache, {}", path.display());
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(CacheLimits::default()),
        read => read.with_context(context)?,
    };
    let content: Content = serde_json::from_slice(&bytes).with_context(context)?;
    anyhow::ensure!(content.version == VERSION, "{} has version {}", path.display(), content.version);
    Ok(content.limits)
}

/// Changes the limits of this root for every daemon to come; returns what holds now.
///
/// # Errors
/// When they can't be read or written.
pub fn change_limits(paths: &Paths, change: LimitChange) -> Result<CacheLimits> {
    let old = load_limits(paths)?;
    let limit = match change.limit {
        None => old.limit,
        Some(LimitValue::None) => None,
        Some(LimitValue::At(limit)) => Some(limit),
    };
    let new = CacheLimits { limit, reserve: change.reserve.unwrap_or(old.reserve) };
    if new != old {
        let path = paths.cache_limits();
        write(&path, paths.root(), &Content { version: VERSION, limits: new })
            .with_context(|| format!("writing the limits of the cache, {}", path.display()))?;
    }
    Ok(new)
}

fn write(path: &Path, dir: &Path, content: &Content) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    serde_json::to_writer(&mut file, content)?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(())
}

/// For a daemon that does not know yet what reads which layers: nothing may be evicted.
pub struct NotYet;

impl LayerUsers for NotYet {
    fn in_use(&self) -> Option<HashMap<LayerId, InUse>> {
        None
    }

    fn release(&self, _: LayerId) -> bool {
        false
    }
}

/// What the store asks while it evicts.
struct Users(Weak<Daemon>);

impl LayerUsers for Users {
    fn in_use(&self) -> Option<HashMap<LayerId, InUse>> {
        Some(self.0.upgrade()?.layers_in_use())
    }

    fn release(&self, layer: LayerId) -> bool {
        let Some(daemon) = self.0.upgrade() else { return false };
        let mut released = false;
        daemon.views.release(|view| {
            let holds = view.direct && view.layers.iter().any(|l| l.id() == layer);
            released |= holds;
            holds
        });
        released
    }
}

impl Daemon {
    /// From now on the store may evict. Not before every view that reads layer files directly is taken over: these
    /// have to be pinned first.
    pub(super) fn guard_cache(self: &Arc<Self>, limits: CacheLimits) {
        let store = self.images.fetcher().store().clone();
        store.set_users(Arc::new(Users(Arc::downgrade(self))));
        tokio::spawn(async move {
            let applied = store.clone();
            let applied = tokio::task::spawn_blocking(move || applied.set_limits(limits));
            if let Ok(Err(error)) = applied.await {
                tracing::warn!(%error, "the limits of the cache can't be kept to");
            }
            loop {
                tokio::time::sleep(SAVE_EVERY).await;
                let saved = store.clone();
                let _ = tokio::task::spawn_blocking(move || saved.save_uses()).await;
            }
        });
    }

    fn layers_in_use(&self) -> HashMap<LayerId, InUse> {
        let mut used: HashMap<LayerId, InUse> =
            self.views.in_use().into_iter().map(|id| (id, InUse::Mounted)).collect();
        for container in self.containers.all().into_iter().filter(|c| c.is_running()) {
            let record = container.record();
            used.extend(
                layer_ids(&record.layers, &record.diff_ids).into_iter().map(|id| (id, InUse::Running)),
            );
        }
        used
    }

    /// Does what a request asks for and answers as [`SystemAction`] says.
    pub(super) async fn system(self: &Arc<Self>, action: SystemAction) -> Result<Value> {
        let this = Arc::clone(self);
        if let SystemAction::Prune(options) = action {
            return Ok(serde_json::to_value(this.prune(options).await?)?);
        }
        let answer = tokio::task::spawn_blocking(move || {
            Ok(match action {
                SystemAction::Limit(change) => {
                    let limits = change_limits(&this.paths, change)?;
                    let store = this.images.fetcher().store();
                    if store.limits() != limits {
                        store.set_limits(limits).context("keeping to the limits of the cache")?;
                    }
                    Value::Null
                }
                SystemAction::Usage => serde_json::to_value(this.usage()?)?,
                SystemAction::Check { repair } => serde_json::to_value(this.check_store(repair)?)?,
                SystemAction::Prune(_) => json!(null),
            })
        });
        answer.await.context("the daemon's own thread failed")?
    }
}

#[cfg(test)]
mod tests {
    use lazyrun_fetcher::CacheLimit;

    use super::*;

    #[test]
    fn limits_are_kept_and_nonsense_is_an_error() {
        let dir = tempfile::tempdir().expect("dir");
        let paths = Paths::new(dir.path()).expect("paths");
        assert_eq!(load_limits(&paths).expect("load"), CacheLimits::default());
        let at = LimitValue::At(CacheLimit::Percent(70));
        let set = change_limits(&paths, LimitChange { limit: Some(at), reserve: None }).expect("set");
        assert_eq!(set.limit, Some(CacheLimit::Percent(70)));
        let set = change_limits(&paths, LimitChange { limit: None, reserve: Some(7) }).expect("set");
        assert_eq!((set.limit, set.reserve), (Some(CacheLimit::Percent(70)), 7));
        assert_eq!(load_limits(&paths).expect("load"), set);
        let none = change_limits(&paths, LimitChange { limit: Some(LimitValue::None), reserve: None });
        assert_eq!(none.expect("set").limit, None);
        for bad in [
            "",
            "{}",
            r#"{"version":2,"limit":null,"reserve":1}"#,
            r#"{"version":1,"limit":"x","reserve":1}"#,
        ] {
            std::fs::write(paths.cache_limits(), bad).expect("write");
            assert!(load_limits(&paths).is_err(), "{bad}");
        }
    }
}
