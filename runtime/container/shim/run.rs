//! The shim's life: prepare, start, one poll loop, clean up.

use super::attach::{Client, OUTPUT_HIGH, Role};
use super::io::{Phase, STDIN_HIGH, Session, make_streams};
use super::log::Log;
use super::runtime::Foreign;
use super::{Status, prepare, start};
use crate::container::cgroup::{Cgroup, Hierarchies};
use crate::container::config::ShimConfig;
use crate::container::error::{Attempt, Result};
use crate::container::init::{CgroupView, Message, Plan, Report, check_supported};
use crate::container::proto::Frame;
use crate::container::sys;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

/// Key of the container's own session; exec sessions count from 1.
pub(super) const CONTAINER: u32 = 0;

/// Everything the loop works on.
pub(super) struct Shim<'a> {
    pub(super) config: &'a ShimConfig,
    pub(super) spec: Spec,
    pub(super) exe: OwnedFd,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) foreign: Option<Foreign>,
    pub(super) sessions: BTreeMap<u32, Session>,
    pub(super) clients: Vec<Client>,
    pub(super) log: Log,
    pub(super) next_session: u32,
    pub(super) listener: UnixListener,
    pub(super) signals: SignalFd,
    /// Exit codes of sessions' processes that were reaped and not yet dealt with.
    pub(super) exits: BTreeMap<i32, i32>,
}

/// Runs one container from preparation to clean-up.
pub(super) fn run(config: &ShimConfig, status: &mut Status) -> Result<()> {
    sys::cloexec_from(3).attempt(|| "protect inherited descriptors")?;
    let signals = prepare::surroundings()?;
    prepare::attach_root(config)?;
    let spec = prepare::load_spec(config)?;
    if config.runtime.is_none() {
        check_supported(&spec)?;
    }
    let listener = prepare::listen(&config.socket)?;
    let log = Log::open(config.log.as_deref())?;
    let exe = start::protected_exe()?;
    let cgroup = match &config.cgroup {
        Some(path) => Some(Cgroup::new(Hierarchies::detect()?, path)?),
        None => None,
    };
    let mut shim = Shim {
        config,
        spec,
        exe,
        cgroup,
        foreign: None,
        sessions: BTreeMap::new(),
        clients: Vec::new(),
        log,
        next_session: 1,
        listener,
        signals,
        exits: BTreeMap::new(),
    };
    let lived = shim.start().and_then(|()| shim.serve(status));
    shim.clean_up();
    lived
        .inspect_err(|error| shim.say_goodbye(&Frame::Error(i32::from(error.exit_code()), error.to_string())))
}

impl Shim<'_> {
    /// Brings the container to the point where init is at work.
    fn start(&mut self) -> Result<()> {
        let (streams, theirs) = make_streams(self.config.terminal, self.config.open_stdin)?;
        let netns =
            self.config.netns_fd.map(sys::adopt).transpose().attempt(|| "take the network namespace")?;
        if let Some(runtime) = self.config.runtime.clone() {
            let (foreign, child, console) =
                Foreign::create(&runtime, self.config, &self.spec, netns.as_ref(), &theirs)?;
            self.foreign = Some(foreign);
            let mut session = Session::new(child, streams, self.config.terminal, !self.config.wait_attach);
            session.control = None;
            session.phase = Phase::Ready;
            if let Some(console) = console {
                session.use_console(console)?;
            }
            self.sessions.insert(CONTAINER, session);
            return Ok(());
        }
        let plan = self.plan(self.spec.clone(), false, 0, !self.config.wait_attach, netns.is_none());
        let pidns = self.namespace_path(LinuxNamespaceType::Pid)?;
        let unified = match &self.cgroup {
            // On v2 the group exists before the child, which is then born in it.
            Some(group) if group.unified_fd_possible() => {
                group.create(self.resources())?;
                group.unified_fd()
            }
            _ => None,
        };
        let mut flags = start::clone_flags(&self.spec);
        if netns.is_some() {
            flags &= !(libc::CLONE_NEWNET as u64);
        }
        let birth = start::Birth {
            flags,
            netns: netns.as_ref().map(AsFd::as_fd),
            pidns: pidns.as_ref().map(AsFd::as_fd),
            cgroup: unified.as_ref().map(AsFd::as_fd),
            container: None,
            stdio: theirs.borrow(),
        };
        let child = start::spawn(self.exe.as_fd(), &plan, &birth)?;
        let session = Session::new(child, streams, self.config.terminal, !self.config.wait_attach);
        let group = self.cgroup.as_ref().filter(|_| unified.is_none());
        // Init builds the container meanwhile, until it needs its groups.
        let placed = group.map_or(Ok(()), |g| g.create(self.resources()).and_then(|()| g.add(session.pid)));
        let told = placed.and_then(|()| session.tell(Message::CgroupReady));
        self.sessions.insert(CONTAINER, session);
        // An init that failed meanwhile knows better why.
        told.or_else(|e| self.last_words(CONTAINER).map_or(Err(e), |()| Ok(())))
    }

    /// Whether an init has something to say, which the loop will hear.
    fn last_words(&self, key: u32) -> Option<()> {
        let control = self.sessions.get(&key)?.control.as_ref()?;
        let mut fd = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        (poll(&mut fd, PollTimeout::ZERO).ok()? > 0).then_some(())
    }

    fn resources(&self) -> Option<&oci_spec::runtime::LinuxResources> {
        self.spec.linux().as_ref().and_then(|l| l.resources().as_ref())
    }

    fn namespace_path(&self, kind: LinuxNamespaceType) -> Result<Option<OwnedFd>> {
        let namespaces = self.spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        let path = namespaces.into_iter().flatten().find(|n| n.typ() == kind).and_then(|n| n.path().clone());
        let open = |p: std::path::PathBuf| {
            std::fs::File::open(&p).map(OwnedFd::from).attempt(|| format!("open namespace {}", p.display()))
        };
        path.map(open).transpose()
    }

    pub(super) fn plan(&self, spec: Spec, exec: bool, join: i32, auto_start: bool, own_net: bool) -> Plan {
        let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        let new_net = |n: &oci_spec::runtime::LinuxNamespace| {
            n.typ() == LinuxNamespaceType::Network && n.path().is_none()
        };
        let fresh_network = own_net && namespaces.into_iter().flatten().any(new_net);
        let cgroup = self.cgroup.as_ref().map_or_else(CgroupView::default, Cgroup::view);
        Plan { exec, bundle: self.config.dir.clone(), spec, join, auto_start, fresh_network, cgroup }
    }

    /// The loop: returns once the container has ended and its output has been read.
    fn serve(&mut self, status: &mut Status) -> Result<()> {
        loop {
            self.advance(status)?;
            if let Some(Phase::Ended(code)) = self.container().map(|s| s.phase) {
                return self.ended(code, status);
            }
            self.wait()?;
            self.reap();
        }
    }

    pub(super) fn container(&self) -> Option<&Session> {
        self.sessions.get(&CONTAINER)
    }

    /// Waits for anything to do, then does what the ready descriptors call for.
    fn wait(&mut self) -> Result<()> {
        let mut fds: Vec<(BorrowedFd<'_>, PollFlags, Source)> = vec![
            (self.signals.as_fd(), PollFlags::POLLIN, Source::Signal),
            (self.listener.as_fd(), PollFlags::POLLIN, Source::Listener),
        ];
        for (key, s) in &self.sessions {
            if let Some(control) = &s.control {
                fds.push((control.as_fd(), PollFlags::POLLIN, Source::Control(*key)));
            }
            if !self.held_up(*key) {
                for (error, stream) in [(false, &s.streams.stdout), (true, &s.streams.stderr)] {
                    if let Some(fd) = stream {
                        fds.push((fd.as_fd(), PollFlags::POLLIN, Source::Output(*key, error)));
                    }
                }
            }
            if let Some(stdin) = s.streams.stdin.as_ref().filter(|_| !s.streams.input.is_empty()) {
                fds.push((stdin.as_fd(), PollFlags::POLLOUT, Source::Input(*key)));
            }
        }
        let mut impatient = false;
        for (index, c) in self.clients.iter().enumerate() {
            let mut events = PollFlags::empty();
            if self.accepts_input(c) {
                events |= PollFlags::POLLIN;
            }
            if c.owed() > 0 {
                events |= PollFlags::POLLOUT;
                impatient |= c.is_stalled();
            }
            fds.push((c.stream.as_fd(), events, Source::Client(index)));
        }
        let timeout = if impatient { PollTimeout::from(1000u16) } else { PollTimeout::NONE };
        let mut polled: Vec<PollFd<'_>> =
            fds.iter().map(|(fd, events, _)| PollFd::new(*fd, *events)).collect();
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).attempt(|| "wait for events"),
        }
        let fired = |p: &PollFd<'_>| p.revents().is_some_and(|r| !r.is_empty());
        let ready: Vec<(Source, PollFlags)> = polled
            .iter()
            .zip(&fds)
            .filter(|(p, _)| fired(p))
            .map(|(p, (_, _, source))| (*source, p.revents().unwrap_or(PollFlags::empty())))
            .collect();
        drop(polled);
        drop(fds);
        for (source, events) in ready {
            self.handle(source, events)?;
        }
        Ok(())
    }

    fn handle(&mut self, source: Source, events: PollFlags) -> Result<()> {
        match source {
            Source::Signal => self.take_signals(),
            Source::Listener => self.accept(),
            Source::Control(key) => self.hear_init(key)?,
            Source::Output(key, error) => {
                self.pump(key, error);
            }
            Source::Input(key) => {
                if let Some(s) = self.sessions.get_mut(&key) {
                    s.streams.write_input();
                }
            }
            Source::Client(index) => self.serve_client(index, events),
        }
        Ok(())
    }

    /// SIGCHLD only wakes the loop; the others ask for the container's end.
    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo as i32 != libc::SIGCHLD {
                self.kill_container(libc::SIGKILL);
            }
        }
    }

    pub(super) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            // A client that cannot be made non-blocking is simply closed.
            if let Ok(client) = Client::new(stream) {
                self.clients.push(client);
            }
        }
    }

    /// Takes one report of an init.
    fn hear_init(&mut self, key: u32) -> Result<()> {
        let Some(session) = self.sessions.get_mut(&key) else { return Ok(()) };
        let Some(control) = &session.control else { return Ok(()) };
        match Report::receive(control.as_fd()) {
            Ok(Report::Console(master)) => session.use_console(master)?,
            Ok(Report::Ready) => session.phase = Phase::Ready,
            Ok(Report::Error(code, message)) => {
                session.failure = Some((code, message));
                session.control = None;
            }
            Ok(Report::Closed) | Err(_) => {
                session.control = None;
                session.phase = Phase::Running;
            }
        }
        Ok(())
    }

    /// Moves one read of output to the log and the clients; true when there may be more.
    fn pump(&mut self, key: u32, error: bool) -> bool {
        let mut buffer = [0u8; 64 * 1024];
        let Some(session) = self.sessions.get_mut(&key) else { return false };
        let Some(bytes) = session.streams.read_output(error, &mut buffer) else { return false };
        if bytes.is_empty() {
            return false;
        }
        if key == CONTAINER {
            self.log.append(error, bytes);
        }
        for client in self.clients.iter_mut().filter(|c| c.replay.is_none()) {
            let follows = match client.role {
                Role::Attached { .. } => key == CONTAINER,
                Role::Exec(own) => own == key,
                Role::Greeting | Role::Done => false,
            };
            if follows {
                client.send_output(error, bytes);
            }
        }
        true
    }

    /// Whether a process must wait because a client that follows it is behind.
    fn held_up(&self, key: u32) -> bool {
        self.clients.iter().filter(|c| c.owed() > OUTPUT_HIGH).any(|c| match c.role {
            Role::Attached { .. } => key == CONTAINER,
            Role::Exec(own) => own == key,
            Role::Greeting | Role::Done => false,
        })
    }

    /// A client's input is read unless it feeds a process that does not take it.
    fn accepts_input(&self, client: &Client) -> bool {
        let key = match client.role {
            Role::Attached { stdin: true, .. } => CONTAINER,
            Role::Exec(key) => key,
            _ => return true,
        };
        self.sessions.get(&key).is_none_or(|s| s.streams.input.len() < STDIN_HIGH)
    }

    /// Everything that follows from what is known now: starts, ends, flushes, drops.
    fn advance(&mut self, status: &mut Status) -> Result<()> {
        let keys: Vec<u32> = self.sessions.keys().copied().collect();
        for key in keys {
            self.advance_session(key, status)?;
        }
        let log_end = self.log_tail();
        for client in &mut self.clients {
            if client.replay.is_some() && client.feed_replay() {
                for (error, bytes) in [(false, &log_end.0), (true, &log_end.1)] {
                    if !bytes.is_empty() {
                        client.send_output(error, bytes);
                    }
                }
            }
            client.flush();
        }
        self.drop_clients();
        Ok(())
    }

    /// Lines not finished yet, which a client that reads the log would miss.
    fn log_tail(&self) -> (Vec<u8>, Vec<u8>) {
        if self.clients.iter().all(|c| c.replay.is_none()) {
            return Default::default();
        }
        (self.log.held_back(false).to_vec(), self.log.held_back(true).to_vec())
    }

    fn advance_session(&mut self, key: u32, status: &mut Status) -> Result<()> {
        let foreground = self.clients.iter().any(|c| matches!(c.role, Role::Attached { .. }));
        let Some(session) = self.sessions.get_mut(&key) else { return Ok(()) };
        if session.phase == Phase::Ready {
            if key == CONTAINER && !session.auto_start {
                status.started(session.pid);
            }
            if session.auto_start || foreground {
                session.phase = Phase::Preparing;
                match &session.control {
                    // With auto_start init does not wait. One that just died is noticed by its exit.
                    Some(_) if !session.auto_start => drop(session.tell(Message::Start)),
                    Some(_) => {}
                    None => {
                        if let Some(foreign) = &self.foreign {
                            foreign.start()?;
                        }
                        session.phase = Phase::Running;
                    }
                }
                session.auto_start = true;
            }
        }
        self.note_progress(key, status);
        Ok(())
    }

    /// Tells those concerned that a session runs, failed or ended.
    fn note_progress(&mut self, key: u32, status: &mut Status) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let exit = self.exits.get(&session.pid).copied();
        if exit.is_some() && session.control.is_some() {
            // The last word of an init that is gone may still be in the socket.
            let _ = self.hear_init(key);
            return self.note_progress(key, status);
        }
        if session.phase == Phase::Running && exit.is_none() && key == CONTAINER {
            status.started(session.pid);
        }
        let Some(code) = exit else { return };
        self.exits.remove(&session.pid);
        while self.pump(key, false) {}
        while self.pump(key, true) {}
        let Some(session) = self.sessions.get_mut(&key) else { return };
        session.phase = Phase::Ended(code);
        if key != CONTAINER {
            let last = match session.failure.take() {
                Some((code, message)) => Frame::Error(i32::from(code), message),
                None => Frame::Exit(code),
            };
            self.sessions.remove(&key);
            for client in self.clients.iter_mut().filter(|c| c.role == Role::Exec(key)) {
                client.finish(&last);
            }
        }
    }

    fn drop_clients(&mut self) {
        let mut leaving = Vec::new();
        self.clients.retain(|c| {
            let done = c.role == Role::Done && c.owed() == 0;
            let drop = c.gone || done || c.out_of_patience();
            if drop {
                match c.role {
                    Role::Attached { stdin: true, foreground: true } => leaving.push(CONTAINER),
                    Role::Exec(key) => leaving.push(key),
                    _ => {}
                }
            }
            !drop
        });
        for key in leaving {
            if let Some(s) = self.sessions.get_mut(&key) {
                s.streams.end_input(s.terminal);
                s.streams.write_input();
            }
        }
    }
}

/// What a descriptor in the poll set stands for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Signal,
    Listener,
    Control(u32),
    Output(u32, bool),
    Input(u32),
    Client(usize),
}
