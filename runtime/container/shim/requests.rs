//! What clients ask for.

use super::attach::{Client, Role};
use super::io::Phase;
use super::run::{CONTAINER, Shim};
use crate::container::proto::{Frame, MAX_REQUEST, Request, State};
use nix::poll::PollFlags;
use std::fs::File;
use std::io::BufReader;

impl Shim<'_> {
    /// Reads from and writes to a client that poll reported.
    pub(super) fn serve_client(&mut self, index: usize, events: PollFlags) {
        let Some(client) = self.clients.get_mut(index) else { return };
        if events.contains(PollFlags::POLLOUT) {
            client.flush();
        }
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            client.fill();
            if client.role == Role::Greeting {
                self.greet(index);
            }
            self.take_frames(index);
        }
    }

    /// Handles the request line once it is complete.
    fn greet(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let Some(end) = client.input.iter().position(|b| *b == b'\n') else {
            client.gone |= client.input.len() > MAX_REQUEST;
            return;
        };
        let line: Vec<u8> = client.input.drain(..=end).collect();
        match serde_json::from_slice(&line) {
            Ok(request) => self.answer(index, request),
            Err(e) => client.finish(&Frame::Error(125, format!("the request cannot be understood: {e}"))),
        }
    }

    fn answer(&mut self, index: usize, request: Request) {
        let reply = match request {
            Request::Attach { stdin, logs } => return self.attach(index, stdin, logs),
            Request::Exec { process } => match self.exec(&process) {
                Ok(key) => {
                    if let Some(client) = self.clients.get_mut(index) {
                        client.role = Role::Exec(key);
                    }
                    return;
                }
                Err(e) => Frame::Error(i32::from(e.exit_code()), e.to_string()),
            },
            Request::Kill { signal } => {
                if self.kill_container(signal) {
                    Frame::Exit(0)
                } else {
                    Frame::Error(125, "the container is not running".to_owned())
                }
            }
            Request::Resize { rows, cols } => {
                if let Some(s) = self.container() {
                    s.resize(rows, cols);
                }
                Frame::Exit(0)
            }
            Request::State => return self.tell_state(index),
        };
        if let Some(client) = self.clients.get_mut(index) {
            client.finish(&reply);
        }
    }

    fn attach(&mut self, index: usize, stdin: bool, logs: bool) {
        let Some(container) = self.sessions.get(&CONTAINER) else { return };
        let started = container.auto_start;
        let pid = u32::try_from(container.pid).unwrap_or(0);
        let foreground = self.config.wait_attach && !started;
        let log = self.config.log.as_ref().filter(|_| logs).and_then(|p| File::open(p).ok());
        let stdin = stdin && (self.config.open_stdin || self.config.terminal);
        if let Some(client) = self.clients.get_mut(index) {
            client.send(&Frame::Started(pid));
            client.replay = log.map(BufReader::new);
            client.role = Role::Attached { stdin, foreground };
        }
    }

    fn tell_state(&mut self, index: usize) {
        let state = match self.container() {
            Some(s) => {
                let status = match s.phase {
                    Phase::Preparing | Phase::Ready => "created",
                    Phase::Running => "running",
                    Phase::Ended(_) => "stopped",
                };
                State { status: status.to_owned(), pid: s.pid }
            }
            None => State { status: "created".to_owned(), pid: 0 },
        };
        let mut line = serde_json::to_vec(&state).unwrap_or_default();
        line.push(b'\n');
        if let Some(client) = self.clients.get_mut(index) {
            client.send_raw(&line);
            client.role = Role::Done;
        }
    }

    /// Sends a signal to the container; false when there is nothing to send it to.
    pub(super) fn kill_container(&self, signal: i32) -> bool {
        let Some(session) = self.container() else { return false };
        if matches!(session.phase, Phase::Ended(_)) {
            return false;
        }
        let sent = session.signal(signal).is_ok();
        let group = self.cgroup.as_ref().filter(|_| signal == libc::SIGKILL && !self.has_pidns());
        if let Some(group) = group {
            // Without a PID namespace the others do not die with the first process.
            group.kill_all();
        }
        sent
    }

    fn has_pidns(&self) -> bool {
        let namespaces = self.spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        namespaces.into_iter().flatten().any(|n| n.typ() == oci_spec::runtime::LinuxNamespaceType::Pid)
    }

    /// Handles all complete frames a client has sent.
    fn take_frames(&mut self, index: usize) {
        loop {
            let Some(client) = self.clients.get_mut(index) else { return };
            let key = match client.role {
                Role::Attached { .. } => CONTAINER,
                Role::Exec(key) => key,
                Role::Greeting => return,
                Role::Done => {
                    client.input.clear();
                    return;
                }
            };
            match Frame::decode(&client.input) {
                Ok(None) => return,
                Ok(Some((frame, used))) => {
                    client.input.drain(..used);
                    self.take_frame(index, key, frame);
                }
                Err(e) => {
                    client.finish(&Frame::Error(125, e.to_string()));
                    return;
                }
            }
        }
    }

    fn take_frame(&mut self, index: usize, key: u32, frame: Frame) {
        let feeds = self.clients.get(index).is_some_and(Client::feeds_stdin);
        let Some(session) = self.sessions.get_mut(&key) else { return };
        match frame {
            Frame::Stdin(bytes) if feeds => {
                session.streams.queue_input(&bytes);
                session.streams.write_input();
            }
            Frame::StdinEof if feeds => {
                session.streams.end_input(session.terminal);
                session.streams.write_input();
            }
            Frame::Resize(rows, cols) => session.resize(rows, cols),
            Frame::Signal(signal) => {
                let signal = i32::try_from(signal).unwrap_or(0);
                if key == CONTAINER {
                    self.kill_container(signal);
                } else {
                    // The process may have ended a moment ago; its exit frame is on the way.
                    let _ = session.signal(signal);
                }
            }
            _ => {}
        }
    }
}

impl Client {
    fn feeds_stdin(&self) -> bool {
        matches!(self.role, Role::Attached { stdin: true, .. } | Role::Exec(_))
    }
}
