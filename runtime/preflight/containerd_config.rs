//! containerd's `config.toml` with its imports, put together as containerd does it.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Rows, glob};

/// Most bytes of one file, and most files, that are read.
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 256;

/// Why containerd's configuration can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is none.
    #[error("{} does not exist: containerd runs with its defaults, and knows no lazyrun", .path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file that is imported does not exist, or one can't be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is no TOML, or too much of it.
    #[error("{}, line {line}: {reason}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// All files of a configuration as one.
#[derive(Debug)]
pub struct ContainerdConfig {
    files: Vec<PathBuf>,
    table: Table,
    /// Sections of plugins that a later file has replaced, and both files.
    replaced: Vec<(String, PathBuf, PathBuf)>,
}

impl ContainerdConfig {
    /// Reads a file and what it imports.
    ///
    /// # Errors
    /// When a file is missing, can't be read or is malformed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut config = Self { files: Vec::new(), table: Table::new(), replaced: Vec::new() };
        let mut origins = HashMap::new();
        let mut pending = std::collections::VecDeque::from([path.to_owned()]);
        while let Some(path) = pending.pop_front() {
            if config.files.contains(&path) {
                continue;
            }
            if config.files.len() == MAX_FILES {
                let reason = format!("it imports more than {MAX_FILES} files");
                return Err(ConfigError::Malformed { path: config.files[0].clone(), line: 1, reason });
            }
            let table = read(&path, config.files.is_empty())?;
            pending.extend(imports(&path, &table));
            config.merge(&path, table, &mut origins);
            config.files.push(path);
        }
        Ok(config)
    }

    // As containerd's mergeConfig. Version 2 comes with containerds that replace a plugin's section as a whole.
    fn merge(&mut self, path: &Path, from: Table, origins: &mut HashMap<String, PathBuf>) {
        if self.files.is_empty() {
            for name in from.get("plugins").and_then(Value::as_table).into_iter().flat_map(Table::keys) {
                origins.insert(name.clone(), path.to_owned());
            }
            self.table = from;
            return;
        }
        let whole_plugins = self.version() < 3;
        for (key, value) in from {
            let whole = match key.as_str() {
                "plugins" => whole_plugins,
                "proxy_plugins" | "stream_processors" | "timeouts" => true,
                _ => false,
            };
            match (self.table.get_mut(&key), value) {
                (Some(Value::Table(to)), Value::Table(from)) if whole => {
                    for (name, section) in from {
                        if key == "plugins"
                            && let Some(first) = origins.insert(name.clone(), path.to_owned())
                        {
                            self.replaced.push((name.clone(), first, path.to_owned()));
                        }
                        to.insert(name, section);
                    }
                }
                (Some(to), value) => merge_value(to, value),
                (None, value) => {
                    self.table.insert(key, value);
                }
            }
        }
    }

    /// The version of its format; 1 where it says none.
    pub fn version(&self) -> i64 {
        self.table.get("version").and_then(Value::as_integer).unwrap_or(1)
    }

    /// The file that the others are imported by.
    pub(super) fn path(&self) -> &Path {
        &self.files[0]
    }

    /// What is at a path of keys.
    pub fn get(&self, path: &[&str]) -> Option<&Value> {
        let (last, tables) = path.split_last()?;
        let mut table = &self.table;
        for name in tables {
            table = table.get(*name)?.as_table()?;
        }
        table.get(*last)
    }

    /// The text at a path of keys, if there is some.
    pub(super) fn text(&self, path: &[&str]) -> Option<&str> {
        self.get(path)?.as_str().filter(|text| !text.is_empty())
    }

    /// The table at a path of keys, by name.
    pub(super) fn entries(&self, path: &[&str]) -> impl Iterator<Item = (&str, &Table)> {
        let table = self.get(path).and_then(Value::as_table);
        table.into_iter().flatten().filter_map(|(name, value)| Some((name.as_str(), value.as_table()?)))
    }

    /// Whether a plugin is switched off, by any of its names.
    pub(super) fn disables(&self, plugins: &[&str]) -> bool {
        let list = self.get(&["disabled_plugins"]).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).any(|name| plugins.contains(&name))
    }

    /// Where containerd listens.
    pub(super) fn socket(&self) -> Option<PathBuf> {
        let moved = ["plugins", "io.containerd.server.v1.grpc", "address"];
        self.text(&moved).or_else(|| self.text(&["grpc", "address"])).map(PathBuf::from)
    }

    /// What is to be said of the files as such.
    pub(super) fn check(&self, rows: &mut Rows) {
        let what = "containerd's configuration";
        if self.version() < 2 {
            rows.error(
                what,
                format!(
                    "{} is of version 1, in which plugins have other names; containerd 2 has given that up",
                    self.path().display()
                ),
                "run `containerd config migrate`, or write `version = 2` at its top and plugins' whole names",
            );
        } else {
            let more = match self.files.len() {
                1 => String::new(),
                n => format!(" with {} imported", n - 1),
            };
            rows.ok(what, format!("{}{more}, version {}", self.path().display(), self.version()));
        }
        for (name, first, second) in &self.replaced {
            rows.warning(
                what,
                format!(
                    "plugin {name} has a section in {} that counts instead of that in {}: containerd 1 does not merge \
                     them",
                    second.display(),
                    first.display()
                ),
                format!("write all that is said of {name} in one file"),
            );
        }
    }
}

fn read(path: &Path, first: bool) -> Result<Table, ConfigError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound if first => ConfigError::Missing { path: path.to_owned() },
        _ => ConfigError::Read { path: path.to_owned(), source },
    };
    let malformed =
        |line: usize, reason: String| ConfigError::Malformed { path: path.to_owned(), line, reason };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(malformed(1, "it is larger than 1 MiB".to_owned()));
    }
    toml::from_str(&text).map_err(|error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        // Further lines repeat the text, which may hold passwords of registries.
        malformed(line, error.message().lines().next().unwrap_or_default().to_owned())
    })
}

fn imports(path: &Path, table: &Table) -> Vec<PathBuf> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let named = table.get("imports").and_then(Value::as_array);
    let named = named.into_iter().flatten().filter_map(Value::as_str).map(|name| dir.join(name));
    named
        .flat_map(|path| {
            let is_pattern = path.to_string_lossy().contains('*');
            if is_pattern { glob::files(&path) } else { vec![path] }
        })
        .collect()
}

/// Tables are merged, lists joined; otherwise the later file counts.
fn merge_value(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Table(to), Value::Table(from)) => {
            for (key, value) in from {
                match to.get_mut(&key) {
                    Some(old) => merge_value(old, value),
                    None => {
                        to.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(to), Value::Array(from)) => {
            for value in from {
                if !to.contains(&value) {
                    to.push(value);
                }
            }
        }
        (to, from) => *to = from,
    }
}
