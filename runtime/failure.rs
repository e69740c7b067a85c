//! An error on its way to the user: one sentence and the exit code.

use std::fmt;

/// lazyrun itself failed (docker's 125).
pub const EXIT_LAZYRUN: u8 = 125;

/// What the command line ends with: an exit code as docker's and one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit code: 125 for lazyrun's own failures, 126 and 127 for a command that can't be started.
    pub code: u8,
    /// What failed, on what, why, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure with an exit code of its own.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A failure of lazyrun itself.
    pub fn daemon(message: impl Into<String>) -> Self {
        Self::new(EXIT_LAZYRUN, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => match error.downcast::<crate::container::ContainerError>() {
                Ok(error) => error.into(),
                Err(error) => Self::daemon(sentence(&error)),
            },
        }
    }
}

/// What went wrong and why, each cause once: many errors say what caused them themselves.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

impl From<crate::container::ContainerError> for Failure {
    fn from(error: crate::container::ContainerError) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the layer cannot be used: {source}")]
    struct Outer {
        source: std::io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::Error::new(Outer { source: std::io::Error::other("bad data") });
        let error = error.context("pulling the image");
        assert_eq!(sentence(&error), "pulling the image: the layer cannot be used: bad data");
        assert_eq!(Failure::from(error).message, "pulling the image: the layer cannot be used: bad data");
    }
}
