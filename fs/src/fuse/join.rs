//! Replies with a condition: exactly so many bytes, or the bytes of several reads put together.
//!
//! The kernel takes a short answer for the end of the file and fills the rest of the page with zeros, so
//! an answer that is too short must become an error here.

use std::sync::{Arc, Mutex, PoisonError};

use super::content::ReadReply;

/// Passes on exactly `len` bytes; anything else is EIO.
pub(super) struct Exact<R> {
    pub(super) len: u32,
    pub(super) reply: R,
}

impl<R: ReadReply> ReadReply for Exact<R> {
    fn data(self: Box<Self>, bytes: &[u8]) {
        if bytes.len() == self.len as usize {
            Box::new(self.reply).data(bytes);
        } else {
            Box::new(self.reply).error(libc::EIO);
        }
    }

    fn error(self: Box<Self>, errno: i32) {
        Box::new(self.reply).error(errno);
    }
}

/// One answer out of several reads that end in any order, on any threads. What no part covers is zero.
pub(super) struct Join<R> {
    state: Mutex<State<R>>,
}

struct State<R> {
    bytes: Vec<u8>,
    missing: usize,
    /// Taken by the last part, or by the first that fails.
    reply: Option<R>,
}

impl<R: ReadReply + 'static> Join<R> {
    /// Splits `reply`, of `len` bytes, into one reply per `(start, len)` of `parts`. The parts lie within
    /// `len` and do not overlap. Without parts the answer is given at once.
    pub(super) fn split(reply: R, len: usize, parts: &[(usize, usize)]) -> Vec<Box<dyn ReadReply>> {
        if parts.is_empty() {
            Box::new(reply).data(&vec![0; len]);
            return Vec::new();
        }
        let state = State { bytes: vec![0; len], missing: parts.len(), reply: Some(reply) };
        let join = Arc::new(Self { state: Mutex::new(state) });
        let part = |&(start, len)| {
            let part = Part { join: Arc::clone(&join), start, len, answered: false };
            Box::new(part) as Box<dyn ReadReply>
        };
        parts.iter().map(part).collect()
    }

    fn finish(&self, start: usize, len: usize, result: Result<&[u8], i32>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        match (result, state.bytes.get_mut(start..start + len)) {
            (Ok(bytes), Some(place)) if bytes.len() == len => place.copy_from_slice(bytes),
            (Err(errno), _) => return fail(state, errno),
            _ => return fail(state, libc::EIO),
        }
        state.missing -= 1;
        if state.missing == 0
            && let Some(reply) = state.reply.take()
        {
            Box::new(reply).data(&state.bytes);
        }
    }
}

fn fail<R: ReadReply>(state: &mut State<R>, errno: i32) {
    if let Some(reply) = state.reply.take() {
        Box::new(reply).error(errno);
    }
}

struct Part<R: ReadReply + 'static> {
    join: Arc<Join<R>>,
    start: usize,
    len: usize,
    answered: bool,
}

impl<R: ReadReply + 'static> ReadReply for Part<R> {
    fn data(mut self: Box<Self>, bytes: &[u8]) {
        self.answered = true;
        self.join.finish(self.start, self.len, Ok(bytes));
    }

    fn error(mut self: Box<Self>, errno: i32) {
        self.answered = true;
        self.join.finish(self.start, self.len, Err(errno));
    }
}

impl<R: ReadReply + 'static> Drop for Part<R> {
    fn drop(&mut self) {
        if !self.answered {
            self.join.finish(self.start, self.len, Err(libc::EIO));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    struct Recorder(Sender<Result<Vec<u8>, i32>>);

    impl ReadReply for Recorder {
        fn data(self: Box<Self>, bytes: &[u8]) {
            self.0.send(Ok(bytes.to_vec())).unwrap();
        }

        fn error(self: Box<Self>, errno: i32) {
            self.0.send(Err(errno)).unwrap();
        }
    }

    fn split(len: usize, parts: &[(usize, usize)]) -> (Vec<Box<dyn ReadReply>>, Answers) {
        let (send, receive) = channel();
        (Join::split(Recorder(send), len, parts), receive)
    }

    type Answers = Receiver<Result<Vec<u8>, i32>>;

    #[test]
    fn parts_come_in_any_order_and_gaps_are_zero() {
        let (mut parts, answers) = split(10, &[(1, 3), (6, 2)]);
        parts.pop().unwrap().data(b"yz");
        assert!(answers.try_recv().is_err(), "answered too early");
        parts.pop().unwrap().data(b"abc");
        assert_eq!(answers.recv().unwrap(), Ok(b"\0abc\0\0yz\0\0".to_vec()));
        assert!(answers.recv().is_err(), "answered twice");
    }

    #[test]
    fn a_hole_is_answered_at_once() {
        let (parts, answers) = split(3, &[]);
        assert!(parts.is_empty());
        assert_eq!(answers.recv().unwrap(), Ok(vec![0; 3]));
    }

    #[test]
    fn a_part_that_fails_is_short_or_is_dropped_fails_the_whole_once() {
        for case in 0..3 {
            let (mut parts, answers) = split(8, &[(0, 4), (4, 4)]);
            let part = parts.pop().unwrap();
            match case {
                0 => part.error(libc::ENETDOWN),
                1 => part.data(b"abc"),
                _ => drop(part),
            }
            parts.pop().unwrap().data(b"good");
            let errno = if case == 0 { libc::ENETDOWN } else { libc::EIO };
            assert_eq!(answers.recv().unwrap(), Err(errno), "case {case}");
            assert!(answers.recv().is_err(), "answered twice");
        }
    }

    #[test]
    fn a_short_answer_is_an_error() {
        let (send, answers) = channel();
        Box::new(Exact { len: 4, reply: Recorder(send) }).data(b"abc");
        assert_eq!(answers.recv().unwrap(), Err(libc::EIO));
        let (send, answers) = channel();
        Box::new(Exact { len: 3, reply: Recorder(send) }).data(b"abc");
        assert_eq!(answers.recv().unwrap(), Ok(b"abc".to_vec()));
    }
}
