//! Answering a registry's 401: Bearer and Basic with what docker's configuration holds or the kubelet's plugins have.
//!
//! Credentials go to the registry they are stored for and to the token endpoint that this registry names, to
//! nobody else; tokens only to the registry. Neither ever appears in an error or a log line.

mod challenge;
mod config;
mod helper;
mod keychain;
mod program;
mod provider;
mod save;
mod token;

pub(crate) use challenge::{Challenge, parse as parse_challenges};
#[cfg(fuzzing)]
pub(crate) use config::holds;
pub(crate) use config::{Credential, CredentialStore, Found, Summary, summary};
pub use keychain::{Keychain, PullSecret, Trial};
pub use provider::ProviderFiles;
pub(crate) use provider::summary as providers_summary;
pub use save::{Kept, erase_login, save_login};
pub(crate) use token::{
    Access, Authorization, TokenCache, TokenKey, TokenRequest, parse_answer, request as token_request,
};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// The `Authorization` value for Basic.
pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
}
