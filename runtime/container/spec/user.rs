//! Users and groups by name, looked up in the container's own /etc/passwd and /etc/group.

use super::defaults::set_env;
use crate::container::error::{ContainerError, Result};
use crate::container::rootfs;
use oci_spec::runtime::{Process, Spec};
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Annotation by which a generated spec names its user until the root is there to look it up in.
pub const USER_ANNOTATION: &str = "org.lazyrun.user";

/// Largest passwd or group file that is read, in bytes.
const LARGEST_FILE: u64 = 8 << 20;
/// Most supplementary groups a user gets.
const MOST_GROUPS: usize = 1024;

/// What a user string stands for in one root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, `/` when the user has none.
    pub home: String,
}

impl ResolvedUser {
    /// Sets the process' ids.
    pub(crate) fn apply(&self, process: &mut Process) {
        let user = process.user_mut();
        user.set_uid(self.uid);
        user.set_gid(self.gid);
        user.set_additional_gids(Some(self.groups.clone()));
    }
}

struct Entry<'a> {
    name: &'a str,
    id: u32,
    fields: Vec<&'a str>,
}

/// The well-formed lines of a passwd or group file.
fn entries(text: &str) -> impl Iterator<Item = Entry<'_>> {
    text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.trim().split(':').collect();
        let (name, id) = (*fields.first()?, fields.get(2)?.parse().ok()?);
        (!name.is_empty() && !name.starts_with('#')).then_some(Entry { name, id, fields })
    })
}

/// A decimal id; what is longer, signed or in another base is a name or wrong, never a wrapped number
/// (CVE-2024-40635).
fn number(text: &str) -> Result<Option<u32>> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= i32::MAX as u32 => Ok(Some(id)),
        _ => Err(ContainerError::Invalid(format!(
            "user or group id {text} is out of range (0 to {})",
            i32::MAX
        ))),
    }
}

/// Resolves `[name|uid][:name|gid]` as docker does; empty means root.
///
/// # Errors
/// A name is not in the root's files, an id is out of range, or a file cannot be read.
pub fn resolve(root: BorrowedFd<'_>, user: &str) -> Result<ResolvedUser> {
    let read = |path: &str| -> Result<String> {
        let bytes = rootfs::read_file(root, Path::new(path), LARGEST_FILE)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    resolve_in(user, &read("/etc/passwd")?, &read("/etc/group")?)
}

fn resolve_in(user: &str, passwd: &str, group: &str) -> Result<ResolvedUser> {
    let (name, wanted_group) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|g| !g.is_empty())),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let id = number(name)?;
    let found = entries(passwd).find(|e| e.name == name || id == Some(e.id));
    let uid = match (&found, id) {
        (Some(e), _) => e.id,
        (None, Some(id)) => id,
        (None, None) => {
            return Err(ContainerError::Invalid(format!(
                "user \"{name}\" is not in the container's /etc/passwd"
            )));
        }
    };
    let home = found.as_ref().and_then(|e| e.fields.get(5).copied()).filter(|h| !h.is_empty()).unwrap_or("/");
    let mut out = ResolvedUser { uid, gid: 0, groups: Vec::new(), home: home.to_owned() };
    if let Some(wanted) = wanted_group {
        let id = number(wanted)?;
        let found = entries(group).find(|e| e.name == wanted || id == Some(e.id));
        out.gid = found.map(|e| e.id).or(id).ok_or_else(|| {
            ContainerError::Invalid(format!("group \"{wanted}\" is not in the container's /etc/group"))
        })?;
        return Ok(out);
    }
    if let Some(entry) = found {
        out.gid = entry.fields.get(3).and_then(|g| g.parse().ok()).unwrap_or(0);
        let member = |e: &Entry<'_>| e.fields.get(3).is_some_and(|m| m.split(',').any(|n| n == entry.name));
        out.groups = entries(group).filter(member).map(|e| e.id).take(MOST_GROUPS).collect();
    }
    Ok(out)
}

/// Puts the user that a generated spec only names into the spec; false when there was nothing to do.
pub(crate) fn complete(spec: &mut Spec, root: BorrowedFd<'_>) -> Result<bool> {
    let Some(name) = spec.annotations_mut().as_mut().and_then(|a| a.remove(USER_ANNOTATION)) else {
        return Ok(false);
    };
    let found = resolve(root, &name)?;
    if let Some(process) = spec.process_mut() {
        found.apply(process);
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|e| e.starts_with("HOME=")) {
            set_env(&mut env, &format!("HOME={}", found.home));
        }
        process.set_env(Some(env));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nweb:x:33:34::/var/www:\n123:x:5:6::/odd:\n";
    const GROUP: &str = "root:x:0:root\nweb:x:34:\naudio:x:29:web,root\nvideo:x:44:web\n";

    fn get(user: &str) -> ResolvedUser {
        resolve_in(user, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn names_ids_and_groups() {
        let web = ResolvedUser { uid: 33, gid: 34, groups: vec![29, 44], home: "/var/www".into() };
        assert_eq!(get("web"), web);
        assert_eq!(get("33"), web);
        let root = ResolvedUser { uid: 0, gid: 0, groups: vec![0, 29], home: "/root".into() };
        assert_eq!(get(""), root);
        assert_eq!(get("root"), root);
        assert_eq!(get("web:audio"), ResolvedUser { gid: 29, groups: vec![], ..web.clone() });
        assert_eq!(get("web:7").gid, 7);
        assert_eq!(get("4000"), ResolvedUser { uid: 4000, gid: 0, groups: vec![], home: "/".into() });
        assert_eq!(get(":44").gid, 44);
        // A user whose name is a number comes before the id.
        assert_eq!(get("123").uid, 5);
    }

    #[test]
    fn nothing_wraps_or_slips_through() {
        for bad in [
            "4294967296",
            "2147483648",
            "-1",
            "0x0",
            "nobody",
            "web:nobody",
            "1 ",
            "+1",
            "99999999999999999999",
        ] {
            assert!(resolve_in(bad, PASSWD, GROUP).is_err(), "{bad}");
        }
    }

    #[test]
    fn empty_files_still_know_root() {
        let root = ResolvedUser { uid: 0, gid: 0, groups: vec![], home: "/".into() };
        assert_eq!(resolve_in("", "", "").unwrap(), root);
    }
}
