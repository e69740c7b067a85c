//! Where the dynamic loader finds libraries (ld.so(8)), without its cache, which names directories of the same kind.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

use lazyrun_fs::view::View;

use super::{File, tree};
use crate::container::spec::Command;
use crate::elf::Needs;

/// Directories of an image in which libraries are looked for.
pub(super) struct Libraries {
    dirs: Vec<Vec<u8>>,
}

/// Those that have a directory for each kind of machine in them.
const PARENTS: [&str; 3] = ["/lib", "/usr/lib", "/usr/local/lib"];
/// Those of 64-bit machines.
const OTHERS: [&str; 2] = ["/lib64", "/usr/lib64"];

/// Most directories of a kind that count.
const MAX_DIRS: usize = 64;

impl Libraries {
    /// Those of a view, for a process with this environment.
    pub(super) fn of(view: &View, command: &Command) -> Self {
        let named = command.env.iter().filter_map(|pair| pair.strip_prefix("LD_LIBRARY_PATH="));
        let named = named.flat_map(|value| value.split(':')).take(MAX_DIRS);
        let mut dirs: Vec<Vec<u8>> = named.map(|dir| dir.as_bytes().to_vec()).collect();
        for parent in PARENTS {
            let Some((ino, _)) = tree::find(view, parent.as_bytes()) else { continue };
            // Debian's multiarch directories: aarch64-linux-gnu, x86_64-linux-musl; i386-linux-gnu may be there, too.
            let own = |name: &[u8]| name.starts_with(format!("{}-linux-", std::env::consts::ARCH).as_bytes());
            let multiarch = view.children(ino).filter(|(name, _)| own(name)).take(MAX_DIRS);
            dirs.extend(multiarch.map(|(name, _)| join(parent.as_bytes(), name)));
        }
        dirs.extend(OTHERS.iter().chain(&PARENTS).map(|dir| dir.as_bytes().to_vec()));
        Self { dirs }
    }

    /// What the loader opens for a file at this path.
    pub(super) fn find(&self, view: &View, path: &[u8], needs: &Needs) -> Vec<File> {
        let origin = path.iter().rposition(|byte| *byte == b'/').map_or(&b"/"[..], |at| &path[..at]);
        let own: Vec<Vec<u8>> = needs.paths.iter().map(|dir| expand(dir.as_bytes(), origin)).collect();
        let interpreter =
            needs.interpreter.iter().filter_map(|path| tree::file(view, path.as_os_str().as_bytes()));
        let mut found: Vec<File> = interpreter.collect();
        let mut asked = HashSet::new();
        for name in needs.libraries.iter().map(|name| name.as_bytes()).filter(|name| asked.insert(*name)) {
            let library = match name.contains(&b'/') {
                true => tree::file(view, name),
                false => own.iter().chain(&self.dirs).find_map(|dir| tree::file(view, &join(dir, name))),
            };
            found.extend(library);
        }
        found
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir, b"/", name].concat()
}

/// Replaces `$ORIGIN` where it stands at the beginning, which is where it is of use.
fn expand(dir: &[u8], origin: &[u8]) -> Vec<u8> {
    let rest = dir.strip_prefix(b"$ORIGIN").or_else(|| dir.strip_prefix(b"${ORIGIN}"));
    rest.map_or_else(|| dir.to_vec(), |rest| [origin, rest].concat())
}
