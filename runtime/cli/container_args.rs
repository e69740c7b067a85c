//! Arguments of `hydrate`, `exec` and `logs`.

use clap::Args;

use crate::units::Rate;

/// `lazyrun hydrate`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").args(["pause", "resume", "limit", "image"]).required(true).multiple(true)))]
pub struct HydrateArgs {
    /// Wait until every layer is local and proven; interrupting this leaves hydration going
    #[arg(long, requires = "image", conflicts_with_all = ["pause", "resume", "limit"])]
    pub wait: bool,
    /// Pause hydration of the image, or of all
    #[arg(long, conflicts_with_all = ["resume", "limit"])]
    pub pause: bool,
    /// Resume hydration of the image, or of all
    #[arg(long, conflicts_with = "limit")]
    pub resume: bool,
    /// Limit all hydration from now on, such as 50MiB/s; none to lift the limit
    #[arg(long, value_name = "RATE", conflicts_with = "image")]
    pub limit: Option<Rate>,
    /// Reference of the image; to pause and resume, also its id
    pub image: Option<String>,
}

/// `lazyrun exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Forward standard input
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User and group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Name, id, or beginning of an id
    pub container: String,
    /// Command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `lazyrun logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
    /// Only what came since a time (RFC 3339) or an age such as 10m
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Only what came until a time or an age
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// With times
    #[arg(short, long)]
    pub timestamps: bool,
    /// Name, id, or beginning of an id
    pub container: String,
}
