//! TOML with errors that name file and line.

use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::FetchError;

/// Parses a document.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, FetchError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| line_at(text, span.start));
        // The first line says what is wrong; further ones repeat the text, which may hold secrets.
        let message = error.message().lines().next().unwrap_or_default().to_owned();
        FetchError::bad_config(path, line, message)
    })
}

/// An error about the value at `span`.
pub(crate) fn at(path: &Path, text: &str, span: &Range<usize>, reason: impl Into<String>) -> FetchError {
    FetchError::bad_config(path, Some(line_at(text, span.start)), reason)
}

/// An error about what contains `words`.
pub(crate) fn about(path: &Path, text: &str, words: &str, reason: impl Into<String>) -> FetchError {
    FetchError::bad_config(path, text.find(words).map(|at| line_at(text, at)), reason)
}

/// Number of the line with this byte, counted from 1.
fn line_at(text: &str, byte: usize) -> usize {
    text.as_bytes()[..byte.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}
