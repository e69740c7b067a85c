//! Patterns of files, as containerd's `imports` has them (Go's `filepath.Glob`).

use std::path::{Component, Path, PathBuf};

use regex::Regex;

/// The files that match, sorted.
pub(super) fn files(pattern: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for component in pattern.components() {
        let Component::Normal(name) = component else {
            found.iter_mut().for_each(|dir| dir.push(component));
            continue;
        };
        let name = name.to_string_lossy();
        found = if name.contains(['*', '?', '[']) {
            found.iter().flat_map(|dir| matching(dir, &name)).collect()
        } else {
            found.into_iter().map(|dir| dir.join(&*name)).filter(|path| path.exists()).collect()
        };
    }
    found
}

fn matching(dir: &Path, pattern: &str) -> Vec<PathBuf> {
    let Some(pattern) = regex_of(pattern) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| pattern.is_match(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// `*`, `?` and `[a-z]`, for one name.
fn regex_of(pattern: &str) -> Option<Regex> {
    let mut text = String::from("^");
    let mut rest = pattern.chars();
    while let Some(c) = rest.next() {
        match c {
            '*' => text.push_str(".*"),
            '?' => text.push('.'),
            '[' => {
                text.push('[');
                let class = rest.by_ref().take_while(|c| *c != ']');
                text.extend(class.filter(|c| !matches!(c, '[' | '&' | '\\')));
                text.push(']');
            }
            c => text.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    Regex::new(&(text + "$")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_match() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/1.toml", "a/2.toml", "b/3.toml", "b/x.conf"] {
            std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |pattern: &str| -> Vec<String> {
            let found = files(&dir.path().join(pattern));
            found.iter().map(|f| f.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names("*/*.toml"), ["a/1.toml", "a/2.toml", "b/3.toml"]);
        assert_eq!(names("a/[2-9].toml"), ["a/2.toml"]);
        assert_eq!(names("b/?.conf"), ["b/x.conf"]);
        assert_eq!(names("b/3xtoml"), Vec::<String>::new());
    }
}
