//! A client of containerd's own services: its content store, its images, its leases, its version.

mod content;
pub mod fetch;
mod image;
mod lease;
mod upload;
mod version;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

pub use content::Info;
pub use lease::{Lease, unique};
pub use upload::Upload;

/// Where containerd listens unless it was told.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
/// The header that says containerd's namespace.
pub const NAMESPACE: &str = "containerd-namespace";
/// The header that says which lease holds what a request makes.
pub const LEASE: &str = "containerd-lease";
/// How long containerd may take to answer one message.
const ANSWER: Duration = Duration::from_secs(60);
/// How long where it reads or writes a whole blob for it: it hashes what was written of an upload that is resumed, and has
/// the disk take all of one that is committed.
const BLOB_ANSWER: Duration = Duration::from_secs(15 * 60);

/// Why containerd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// There is nobody at the address, or something else than containerd.
    #[error(
        "containerd does not answer at {address}: {why} (`--containerd-address`, or `--address` of \
             `lazyrun containerd fetch`, says where it listens)"
    )]
    Unreachable {
        /// The socket.
        address: String,
        /// What happened.
        why: String,
    },
    /// It refused.
    #[error("containerd can't {what}: {}", .status.message())]
    Refused {
        /// What it was asked for.
        what: String,
        /// Its answer.
        status: Status,
    },
}

impl ContainerdError {
    /// containerd's class of the error.
    pub fn code(&self) -> Code {
        match self {
            Self::Unreachable { .. } => Code::Unavailable,
            Self::Refused { status, .. } => status.code(),
        }
    }
}

/// The socket that a user or `CONTAINERD_ADDRESS` names, which may be relative or have a scheme.
pub fn socket(given: &Path) -> PathBuf {
    let path = without_scheme(given);
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Some clients of containerd take addresses of gRPC.
fn without_scheme(address: &Path) -> &Path {
    address.to_str().and_then(|text| text.strip_prefix("unix://")).map_or(address, Path::new)
}

/// A containerd, at its socket. Connected to when it is first asked, and again after it was restarted.
#[derive(Debug, Clone)]
pub struct Containerd {
    address: PathBuf,
    channel: Channel,
}

/// On whose behalf containerd is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// containerd's namespace.
    pub namespace: String,
    /// What keeps new content from its garbage collector.
    pub lease: Option<String>,
}

impl Scope {
    /// A request with the headers that say so.
    ///
    /// # Errors
    /// When namespace or lease have signs that no header carries.
    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        let header = |text: &str| {
            text.parse()
                .map_err(|_| Status::invalid_argument(format!("{text:?} is no name that containerd has")))
        };
        request.metadata_mut().insert(NAMESPACE, header(&self.namespace)?);
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert(LEASE, header(lease)?);
        }
        Ok(request)
    }
}

impl Containerd {
    /// The one at this socket. To be called where tasks can be spawned.
    ///
    /// # Errors
    /// When the path can't be an address.
    pub fn at(address: &Path) -> Result<Self, ContainerdError> {
        let address = without_scheme(address);
        let endpoint = address
            .to_str()
            .filter(|path| path.starts_with('/'))
            .ok_or_else(|| "it is no absolute path in UTF-8".to_owned())
            .and_then(|path| Endpoint::from_shared(format!("unix://{path}")).map_err(|e| e.to_string()))
            .map_err(|why| ContainerdError::Unreachable { address: address.display().to_string(), why })?;
        let channel = endpoint.connect_timeout(Duration::from_secs(5)).connect_lazy();
        Ok(Self { address: address.to_owned(), channel })
    }

    /// A connection for requests that are not made here.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// That nobody answers, and why.
    pub(crate) fn unreachable(&self, error: &(dyn std::error::Error + 'static)) -> ContainerdError {
        ContainerdError::Unreachable { address: self.address.display().to_string(), why: reason(error) }
    }

    // Waits for an answer, and says which request failed.
    async fn answer<T>(
        &self,
        what: impl FnOnce() -> String,
        asked: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContainerdError> {
        self.answer_within(ANSWER, what, asked).await
    }

    async fn answer_within<T>(
        &self,
        limit: Duration,
        what: impl FnOnce() -> String,
        asked: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContainerdError> {
        let unreachable =
            |why: String| ContainerdError::Unreachable { address: self.address.display().to_string(), why };
        match tokio::time::timeout(limit, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            // A status that was made here, not by containerd, has what happened to the connection as its source.
            Ok(Err(status)) if std::error::Error::source(&status).is_some() => {
                Err(unreachable(reason(&status)))
            }
            Ok(Err(status)) => Err(ContainerdError::Refused { what: what(), status }),
            Err(_) => Err(unreachable(format!("no answer in {} s", limit.as_secs()))),
        }
    }
}

// The last of an error's causes: what the kernel said.
fn reason(mut error: &(dyn std::error::Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_in_several_ways() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(socket(Path::new("/run/c.sock")), Path::new("/run/c.sock"));
        assert_eq!(socket(Path::new("unix:///run/c.sock")), Path::new("/run/c.sock"));
        assert_eq!(socket(Path::new("c.sock")), here.join("c.sock"));
    }

    #[tokio::test]
    async fn an_address_may_have_a_scheme_but_not_be_relative() {
        assert_eq!(
            Containerd::at(Path::new("unix:///run/c.sock")).unwrap().address,
            Path::new("/run/c.sock")
        );
        let why = Containerd::at(Path::new("c.sock")).unwrap_err().to_string();
        assert!(why.contains("absolute") && why.contains("`--address`"), "{why}");
    }

    #[tokio::test]
    async fn who_does_not_answer_in_time_is_not_waited_for() {
        let containerd = Containerd::at(Path::new("/run/c.sock")).unwrap();
        let never = std::future::pending::<Result<(), Status>>();
        let why = containerd.answer_within(Duration::from_millis(1), String::new, never).await.unwrap_err();
        assert_eq!(why.code(), Code::Unavailable);
    }
}
