//! Reading requests and answering them.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;

use super::Answer;
use super::busy_poll::BusyPoll;
use super::request::{Malformed, Operation, Request, forgotten};
use crate::fuse::MAX_READ;

/// Who answers.
pub(in crate::fuse) trait Serve: Sync {
    /// Answers a request: with what it puts into `answer`, or an errno.
    fn answer(&self, request: &Request<'_>, answer: &mut Answer) -> Result<(), Errno>;

    /// The kernel gives back references to nodes.
    fn forget(&self, nodes: &mut dyn Iterator<Item = (u64, u64)>);
}

/// What a request may have beside the bytes of a WRITE.
const HEADERS: usize = 4096;

/// Answers the requests of a connection that had its INIT, `threads` of them at a time. Returns when its mount is gone.
/// `polls`: threads may use idle processors to look for requests ([`BusyPoll`]).
///
/// # Errors
/// What else keeps requests from being read.
pub(in crate::fuse) fn serve(
    server: &impl Serve,
    dev: &OwnedFd,
    threads: usize,
    polls: bool,
) -> io::Result<()> {
    let busy_poll = polls.then(BusyPoll::default);
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for i in 0..threads.max(1) {
            let thread = std::thread::Builder::new().name(format!("union-{i}"));
            running.push(thread.spawn_scoped(scope, || read_and_answer(server, dev, busy_poll.as_ref()))?);
        }
        let mut ended = Ok(());
        for thread in running {
            ended = ended.and(thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))));
        }
        ended
    })
}

fn read_and_answer(server: &impl Serve, dev: &OwnedFd, busy_poll: Option<&BusyPoll>) -> io::Result<()> {
    let mut bytes = vec![0; MAX_READ as usize + HEADERS];
    let mut answer = Answer::default();
    let mut looker = busy_poll.and_then(BusyPoll::looker);
    loop {
        if let Some(looker) = &mut looker {
            looker.look(dev);
        }
        let n = match nix::unistd::read(dev, &mut bytes) {
            Ok(n) => n,
            // Whoever asked was interrupted before it was read, or this thread was.
            Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => continue,
            // The mount is gone, or goes while the request is handed over.
            Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        match Request::parse(&bytes[..n]) {
            Ok(request) => {
                if let Some(looker) = &looker {
                    looker.asked(request.header.pid);
                }
                if !answer_one(server, dev, &request, &mut answer)? {
                    return Ok(());
                }
            }
            Err(Malformed::Header) => return Err(io::Error::other("the kernel sent no FUSE request")),
            Err(Malformed::Body(header)) => {
                tracing::error!(opcode = header.opcode, "the kernel sent a FUSE request that is cut short");
                if header.wants_answer() {
                    answer.send(dev, header.unique, Err(Errno::EIO))?;
                }
            }
        }
    }
}

/// Whether more requests will come.
fn answer_one(
    server: &impl Serve,
    dev: &OwnedFd,
    request: &Request<'_>,
    answer: &mut Answer,
) -> io::Result<bool> {
    let header = &request.header;
    match request.operation {
        Operation::Forget(count) => server.forget(&mut std::iter::once((header.nodeid, count))),
        Operation::BatchForget(list) => server.forget(&mut forgotten(list)),
        // Nothing that is under way can be stopped.
        Operation::Interrupt => {}
        _ => {
            answer.clear();
            // Whoever asked would wait for ever.
            let result = catch_unwind(AssertUnwindSafe(|| server.answer(request, answer)));
            let result = result.unwrap_or(Err(Errno::EIO));
            match answer.send(dev, header.unique, result) {
                Ok(()) => {}
                // Whoever asked is gone.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => {
                    tracing::error!(opcode = header.opcode, %error, "the kernel refuses the answer to a FUSE request");
                    let _ = answer.send(dev, header.unique, Err(Errno::EIO));
                }
            }
        }
    }
    Ok(request.operation != Operation::Destroy)
}
