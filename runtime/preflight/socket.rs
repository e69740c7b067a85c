//! The socket between containerd and the snapshotter, and systemd's unit for it.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Code;
use tonic::transport::Endpoint;

use super::Rows;
use crate::snapshotter::DEFAULT_ADDRESS;
use crate::snapshotter::proto::services::snapshots::v1::StatSnapshotRequest;
use crate::snapshotter::proto::services::snapshots::v1::snapshots_client::SnapshotsClient;

/// Where systemd looks for units, the first that counts first.
pub(super) const UNIT_DIRS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
const UNIT: &str = "lazyrun-snapshotter.socket";
/// How long the snapshotter may take; systemd may have to start it first.
const ANSWER: Duration = Duration::from_secs(30);
const WHAT: &str = "socket";

/// A socket unit of systemd.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unit {
    file: PathBuf,
    listens: Option<PathBuf>,
}

/// The socket unit of this machine, with its drop-ins.
pub(super) fn unit(dirs: &[PathBuf]) -> Option<Unit> {
    let file = dirs.iter().map(|dir| dir.join(UNIT)).find(|file| file.exists())?;
    // Drop-ins count by name, whatever directory they are in; of one name the first.
    let mut drop_ins: Vec<PathBuf> = Vec::new();
    for dir in dirs {
        let found = std::fs::read_dir(dir.join(format!("{UNIT}.d"))).into_iter().flatten().flatten();
        for path in found.map(|entry| entry.path()).filter(|p| p.extension().is_some_and(|e| e == "conf")) {
            if !drop_ins.iter().any(|known| known.file_name() == path.file_name()) {
                drop_ins.push(path);
            }
        }
    }
    drop_ins.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    let mut listens = None;
    for path in std::iter::once(&file).chain(&drop_ins) {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        for address in text.lines().filter_map(|line| line.trim().strip_prefix("ListenStream=")) {
            // An empty one takes back what was said before; the first socket is the snapshotter's.
            match address.trim() {
                "" => listens = None,
                address => listens = listens.or_else(|| Some(PathBuf::from(address))),
            }
        }
    }
    Some(Unit { file, listens })
}

/// Where the snapshotter is to listen.
pub(super) fn expected(given: Option<&Path>, unit: Option<&Unit>) -> PathBuf {
    let given = given.map(Path::to_owned).or_else(|| unit.and_then(|unit| unit.listens.clone()));
    given.unwrap_or_else(|| DEFAULT_ADDRESS.into())
}

/// Whether somebody serves snapshots at the address.
pub(super) async fn check(address: &Path, unit: Option<&Unit>, rows: &mut Rows) {
    let shown = address.display();
    if let Some(unit) = unit {
        match &unit.listens {
            Some(listens) if listens == address => {
                rows.ok(WHAT, format!("{} listens at {shown}", unit.file.display()));
            }
            listens => {
                let listens = listens.as_ref().map_or("nowhere".into(), |l| l.display().to_string());
                rows.warning(
                    WHAT,
                    format!("{} listens at {listens}, not at {shown}", unit.file.display()),
                    "give the address to one of them: --address is not used when systemd passes a socket",
                );
            }
        }
    }
    let start = match unit {
        Some(_) => format!("systemctl enable --now {UNIT}"),
        None => format!("start `lazyrun snapshotter --address {shown}` before containerd, as a service"),
    };
    let is_socket = || std::fs::metadata(address).is_ok_and(|meta| meta.file_type().is_socket());
    let gone = match UnixStream::connect(address) {
        Ok(_) => None,
        Err(error) => Some(match error.kind() {
            io::ErrorKind::PermissionDenied => {
                rows.warning(WHAT, format!("{shown} may be asked by root only"), "run this as root");
                return;
            }
            io::ErrorKind::NotFound => "does not exist".to_owned(),
            // So says connect(2) of any other file, too.
            io::ErrorKind::ConnectionRefused if !is_socket() => "is not a socket".to_owned(),
            io::ErrorKind::ConnectionRefused => "is left over: nobody listens there".to_owned(),
            _ => format!("can't be connected to: {error}"),
        }),
    };
    if let Some(gone) = gone {
        rows.error(WHAT, format!("{shown} {gone}"), start);
        return;
    }
    match ask(address).await {
        Ok(()) => rows.ok(WHAT, format!("a snapshotter answers at {shown}")),
        Err(why) => rows.error(WHAT, format!("no snapshotter answers at {shown}: {why}"), start),
    }
}

/// Asks for a snapshot that there can't be.
async fn ask(address: &Path) -> Result<(), String> {
    let path = address.to_str().filter(|path| path.starts_with('/')).ok_or("it is no absolute path")?;
    let endpoint = Endpoint::from_shared(format!("unix://{path}")).map_err(|e| e.to_string())?;
    let asked = async {
        let channel = endpoint.connect().await.map_err(|e| e.to_string())?;
        let mut client = SnapshotsClient::new(channel);
        let request = StatSnapshotRequest { snapshotter: String::new(), key: "lazyrun-config-check".into() };
        let mut request = tonic::Request::new(request);
        request
            .metadata_mut()
            .insert(crate::containerd::NAMESPACE, tonic::metadata::MetadataValue::from_static("default"));
        match client.stat(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) if status.code() == Code::Unimplemented => {
                Err("somebody else serves there".to_owned())
            }
            Err(status) => Err(status.message().to_owned()),
        }
    };
    let late = |_| Err(format!("no answer within {} s", ANSWER.as_secs()));
    tokio::time::timeout(ANSWER, asked).await.unwrap_or_else(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_read_with_its_drop_ins() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, lib) = (dir.path().join("etc"), dir.path().join("lib"));
        let dirs = [etc.clone(), lib.clone()];
        assert_eq!(unit(&dirs), None);
        assert_eq!(expected(None, None), Path::new(DEFAULT_ADDRESS));
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join(UNIT), "[Socket]\nListenStream=/run/a\nSocketMode=0600\n").unwrap();
        let found = unit(&dirs).unwrap();
        assert_eq!(expected(None, Some(&found)), Path::new("/run/a"));
        assert_eq!(expected(Some(Path::new("/given")), Some(&found)), Path::new("/given"));
        std::fs::create_dir_all(etc.join(format!("{UNIT}.d"))).unwrap();
        let drop_in = etc.join(format!("{UNIT}.d/address.conf"));
        std::fs::write(drop_in, "[Socket]\nListenStream=\nListenStream=/run/b\n").unwrap();
        let moved = Unit { file: lib.join(UNIT), listens: Some("/run/b".into()) };
        assert_eq!(unit(&dirs), Some(moved));
    }
}
