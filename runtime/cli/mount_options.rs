//! `lazyrun mount -o`: options as mount(8) takes them.

use lazyrun_fs::mount::{
    ATTR_NOATIME, ATTR_NODEV, ATTR_NODIRATIME, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, ATTRS_ATIME, Shown,
};

/// SELinux's options of a filesystem.
const LABELS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// What `-o` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// `rw` or `ro`, if it was said.
    pub(super) writable: Option<bool>,
    /// Attributes of the mount (`ATTR_*`) to set.
    pub(super) set: u64,
    /// And to clear, before.
    pub(super) clear: u64,
    /// Owners and labels.
    pub(super) shown: Shown,
}

impl MountOptions {
    /// Reads the values of all `-o`, each a list separated by commas; a value in double quotes may have commas.
    ///
    /// # Errors
    /// A sentence that names the option.
    pub(super) fn parse(given: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        for option in given.iter().flat_map(|list| split(list)).filter(|option| !option.is_empty()) {
            options.take(&option)?;
        }
        Ok(options)
    }

    fn take(&mut self, option: &str) -> Result<(), String> {
        let mut attribute = |attribute: u64, on: bool| {
            self.set = if on { self.set | attribute } else { self.set & !attribute };
            self.clear = if on { self.clear & !attribute } else { self.clear | attribute };
        };
        match option {
            "ro" => self.writable = Some(false),
            "rw" => self.writable = Some(true),
            "nosuid" | "suid" => attribute(ATTR_NOSUID, option == "nosuid"),
            "nodev" | "dev" => attribute(ATTR_NODEV, option == "nodev"),
            "noexec" | "exec" => attribute(ATTR_NOEXEC, option == "noexec"),
            "nodiratime" | "diratime" => attribute(ATTR_NODIRATIME, option == "nodiratime"),
            "noatime" | "relatime" => {
                self.clear |= ATTRS_ATIME;
                self.set = (self.set & !ATTRS_ATIME) | if option == "noatime" { ATTR_NOATIME } else { 0 };
            }
            "defaults" => {}
            _ => return self.value(option),
        }
        Ok(())
    }

    fn value(&mut self, option: &str) -> Result<(), String> {
        let unknown = || {
            format!(
                "`lazyrun mount` has no option {option:?}; it has ro, rw, nosuid, nodev, noexec, noatime, nodiratime, \
                 relatime, {}=LABEL and X-mount.idmap=MAPPING",
                LABELS.join("=LABEL, ")
            )
        };
        let (name, value) = option.split_once('=').ok_or_else(unknown)?;
        let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
        if LABELS.contains(&name) && !value.is_empty() {
            self.shown.labels.push((name.to_owned(), value.to_owned()));
            return Ok(());
        }
        if name != "X-mount.idmap" {
            return Err(unknown());
        }
        self.shown.idmap = Some(value.parse()?);
        Ok(())
    }

    /// The attributes to set on a mount that may be written to or not.
    pub(super) fn attributes(&self, writable: bool) -> u64 {
        self.set | if writable { 0 } else { ATTR_RDONLY }
    }
}

fn split(list: &str) -> Vec<String> {
    let (mut parts, mut quoted) = (vec![String::new()], false);
    for c in list.chars() {
        quoted ^= c == '"';
        match parts.last_mut() {
            Some(part) if c != ',' || quoted => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(given: &[&str]) -> Result<MountOptions, String> {
        MountOptions::parse(&given.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_those_of_mount() {
        let options = parse(&["rw,nosuid,noexec,nodev", "exec,noatime"]).unwrap();
        assert_eq!(options.writable, Some(true));
        assert_eq!(
            (options.set, options.clear),
            (ATTR_NOSUID | ATTR_NODEV | ATTR_NOATIME, ATTR_NOEXEC | ATTRS_ATIME)
        );
        assert_eq!(options.attributes(false), options.set | ATTR_RDONLY);
        let options = parse(&[r#"context="system_u:object_r:svirt_file_t:s0:c1,c2",ro"#]).unwrap();
        let label = ("context".to_owned(), "system_u:object_r:svirt_file_t:s0:c1,c2".to_owned());
        assert_eq!((options.shown.labels, options.writable), (vec![label], Some(false)));
        assert!(parse(&["X-mount.idmap=b:0:100000:65536"]).unwrap().shown.idmap.is_some());
        assert_eq!(parse(&["", "defaults,"]), Ok(MountOptions::default()));
    }

    #[test]
    fn what_is_no_option_is_said() {
        for option in ["bind", "context", "context=", "size=5"] {
            let why = parse(&[option]).unwrap_err();
            assert!(why.contains(&format!("{option:?}")) && why.contains("noexec"), "{why}");
        }
        assert!(parse(&["X-mount.idmap=u:0:1:1"]).unwrap_err().contains("groups"));
    }
}
