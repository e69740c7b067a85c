//! The kubelet's `CredentialProviderConfig`.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::pattern;

/// A plugin and what it is for.
#[derive(Clone, Debug)]
pub(super) struct Provider {
    /// Name of its program in the directory of plugins.
    pub(super) name: String,
    /// The version of the protocol that it speaks.
    pub(super) api_version: String,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    /// How long an answer is good that does not say it.
    pub(super) kept_for: Duration,
    images: Vec<String>,
}

impl Provider {
    pub(super) fn is_for(&self, image: &str) -> bool {
        self.images.iter().any(|pattern| pattern::matches(pattern, image))
    }
}

#[derive(Deserialize)]
struct File {
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    api_version: String,
    args: Option<Vec<String>>,
    env: Option<Vec<Variable>>,
    token_attributes: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

/// Reads the file (blocking). Plugins that need the token of a pod's service account are left out: lazyrun acts for the
/// node.
///
/// # Errors
/// When it can't be read or is malformed; its text, which may hold secrets, is in no error.
pub(super) fn read(path: &Path) -> Result<Vec<Provider>, String> {
    let shown = path.display();
    let bytes = crate::hosts::read_small(path).map_err(|e| format!("{shown}: {e}"))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{shown} is not text in UTF-8"))?;
    let file: File = serde_saphyr::from_str(&text).map_err(|e| {
        let place = e.location().map_or_else(String::new, |at| format!(" (line {})", at.line()));
        format!("{shown} is no CredentialProviderConfig{place}")
    })?;
    if file.kind != "CredentialProviderConfig" {
        return Err(format!("{shown} is a {:?}, not a CredentialProviderConfig", file.kind));
    }
    let mut providers = Vec::new();
    for entry in file.providers {
        let wrong = |what: String| format!("{shown}, provider {:?}: {what}", entry.name);
        if !plain(&entry.name) {
            return Err(wrong("its name is not that of a file".to_owned()));
        }
        let versions = ["v1", "v1beta1", "v1alpha1"];
        let version = entry.api_version.strip_prefix("credentialprovider.kubelet.k8s.io/");
        if !version.is_some_and(|version| versions.contains(&version)) {
            return Err(wrong(format!("its apiVersion {:?} is not known", entry.api_version)));
        }
        let kept_for = match &entry.default_cache_duration {
            None => Duration::ZERO,
            Some(text) => {
                duration(text).ok_or_else(|| wrong(format!("{text:?} is no duration such as 12h")))?
            }
        };
        if entry.token_attributes.is_some() {
            tracing::debug!(provider = entry.name, "a credential provider for pods' own tokens is left out");
            continue;
        }
        providers.push(Provider {
            kept_for,
            api_version: entry.api_version,
            args: entry.args.unwrap_or_default(),
            env: entry.env.unwrap_or_default().into_iter().map(|v| (v.name, v.value)).collect(),
            images: entry.match_images,
            name: entry.name,
        });
    }
    Ok(providers)
}

/// Whether a name can be that of a program in the directory of plugins, and of nothing elsewhere.
fn plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && !name.contains(['/', '\\', '\0'])
        && !name.contains(char::is_whitespace)
}

/// A duration as Go writes it: `12h`, `1h30m`, `0s`, `1.5h`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|end| *end > 0)?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
}
