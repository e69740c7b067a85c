//! The flags of `lazyrun profile` and `lazyrun index`.

use clap::Subcommand;

/// `lazyrun profile`
#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// Show which files starts touch, in order of first touch
    Show {
        /// `json`, or a template such as '{{.Path}}'
        #[arg(long)]
        format: Option<String>,
        /// Reference of the image
        image: String,
    },
    /// Start the image once, without a network, and keep what it touches in place of what is known
    Build {
        /// Network of the container
        #[arg(long, default_value = "none")]
        network: String,
        /// Reference of the image
        image: String,
        /// Command instead of the image's own
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Push the profile beside the image, with the indexes of its layers
    Push {
        /// `json`, or a template such as '{{.Digest}}'
        #[arg(long)]
        format: Option<String>,
        /// Reference of the image
        image: String,
    },
    /// Take the profile over from the registry
    Pull {
        /// Reference of the image
        image: String,
    },
    /// Forget the profile that is here
    Rm {
        /// Reference of the image
        image: String,
    },
}

/// `lazyrun index`
#[derive(Debug, Subcommand)]
pub enum IndexCommand {
    /// Make the indexes of all layers, streaming each layer once
    Build {
        /// Stream the layers that starts touch anew, with spans that follow what is touched, so that a start fetches little
        /// else
        #[arg(long)]
        profile: bool,
        /// Reference of the image
        image: String,
    },
    /// Push the indexes beside the image, building those that are missing, and the profile if there is one
    Push {
        /// Leave the profile out
        #[arg(long)]
        no_profile: bool,
        /// Time to note in the artifact (RFC 3339); without it equal indexes make equal artifacts
        #[arg(long, value_name = "TIME")]
        created: Option<String>,
        /// `json`, or a template such as '{{.Digest}}'
        #[arg(long)]
        format: Option<String>,
        /// Reference of the image
        image: String,
    },
    /// Take the indexes over from the registry, without any of the layers' bytes
    Pull {
        /// Reference of the image
        image: String,
    },
    /// List the index artifacts that the registry has of an image
    Ls {
        /// `json`, or a template such as '{{.Digest}}'
        #[arg(long)]
        format: Option<String>,
        /// Reference of the image
        image: String,
    },
    /// Show the indexes that are here
    Inspect {
        /// List the entries instead, as they are in the tars
        #[arg(long, conflicts_with = "spans")]
        entries: bool,
        /// List the spans instead
        #[arg(long)]
        spans: bool,
        /// Only this layer of the list: its number, 0 at the bottom, or the beginning of its digest
        #[arg(long, value_name = "LAYER")]
        layer: Option<String>,
        /// `json`, or a template such as '{{.Digest}}'; in lists for each row
        #[arg(long)]
        format: Option<String>,
        /// Reference of the image
        image: String,
    },
    /// Compare the indexes that are here with the layers' blobs, entry by entry
    Verify {
        /// Reference of the image
        image: String,
    },
    /// Delete index artifacts from the registry: the one of --index-digest, or all that lazyrun made
    Rm {
        /// Reference of the image
        image: String,
    },
}
