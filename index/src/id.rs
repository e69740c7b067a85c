//! The name of a layer file.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Digest, Layout};

/// Names a layer file in stores: the same layer in another layout is another file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId {
    /// The layer's diffID.
    pub diff_id: Digest,
    /// How the file is laid out.
    pub layout: Layout,
}

/// Why a text is not a [`LayerId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no layer name: expected 64 lower-case hexadecimal digits, \".table\" behind them or not"
)]
pub struct ParseLayerIdError {
    text: String,
}

const TABLE: &str = ".table";

impl LayerId {
    /// The layer file that is the uncompressed tar.
    #[must_use]
    pub const fn tar(diff_id: Digest) -> Self {
        Self { diff_id, layout: Layout::Tar }
    }

    /// The layer file in table order.
    #[must_use]
    pub const fn table(diff_id: Digest) -> Self {
        Self { diff_id, layout: Layout::Table }
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.diff_id.hex())?;
        match self.layout {
            Layout::Tar => Ok(()),
            Layout::Table => f.write_str(TABLE),
        }
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for LayerId {
    type Err = ParseLayerIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (hex, layout) = match text.strip_suffix(TABLE) {
            Some(hex) => (hex, Layout::Table),
            None => (text, Layout::Tar),
        };
        // An over-long text comes from outside: do not carry all of it in the error.
        let diff_id = Digest::from_hex(hex)
            .ok_or_else(|| ParseLayerIdError { text: text.chars().take(100).collect() })?;
        Ok(Self { diff_id, layout })
    }
}

impl Serialize for LayerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LayerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        let diff_id = Digest::of(b"layer");
        let (tar, table) = (LayerId::tar(diff_id), LayerId::table(diff_id));
        assert_eq!(tar.to_string(), diff_id.hex());
        assert_eq!(table.to_string(), format!("{}.table", diff_id.hex()));
        for id in [tar, table] {
            assert_eq!(id.to_string().parse::<LayerId>().unwrap(), id);
            let json = serde_json::to_string(&id).unwrap();
            assert_eq!(serde_json::from_str::<LayerId>(&json).unwrap(), id);
        }
        let hex = diff_id.hex();
        for bad in
            ["", ".table", &hex[1..], &hex.to_uppercase(), &format!("{hex}.tar"), &format!("sha256:{hex}")]
        {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
    }
}
