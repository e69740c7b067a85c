//! The part of systemd that the snapshotter needs: it starts a service, hears what that says, stores descriptors for it
//! and gives them to the next one (sd_notify(3), sd_listen_fds(3)).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lazyrun::ipc::fds;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::server::Server;
use super::wait_for;

/// A service manager with one service.
pub struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    /// What the service had stored, by name.
    pub stored: BTreeMap<String, OwnedFd>,
    ready: bool,
}

impl Manager {
    /// Listens in this directory.
    pub fn new(dir: &Path) -> Manager {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).expect("bind the manager's socket");
        socket.set_nonblocking(true).expect("a socket that does not block");
        Manager { socket, path, stored: BTreeMap::new(), ready: false }
    }

    /// Starts the service with what is stored for it, and waits until it is ready.
    pub fn start(&mut self, program: &str, args: &[impl AsRef<OsStr>], log: &Path) -> Server {
        let names: Vec<&str> = self.stored.keys().map(String::as_str).collect();
        let mut command = Command::new("sh");
        // Only the process itself knows its number.
        command.args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\"", program]).args(args);
        command.env("NOTIFY_SOCKET", &self.path);
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        let numbered = self.stored.values().zip(3..);
        let placed: Vec<(BorrowedFd<'_>, RawFd)> =
            numbered.map(|(fd, number)| (fd.as_fd(), number)).collect();
        fds::place(&mut command, &placed).expect("pass the descriptors");
        self.ready = false;
        let mut server = Server::start(&mut command, log);
        drop(command);
        wait_for("the service to be ready", Duration::from_secs(60), || {
            server.assert_alive();
            self.hear();
            self.ready.then_some(())
        });
        server
    }

    /// Hears all that the service has said.
    pub fn hear(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 8]);
            let (said, mut fds) = {
                let mut payload = [IoSliceMut::new(&mut bytes)];
                let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut payload, Some(&mut space), flags);
                let Ok(message) = message else { return };
                let mut fds = Vec::new();
                for control in message.cmsgs().expect("control messages") {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel made these descriptors just now; nobody else owns them.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                (message.bytes, fds)
            };
            let text = String::from_utf8_lossy(&bytes[..said]).into_owned();
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
            if value("READY=") == Some("1".into()) {
                self.ready = true;
            }
            let Some(name) = value("FDNAME=") else { continue };
            assert!(!name.contains(':') && name.len() < 256, "no name for a descriptor: {name}");
            if value("FDSTOREREMOVE=").is_some() {
                self.stored.remove(&name);
            } else if value("FDSTORE=").is_some() {
                let fd = fds.pop().expect("a descriptor");
                // systemd polls what it stores unless told not to, and what can't be polled it does not store.
                let flags = fcntl(&fd, FcntlArg::F_GETFL).expect("a descriptor's flags");
                if flags & libc::O_PATH == 0 || value("FDPOLL=") == Some("0".into()) {
                    self.stored.insert(name, fd);
                }
            }
        }
    }
}
