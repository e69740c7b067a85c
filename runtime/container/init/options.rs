//! Mount options as fstab words: which are mount attributes, which propagation, which the filesystem's own.

use crate::container::sys::{MountAttr, attr};

/// The options of one mount, sorted out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) bind: bool,
    pub(super) recursive: bool,
    pub(super) attr: MountAttr,
    /// Attributes for the whole tree (`rro` and its like).
    pub(super) tree_attr: MountAttr,
    /// (propagation flag, recursive), in order.
    pub(super) propagation: Vec<(u64, bool)>,
    /// Superblock flags, as fsconfig(2) names them.
    pub(super) superblock: Vec<&'static str>,
    /// What is left for the filesystem.
    pub(super) data: Vec<(String, Option<String>)>,
}

impl Options {
    pub(super) fn parse(words: &[String]) -> Self {
        let mut out = Self::default();
        for word in words {
            out.word(word);
        }
        out
    }

    fn word(&mut self, word: &str) {
        if let Some((set, flag)) = attribute(word) {
            apply(&mut self.attr, set, flag);
            return;
        }
        if let Some((set, flag)) = word.strip_prefix('r').and_then(attribute).filter(|_| word != "ro") {
            apply(&mut self.tree_attr, set, flag);
            return;
        }
        match word {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "private" => self.propagation.push((libc::MS_PRIVATE, false)),
            "rprivate" => self.propagation.push((libc::MS_PRIVATE, true)),
            "slave" => self.propagation.push((libc::MS_SLAVE, false)),
            "rslave" => self.propagation.push((libc::MS_SLAVE, true)),
            "shared" => self.propagation.push((libc::MS_SHARED, false)),
            "rshared" => self.propagation.push((libc::MS_SHARED, true)),
            "unbindable" => self.propagation.push((libc::MS_UNBINDABLE, false)),
            "runbindable" => self.propagation.push((libc::MS_UNBINDABLE, true)),
            "sync" => self.superblock.push("sync"),
            "dirsync" => self.superblock.push("dirsync"),
            "lazytime" => self.superblock.push("lazytime"),
            // Words without an effect here: they undo defaults, or are for other runtimes.
            "" | "defaults" | "async" | "nomand" | "mand" | "iversion" | "noiversion" | "loud" | "silent"
            | "tmpcopyup" | "z" | "Z" | "nocopy" | "copy" | "consistent" | "cached" | "delegated" => {}
            other => self.data.push(match other.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (other.to_owned(), None),
            }),
        }
    }
}

/// (set or clear, flag) of a per-mount attribute.
fn attribute(word: &str) -> Option<(bool, u64)> {
    Some(match word {
        "ro" => (true, attr::RDONLY),
        "rw" => (false, attr::RDONLY),
        "nosuid" => (true, attr::NOSUID),
        "suid" => (false, attr::NOSUID),
        "nodev" => (true, attr::NODEV),
        "dev" => (false, attr::NODEV),
        "noexec" => (true, attr::NOEXEC),
        "exec" => (false, attr::NOEXEC),
        "noatime" => (true, attr::NOATIME),
        "strictatime" => (true, attr::STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (false, attr::ATIME),
        "nodiratime" => (true, attr::NODIRATIME),
        "diratime" => (false, attr::NODIRATIME),
        "nosymfollow" => (true, attr::NOSYMFOLLOW),
        "symfollow" => (false, attr::NOSYMFOLLOW),
        _ => return None,
    })
}

fn apply(to: &mut MountAttr, set: bool, flag: u64) {
    if flag & attr::ATIME != 0 {
        // The access time modes are one field: clear all of it, then set one value.
        to.set &= !attr::ATIME;
        to.clear |= attr::ATIME;
        to.set |= if set { flag } else { 0 };
    } else if set {
        to.set |= flag;
        to.clear &= !flag;
    } else {
        to.clear |= flag;
        to.set &= !flag;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Options {
        Options::parse(&words.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn later_words_win_and_data_stays() {
        let o = parse("nosuid,ro,noexec,exec,mode=755,size=65536k,newinstance");
        assert_eq!(o.attr.set, attr::NOSUID | attr::RDONLY);
        assert_eq!(o.attr.clear, attr::NOEXEC);
        let names: Vec<_> = o.data.iter().map(|(k, v)| (k.as_str(), v.as_deref())).collect();
        assert_eq!(names, [("mode", Some("755")), ("size", Some("65536k")), ("newinstance", None)]);
    }

    #[test]
    fn access_time_is_one_field() {
        let o = parse("noatime,strictatime");
        assert_eq!((o.attr.set, o.attr.clear), (attr::STRICTATIME, attr::ATIME));
        let o = parse("noatime,relatime");
        assert_eq!((o.attr.set, o.attr.clear), (0, attr::ATIME));
    }

    #[test]
    fn recursive_words() {
        let o = parse("rbind,rro,rprivate");
        assert!(o.bind && o.recursive);
        assert_eq!(o.tree_attr.set, attr::RDONLY);
        assert_eq!(o.attr.set, 0);
        assert_eq!(o.propagation, [(libc::MS_PRIVATE, true)]);
        assert!(parse("relatime").tree_attr == MountAttr::default());
    }
}
