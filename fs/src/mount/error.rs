use std::io;
use std::path::Path;

/// Why a mount could not be made, moved or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call refused; `log` is what the kernel's filesystem said about it, if anything.
    #[error("cannot mount {what}: {step}: {source}{}", said(log))]
    Refused {
        /// What was to be mounted, e.g. `erofs view /var/…`.
        what: String,
        /// The step that failed, e.g. `fsconfig device`.
        step: String,
        /// The error number.
        source: io::Error,
        /// The filesystem's own messages, joined by `; `.
        log: String,
    },
    /// Attaching, detaching or cloning an existing mount failed.
    #[error("cannot {action}: {source}")]
    Tree {
        /// What was tried, with the path.
        action: String,
        /// The error number.
        source: io::Error,
    },
    /// The helper process could not be started or spoken to.
    #[error("the mount helper {0}")]
    Helper(String),
    /// The helper process reported this sentence.
    #[error("{0}")]
    Remote(String),
}

impl MountError {
    pub(crate) fn tree(action: impl Into<String>, source: io::Error) -> Self {
        Self::Tree { action: action.into(), source }
    }

    pub(crate) fn at(action: &str, path: &Path, source: io::Error) -> Self {
        Self::tree(format!("{action} {}", path.display()), source)
    }
}

fn said(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!(" (kernel: {log})") }
}
