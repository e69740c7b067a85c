//! One more process in a running container.

use super::io::{Phase, Session, make_streams};
use super::run::{CONTAINER, Shim};
use super::{prepare, start};
use crate::container::error::{Attempt, ContainerError, Result};
use crate::container::init::Message;
use crate::container::proto::ExecProcess;
use crate::container::spec::{defaults, user};
use nix::sched::CloneFlags;
use oci_spec::runtime::{Process, Spec};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

impl Shim<'_> {
    /// Starts `wanted` and returns its session's key.
    pub(super) fn exec(&mut self, wanted: &ExecProcess) -> Result<u32> {
        let container = self.container().filter(|s| s.phase == Phase::Running);
        let container = container.ok_or_else(|| ContainerError::invalid("the container is not running"))?;
        let spec = self.exec_spec(wanted)?;
        let (streams, theirs) = make_streams(wanted.terminal, wanted.stdin)?;
        let session = match &self.foreign {
            Some(foreign) => {
                let (child, console) = foreign.exec(&spec, &theirs)?;
                let mut session = Session::new(child, streams, wanted.terminal, true);
                session.control = None;
                session.phase = Phase::Running;
                if let Some(console) = console {
                    session.use_console(console)?;
                }
                session
            }
            None => {
                let join = self.join_flags();
                let plan = self.plan(spec, true, join.bits(), true, false);
                let pidns = if join.contains(CloneFlags::CLONE_NEWPID) {
                    let path = format!("/proc/{}/ns/pid", container.pid);
                    Some(OwnedFd::from(File::open(&path).attempt(|| format!("open {path}"))?))
                } else {
                    None
                };
                let unified = self.cgroup.as_ref().and_then(crate::container::cgroup::Cgroup::unified_fd);
                let birth = start::Birth {
                    flags: 0,
                    netns: None,
                    pidns: pidns.as_ref().map(AsFd::as_fd),
                    cgroup: unified.as_ref().map(AsFd::as_fd),
                    container: Some(container.pidfd.as_fd()),
                    stdio: theirs.borrow(),
                };
                let child = start::spawn(self.exe.as_fd(), &plan, &birth)?;
                let session = Session::new(child, streams, wanted.terminal, true);
                let group = self.cgroup.as_ref().filter(|_| unified.is_none());
                if let Err(e) = group.map_or(Ok(()), |g| g.add(session.pid)) {
                    // Outside its groups the process must not run; it is reaped with the others.
                    let _ = session.signal(libc::SIGKILL);
                    return Err(e);
                }
                // An init that died is noticed by its exit.
                let _ = session.tell(Message::CgroupReady);
                session
            }
        };
        let key = self.next_session;
        self.next_session = self.next_session.wrapping_add(1).max(CONTAINER + 1);
        self.sessions.insert(key, session);
        Ok(key)
    }

    /// All namespaces of the container but the PID namespace, which a process is born into.
    fn join_flags(&self) -> CloneFlags {
        let namespaces = self.spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        let all = namespaces.into_iter().flatten().map(|n| start::clone_flag(n.typ()));
        all.fold(CloneFlags::empty(), |a, b| a | b)
    }

    /// The container's spec with the wanted process in place of its own.
    fn exec_spec(&self, wanted: &ExecProcess) -> Result<Spec> {
        let mut spec = self.spec.clone();
        let own = spec.process().clone().ok_or_else(|| ContainerError::invalid("the spec has no process"))?;
        if wanted.args.is_empty() {
            return Err(ContainerError::invalid("no command to execute was given"));
        }
        let mut process: Process = own;
        process.set_args(Some(wanted.args.clone()));
        process.set_terminal(Some(wanted.terminal));
        process.set_console_size(None);
        if let Some((rows, cols)) = wanted.size {
            let size = serde_json::json!({"height": rows, "width": cols});
            process.set_console_size(serde_json::from_value(size).ok());
        }
        if let Some(cwd) = &wanted.cwd {
            if !cwd.starts_with('/') {
                return Err(ContainerError::Invalid(format!("the working directory {cwd} is not absolute")));
            }
            process.set_cwd(cwd.into());
        }
        let mut env = process.env().clone().unwrap_or_default();
        if wanted.terminal && !env.iter().any(|e| e.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        for pair in &wanted.env {
            defaults::set_env(&mut env, pair);
        }
        if let Some(name) = &wanted.user {
            let root = prepare::open_root(&spec, &self.config.dir)?;
            let found = user::resolve(root.as_fd(), name)?;
            if !wanted.env.iter().any(|e| e.starts_with("HOME=")) {
                defaults::set_env(&mut env, &format!("HOME={}", found.home));
            }
            found.apply(&mut process);
        }
        process.set_env(Some(env));
        if wanted.privileged {
            process.set_capabilities(Some(defaults::all_capabilities()));
            if let Some(linux) = spec.linux_mut() {
                linux.set_seccomp(None);
            }
        }
        spec.set_process(Some(process));
        Ok(spec)
    }
}
