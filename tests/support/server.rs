//! A child process that is killed and reaped when the test ends, however it ends.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running server; its output goes to a log file.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts it.
    pub fn start(command: &mut Command, log: &Path) -> Server {
        let file = File::create(log).expect("create the server's log");
        let errors = file.try_clone().expect("share the server's log");
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program}: {error}; run tests/tools/deps.sh"));
        Server { child, log: log.to_owned() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit code once it has ended.
    pub fn ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().expect("wait for the server").map(|status| status.code())
    }

    /// Panics with its log when it has ended.
    pub fn assert_alive(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            panic!("the server ended with {status}:\n{log}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Politely first: containerd unmounts what it holds.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        for _ in 0..250 {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago, for servers that cannot tell which they took.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
