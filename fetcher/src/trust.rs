//! Whose word counts about a layer: trust modes and where a claimed index came from.
//!
//! An index built here from the blob is *proven*. Any other index is a claim until a stream of the blob has
//! proven it. Which claims are admitted meanwhile is the trust mode's matter (docs/SECURITY.md).

use std::fmt;
use std::str::FromStr;

use lazyrun_index::Digest;
use serde::{Deserialize, Serialize};

use crate::reference::Reference;

/// Which indexes may be used before they are proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrustMode {
    /// None: only what was built or proven on this node.
    Proven,
    /// Those that the image's manifest or index covers by digest, or whose digest the user pins.
    Bound,
    /// Also those that lie beside the image in its repository.
    Repository,
}

impl TrustMode {
    /// The default: who asks by tag trusts the repository's writers anyhow, who asks by digest does not.
    pub fn default_for(reference: &Reference) -> TrustMode {
        if reference.digest.is_some() { TrustMode::Bound } else { TrustMode::Repository }
    }

    /// Whether a claim with this trust may be used.
    pub fn admits(self, trust: Trust) -> bool {
        match trust {
            Trust::Bound => self >= TrustMode::Bound,
            Trust::Repository => self >= TrustMode::Repository,
        }
    }
}

impl fmt::Display for TrustMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrustMode::Proven => "proven",
            TrustMode::Bound => "bound",
            TrustMode::Repository => "repository",
        })
    }
}

/// Why a text is not a [`TrustMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a trust mode: it is one of proven, bound, repository")]
pub struct ParseTrustError {
    /// What was given.
    pub text: String,
}

impl FromStr for TrustMode {
    type Err = ParseTrustError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "proven" => Ok(TrustMode::Proven),
            "bound" => Ok(TrustMode::Bound),
            "repository" => Ok(TrustMode::Repository),
            _ => Err(ParseTrustError { text: text.chars().take(100).collect() }),
        }
    }
}

/// What ties a claimed index to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// A digest that the image's manifest or index holds, or that the user pinned.
    Bound,
    /// Only its place: whoever may write to the image's repository could have put it there.
    Repository,
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trust::Bound => "bound",
            Trust::Repository => "repository",
        })
    }
}

/// The form in which an index was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OriginKind {
    /// lazyrun's own index artifact.
    Own,
    /// SOCI index, version 1: a referrer.
    SociV1,
    /// SOCI index, version 2: inside the image index.
    SociV2,
    /// Table of contents of an eStargz layer.
    Estargz,
    /// Manifest of a zstd:chunked layer.
    ZstdChunked,
}

impl fmt::Display for OriginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OriginKind::Own => "lazyrun index",
            OriginKind::SociV1 => "SOCI index v1",
            OriginKind::SociV2 => "SOCI index v2",
            OriginKind::Estargz => "eStargz table",
            OriginKind::ZstdChunked => "zstd:chunked manifest",
        })
    }
}

/// Where a claimed index came from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// In which form it was found.
    pub kind: OriginKind,
    /// Manifest of the artifact; none where the layer's own blob held it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Digest>,
    /// What ties it to the image.
    pub trust: Trust,
}

/// What discovery may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexPolicy {
    /// Which claims are admitted.
    pub trust: TrustMode,
    /// Take exactly the artifact with this manifest digest and nothing else. The pin makes it bound.
    pub pinned: Option<Digest>,
}

impl IndexPolicy {
    /// The default policy for a reference: nothing pinned, [`TrustMode::default_for`].
    pub fn default_for(reference: &Reference) -> IndexPolicy {
        IndexPolicy { trust: TrustMode::default_for(reference), pinned: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_admit_what_they_say() {
        let admitted = |mode: TrustMode| (mode.admits(Trust::Bound), mode.admits(Trust::Repository));
        assert_eq!(admitted(TrustMode::Proven), (false, false));
        assert_eq!(admitted(TrustMode::Bound), (true, false));
        assert_eq!(admitted(TrustMode::Repository), (true, true));
    }

    #[test]
    fn defaults_go_by_the_reference() {
        let tag: Reference = "debian:12".parse().unwrap();
        assert_eq!(TrustMode::default_for(&tag), TrustMode::Repository);
        let pinned = tag.with_digest(Digest::of(b"x"));
        assert_eq!(IndexPolicy::default_for(&pinned).trust, TrustMode::Bound);
    }

    #[test]
    fn texts_round_trip() {
        for mode in [TrustMode::Proven, TrustMode::Bound, TrustMode::Repository] {
            assert_eq!(mode.to_string().parse::<TrustMode>().unwrap(), mode);
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
        }
        assert!("Bound".parse::<TrustMode>().is_err());
        let origin = Origin { kind: OriginKind::SociV2, artifact: None, trust: Trust::Bound };
        let json = serde_json::to_string(&origin).unwrap();
        assert_eq!(json, r#"{"kind":"soci-v2","trust":"bound"}"#);
        assert_eq!(serde_json::from_str::<Origin>(&json).unwrap(), origin);
    }
}
