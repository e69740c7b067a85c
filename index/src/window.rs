//! Stores of a checkpoint's window only what the span really refers to: about half of most windows is not.
//!
//! Only the first 32 KiB that a span decodes to can refer to the window directly. Decoding them three times with
//! made-up windows shows which window bytes they are copied from: one window holds the low byte of each position,
//! one the high byte, one the inverted low byte. Output that differs between the first and the third came out of
//! the window; the first two then say from where.

use crate::inflate::{Inflater, WINDOW};

/// Compressed bytes that are enough for 32 KiB of output unless someone wrote them to waste space.
const INPUT: usize = 48 * 1024;

/// Collects the first compressed bytes behind a checkpoint.
pub(crate) struct Trimmer {
    bits: u32,
    value: u8,
    window: Vec<u8>,
    input: Vec<u8>,
}

impl Trimmer {
    /// A checkpoint where `bits` bits, of the value `value`, come before the next input byte.
    pub(crate) fn new(bits: u32, value: u8, window: Vec<u8>) -> Self {
        Self { bits, value, window, input: Vec::with_capacity(INPUT) }
    }

    /// Takes the next compressed bytes; whether it has enough.
    pub(crate) fn feed(&mut self, input: &[u8]) -> bool {
        let n = input.len().min(INPUT - self.input.len());
        self.input.extend_from_slice(&input[..n]);
        self.input.len() == INPUT
    }

    /// The window with zeros for what no output is copied from; all of it if that cannot be told.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if let Some(used) = self.used() {
            for (byte, used) in self.window.iter_mut().zip(used) {
                if !used {
                    *byte = 0;
                }
            }
        }
        self.window
    }

    fn used(&self) -> Option<Vec<bool>> {
        let len = self.window.len();
        let low = self.decode((0..len).map(|i| i as u8))?;
        let inverted = self.decode((0..len).map(|i| !(i as u8)))?;
        let high = self.decode((0..len).map(|i| (i >> 8) as u8))?;
        let mut used = vec![false; len];
        for ((&low, &inverted), &high) in low.iter().zip(&inverted).zip(&high) {
            if low != inverted {
                *used.get_mut(usize::from(high) << 8 | usize::from(low))? = true;
            }
        }
        Some(used)
    }

    /// The span's first bytes with a made-up window; `None` if the input does not reach far enough.
    fn decode(&self, window: impl Iterator<Item = u8>) -> Option<Vec<u8>> {
        let window: Vec<u8> = window.collect();
        let mut inflater = Inflater::new().ok()?;
        inflater.prime(self.bits, self.value, &window).ok()?;
        let mut out = vec![0; WINDOW];
        let (mut read, mut done) = (0, 0);
        while done < WINDOW {
            let step = inflater.run(&self.input[read..], &mut out[done..], false).ok()?;
            read += step.consumed;
            done += step.produced;
            if step.end {
                break;
            }
            if step.consumed == 0 && step.produced == 0 {
                return None;
            }
        }
        out.truncate(done);
        Some(out)
    }
}
