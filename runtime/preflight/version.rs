//! Which containerd runs.

use std::path::Path;

use super::Rows;
use crate::containerd::Containerd;

/// A version of containerd: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Reads what containerd tells, such as `v1.7.4`, `1.6.20~ds1` or `v2.1.0-rc.1`.
    pub fn parse(text: &str) -> Option<Version> {
        let mut numbers = text.trim().trim_start_matches('v').split('.').map(|part| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse::<u32>().ok()
        });
        Some(Version(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }
}

/// Asks the containerd at a socket.
pub(super) async fn ask(address: &Path, rows: &mut Rows) -> Option<Version> {
    let what = "containerd";
    let told = async { Containerd::at(address)?.version().await }.await;
    match told {
        Ok(text) => {
            rows.ok(what, format!("version {text} answers at {}", address.display()));
            Version::parse(&text)
        }
        Err(error) => {
            rows.warning(
                what,
                format!("{error}; what depends on its version or on its mounts can't be checked"),
                "start containerd, and run this as root",
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_they_are_told() {
        for (text, version) in [
            ("v1.7.4", Version(1, 7, 4)),
            ("1.6.20~ds1", Version(1, 6, 20)),
            ("v2.1.0-rc.1", Version(2, 1, 0)),
            ("2.0", Version(2, 0, 0)),
        ] {
            assert_eq!(Version::parse(text), Some(version), "{text}");
        }
        assert_eq!(Version::parse("dev"), None);
        assert!(Version(1, 7, 3) < Version(1, 7, 4) && Version(2, 0, 0) > Version(1, 7, 30));
    }
}
