//! Registry client, fetch scheduling and the layer-file store.
//!
//! Bytes arrive in two ways (see docs/ARCHITECTURE.md): as a *stream*, one sequential GET of a layer blob that
//! builds the layer index while it fills the layer file, and as *faults*, ranged GETs of just the spans a reader
//! misses. Both end as verified bytes in the sparse layer file of a [`LayerStore`].
//!
//! The crate reads no environment and prints nothing; what it has to say goes to `tracing`.

mod artifact;
mod auth;
mod bounds;
mod client;
mod discover;
mod error;
mod fetch;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hosts;
mod manifest;
pub mod observe;
mod platform;
mod reference;
mod stats;
mod store;
mod trust;

pub use artifact::{
    Descriptor, IndexArtifact, IndexSource, IndexedLayer, OWN_ARTIFACT_TYPE, OWN_LAYER_INDEX,
    OWN_LAYER_INDEX_ZSTD, OWN_PROFILE_ZSTD, PushOptions, PushReport, SOCI_V1_ARTIFACT_TYPE,
    SOCI_V2_ARTIFACT_TYPE, delete_index, list_indexes, push_indexes,
};
pub use auth::{Kept, Keychain, ProviderFiles, PullSecret, Trial, erase_login, save_login};
pub use client::{
    BlobReader, BlobSource, ClientOptions, CredentialReport, HostReport, Proxies, RegistryClient, TlsReport,
    Uploaded,
};
pub use discover::{
    Beside, ClaimedIndex, DiscoverOptions, FoundIndexes, discover, discover_beside, discover_with,
    find_profile, pull_index, resolve_and_look,
};
pub use error::FetchError;
pub use fetch::{FetchOptions, Fetcher, Haste, NoProgress, Progress};
pub use hosts::{CheckedFile, HostFiles, check_providers, check_settings};
pub use manifest::{LayerDescriptor, ResolvedImage};
pub use observe::Class;
pub use platform::Platform;
pub use reference::{Reference, ReferenceError};
pub use stats::{ClientStats, FetchStats, Histogram, HistogramSnapshot, HostStats};
pub use store::{
    CacheLimit, CacheLimits, Checked, EvictionStats, InUse, Layer, LayerPin, LayerStore, LayerUsers,
    ParseLimitError, parse_bytes,
};
pub use trust::{IndexPolicy, Origin, OriginKind, ParseTrustError, Trust, TrustMode};
