//! A safe face on zlib's raw inflate with what random access needs: stopping at block borders, starting at a
//! bit inside a byte, and the window. The safe wrappers around zlib-rs offer none of the three.

use std::ffi::{CStr, c_int};
use std::mem::size_of;

use libz_rs_sys as z;

/// Length of deflate's window: no block refers further back.
pub(crate) const WINDOW: usize = 32 * 1024;

/// What one call to [`Inflater::run`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Input bytes consumed.
    pub(crate) consumed: usize,
    /// Output bytes produced.
    pub(crate) produced: usize,
    /// The last block has ended.
    pub(crate) end: bool,
    /// Stopped right after a block that is not the last: the number of bits not used yet.
    pub(crate) border: Option<u32>,
}

/// A raw deflate decoder.
pub(crate) struct Inflater {
    // Boxed because zlib's state points back at the stream.
    stream: Box<z::z_stream>,
}

impl Inflater {
    pub(crate) fn new() -> Result<Self, String> {
        let mut stream = Box::new(z::z_stream::default());
        // SAFETY: the stream is a valid, default-initialised z_stream with the default allocator, and the size
        // given is its own; a negative window size asks for raw deflate.
        let code = unsafe {
            z::inflateInit2_(&raw mut *stream, -15, z::zlibVersion(), size_of::<z::z_stream>() as c_int)
        };
        if code == z::Z_OK { Ok(Self { stream }) } else { Err(format!("zlib error {code}")) }
    }

    /// Forgets everything; the next input starts a new deflate stream.
    pub(crate) fn reset(&mut self) -> Result<(), String> {
        // SAFETY: the stream was initialised in `new` and lives until `drop`.
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        self.check(code)
    }

    /// Starts inside a stream: `bits` bits with the value `value` come before the input, `window` was output last.
    pub(crate) fn prime(&mut self, bits: u32, value: u8, window: &[u8]) -> Result<(), String> {
        if bits > 0 {
            // SAFETY: the stream is initialised; zlib checks the number of bits.
            let code = unsafe { z::inflatePrime(&raw mut *self.stream, bits as c_int, c_int::from(value)) };
            self.check(code)?;
        }
        if !window.is_empty() {
            let len = window.len().min(WINDOW);
            let window = &window[window.len() - len..];
            // SAFETY: the stream is initialised and pointer and length are those of a live slice.
            let code =
                unsafe { z::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len as z::uInt) };
            self.check(code)?;
        }
        Ok(())
    }

    /// The last output, at most [`WINDOW`] bytes of this deflate stream.
    pub(crate) fn window(&mut self) -> Result<Vec<u8>, String> {
        let mut window = vec![0; WINDOW];
        let mut len: z::uInt = 0;
        // SAFETY: the stream is initialised and the buffer holds the largest possible window.
        let code =
            unsafe { z::inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut len) };
        self.check(code)?;
        window.truncate(len as usize);
        Ok(window)
    }

    /// Decodes from `input` to `output` until either is used up, the stream ends or, with `stop_at_border`, a block ends.
    pub(crate) fn run(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop_at_border: bool,
    ) -> Result<Step, String> {
        let in_len = input.len().min(1 << 30);
        let out_len = output.len().min(1 << 30);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = in_len as z::uInt;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = out_len as z::uInt;
        let flush = if stop_at_border { z::Z_BLOCK } else { z::Z_NO_FLUSH };
        // SAFETY: the stream is initialised; next_in/avail_in and next_out/avail_out describe live slices that
        // outlive the call, and zlib keeps no pointer into them for the next call.
        let code = unsafe { z::inflate(&raw mut *self.stream, flush) };
        let consumed = in_len - self.stream.avail_in as usize;
        let produced = out_len - self.stream.avail_out as usize;
        let end = code == z::Z_STREAM_END;
        // Z_BUF_ERROR only says that no progress was possible with what was given.
        if code != z::Z_OK && code != z::Z_BUF_ERROR && !end {
            return Err(self.message(code));
        }
        let state = self.stream.data_type;
        let border =
            (stop_at_border && !end && state & 128 != 0 && state & 64 == 0).then_some((state & 63) as u32);
        Ok(Step { consumed, produced, end, border })
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == z::Z_OK { Ok(()) } else { Err(self.message(code)) }
    }

    fn message(&self, code: c_int) -> String {
        if self.stream.msg.is_null() {
            return format!("zlib error {code}");
        }
        // SAFETY: zlib sets msg to null or to a NUL-terminated static text.
        unsafe { CStr::from_ptr(self.stream.msg) }.to_string_lossy().into_owned()
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised in `new` and is ended exactly once.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

/// Continues the CRC-32 of RFC 1952 over `bytes`.
pub(crate) fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    // SAFETY: pointer and length are those of a live slice.
    unsafe { z::crc32_z(crc.into(), bytes.as_ptr(), bytes.len()) as u32 }
}
