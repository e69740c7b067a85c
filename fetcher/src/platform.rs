//! Platforms and the choice among the manifests of a list.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Operating system, architecture and variant in OCI (Go) words: `linux/arm64/v8`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system, `linux`.
    #[serde(default)]
    pub os: String,
    /// Architecture by Go's name: `amd64`, `arm64`, `arm`, `riscv64`, …
    #[serde(default)]
    pub architecture: String,
    /// Variant of the architecture, `v7` for `arm`; none where there is only one.
    #[serde(default, deserialize_with = "non_empty", skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Documents may say that there is no variant by an empty one.
fn non_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|variant| !variant.is_empty()))
}

impl Platform {
    /// The platform this program was built for.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// How well an image for `offered` runs here: higher is better, `None` is not at all.
    ///
    /// A missing variant of arm64 means v8 and of arm v7; an amd64 host that names no variant takes only the
    /// baseline; a lower variant runs on a higher one.
    pub fn rank(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let (mine, theirs) = (self.level()?, offered.level()?);
        (theirs <= mine).then_some(theirs)
    }

    fn level(&self) -> Option<u32> {
        match &self.variant {
            Some(variant) if !variant.is_empty() => variant.strip_prefix('v')?.parse().ok(),
            _ => Some(match self.architecture.as_str() {
                "arm64" => 8,
                "arm" => 7,
                "amd64" => 1,
                _ => 0,
            }),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) if !variant.is_empty() => write!(f, "/{variant}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, arch] => (os, arch, None),
            [os, arch, variant] => (os, arch, Some(variant)),
            _ => return Err(format!("platform {text:?} is not of the form os/architecture[/variant]")),
        };
        if parts.iter().any(|p| p.is_empty() || !p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')) {
            return Err(format!("platform {text:?} is not of the form os/architecture[/variant]"));
        }
        Ok(Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn variants_match_downwards() {
        assert!(p("linux/arm64").rank(&p("linux/arm64/v8")).is_some());
        assert!(p("linux/arm64/v8").rank(&p("linux/arm64")).is_some());
        assert!(p("linux/arm/v7").rank(&p("linux/arm/v6")) < p("linux/arm/v7").rank(&p("linux/arm/v7")));
        assert_eq!(p("linux/arm/v6").rank(&p("linux/arm/v7")), None);
        assert_eq!(p("linux/amd64").rank(&p("linux/amd64/v3")), None);
        assert!(p("linux/amd64/v3").rank(&p("linux/amd64/v2")).is_some());
        assert_eq!(p("linux/amd64").rank(&p("windows/amd64")), None);
        assert_eq!(p("linux/amd64").rank(&p("unknown/unknown")), None);
    }

    #[test]
    fn parses_and_prints() {
        assert_eq!(p("linux/arm/v7").to_string(), "linux/arm/v7");
        assert!("linux".parse::<Platform>().is_err());
        assert!("linux//v7".parse::<Platform>().is_err());
        assert_eq!(Platform::host().os, "linux");
    }
}
