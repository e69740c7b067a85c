//! The user's terminal: raw while a container has it, restored whatever happens.

use crate::container::error::{Attempt, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Puts a terminal into raw mode; dropping it restores the mode before.
#[derive(Debug)]
pub struct RawMode {
    tty: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// # Errors
    /// The descriptor is not a terminal.
    pub fn enter(tty: BorrowedFd<'_>) -> Result<Self> {
        let tty = tty.try_clone_to_owned().attempt(|| "copy the terminal's descriptor")?;
        let before = tcgetattr(&tty).attempt(|| "read the terminal's mode")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&tty, SetArg::TCSADRAIN, &raw).attempt(|| "set the terminal's mode")?;
        Ok(Self { tty, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing sensible is left to do when a terminal cannot be restored.
        let _ = tcsetattr(&self.tty, SetArg::TCSADRAIN, &self.before);
    }
}

/// Rows and columns of a terminal; `None` for anything else.
pub fn size(tty: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills the winsize it is given.
    let ret = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (ret == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Recognises the keys that detach (ctrl-p ctrl-q) in a stream of typed bytes.
#[derive(Debug, Default)]
pub struct DetachKeys {
    armed: bool,
}

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

impl DetachKeys {
    /// Passes typed bytes on to `out`; true when the user detached. A ctrl-p is held until the next key.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for byte in typed {
            match (self.armed, *byte) {
                (true, CTRL_Q) => return true,
                (true, CTRL_P) => out.push(CTRL_P),
                (true, other) => {
                    out.extend([CTRL_P, other]);
                    self.armed = false;
                }
                (false, CTRL_P) => self.armed = true,
                (false, other) => out.push(other),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(keys: &mut DetachKeys, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        let detached = keys.filter(bytes, &mut out);
        (out, detached)
    }

    #[test]
    fn only_the_sequence_detaches() {
        let mut keys = DetachKeys::default();
        assert_eq!(feed(&mut keys, b"a\x10b"), (b"a\x10b".to_vec(), false));
        assert_eq!(feed(&mut keys, b"\x11"), (b"\x11".to_vec(), false));
        assert_eq!(feed(&mut keys, b"x\x10"), (b"x".to_vec(), false));
        assert_eq!(feed(&mut keys, b"\x11y"), (vec![], true));
    }
}
