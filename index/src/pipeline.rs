//! Three threads and bounded channels: the reader hashes the blob, the decoder decodes, the caller's thread
//! does all that needs the decoded bytes. On two cores the decoder and the hashes run side by side.

use std::io::{ErrorKind, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use crate::decode::{Cutter, Entrance, Output, decode};
use crate::source::{ChannelSource, Piece, Source};
use crate::{Compression, Digest, Hasher, IndexError};

/// Size of the buffers that travel through the channels. There may be a stream for each of many layers, and each has some
/// sixteen of them.
const BUFFER: usize = 128 * 1024;
/// Number of buffers that may wait in a channel.
const DEPTH: usize = 6;

/// What the decoder tells, in the order of the layer file.
pub(crate) enum Event {
    /// The layer file's next bytes: `bytes[..len]`; `blob` bytes of the blob are consumed.
    Data { bytes: Vec<u8>, len: usize, blob: u64 },
    /// The open span ends at blob byte `end`, the next starts at `start`.
    Cut { end: u64, start: u64, entrance: Entrance },
    /// A better window for the start of the open span.
    Window(Vec<u8>),
}

/// Takes the events on the caller's thread.
pub(crate) trait Consumer {
    /// Called once, before anything else.
    fn begin(&mut self, compression: Compression) -> Result<(), IndexError>;
    /// The layer file's next bytes.
    fn data(&mut self, bytes: &[u8], blob: u64) -> Result<(), IndexError>;
    /// A span ends and another begins.
    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError>;
    /// A better window for the start of the open span.
    fn window(&mut self, window: Vec<u8>);
}

/// What is known of a blob once it has passed.
pub(crate) struct Passed {
    pub(crate) compression: Compression,
    pub(crate) blob_digest: Digest,
    pub(crate) blob_size: u64,
    /// Blob offset behind the last byte the decoder needed.
    pub(crate) data_end: u64,
}

/// Runs a blob through decoder and consumer. `tap` sees the blob's own bytes, on another thread, before they are
/// decoded.
///
/// After an error this returns as soon as the read that is under way does.
pub(crate) fn run<R: Read + Send>(
    blob: R,
    cutter: Cutter<'_>,
    consumer: &mut impl Consumer,
    tap: impl FnMut(&[u8]) + Send,
) -> Result<Passed, IndexError> {
    thread::scope(|scope| {
        let (piece_tx, piece_rx) = sync_channel(DEPTH);
        let (piece_back_tx, piece_back_rx) = channel();
        let (event_tx, event_rx) = sync_channel(DEPTH);
        let (event_back_tx, event_back_rx) = channel();
        let (kind_tx, kind_rx) = sync_channel(1);
        let spawn = |source| IndexError::Setup { what: "layer decoder's threads", source };

        let reader = thread::Builder::new()
            .name("layer-read".into())
            .spawn_scoped(scope, move || read(blob, tap, &piece_tx, &piece_back_rx))
            .map_err(spawn)?;
        let decoder = thread::Builder::new()
            .name("layer-decode".into())
            .spawn_scoped(scope, move || {
                let mut source = ChannelSource::new(piece_rx, piece_back_tx);
                let compression = Compression::detect(source.fill()?);
                let _ = kind_tx.send(compression);
                let mut output = ChannelOutput::new(event_tx, event_back_rx);
                let end = decode(compression, &mut source, &mut output, cutter)?;
                output.flush()?;
                // What follows the compressed data still belongs to the blob's digest.
                while !source.fill()?.is_empty() {
                    let n = source.fill()?.len();
                    source.consume(n);
                }
                Ok::<_, IndexError>((compression, end))
            })
            .map_err(spawn)?;

        let consumed = consume(consumer, &kind_rx, event_rx, &event_back_tx);
        // The consumer's own error stops the decoder, the decoder's error stops the consumer quietly.
        let decoded = decoder.join().map_err(|_| IndexError::Internal { thread: "decoding" });
        let read = reader.join().map_err(|_| IndexError::Internal { thread: "reading" });
        consumed?;
        let (compression, data_end) = decoded??;
        let (blob_digest, blob_size) = read?;
        Ok(Passed { compression, blob_digest, blob_size, data_end })
    })
}

fn consume(
    consumer: &mut impl Consumer,
    kind: &Receiver<Compression>,
    events: Receiver<Event>,
    used: &Sender<Vec<u8>>,
) -> Result<(), IndexError> {
    // No compression: the decoder failed before it saw a byte and its error tells why.
    let Ok(compression) = kind.recv() else { return Ok(()) };
    consumer.begin(compression)?;
    for event in events {
        match event {
            Event::Data { bytes, len, blob } => {
                consumer.data(&bytes[..len], blob)?;
                let _ = used.send(bytes);
            }
            Event::Cut { end, start, entrance } => consumer.cut(end, start, entrance)?,
            Event::Window(window) => consumer.window(window),
        }
    }
    Ok(())
}

/// The reader: full buffers to the decoder, and the blob's digest and length.
fn read(
    mut blob: impl Read,
    mut tap: impl FnMut(&[u8]),
    pieces: &SyncSender<Piece>,
    used: &Receiver<Vec<u8>>,
) -> (Digest, u64) {
    let mut hasher = Hasher::new();
    let mut offset = 0;
    loop {
        let mut buffer = used.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let mut len = 0;
        while len < BUFFER {
            match blob.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    let offset = offset + len as u64;
                    let _ = pieces.send(Err(IndexError::Read { offset, source }));
                    return (hasher.finish(), offset);
                }
            }
        }
        buffer.truncate(len);
        if len == 0 {
            break;
        }
        hasher.update(&buffer);
        tap(&buffer);
        offset += len as u64;
        if pieces.send(Ok(buffer)).is_err() || len < BUFFER {
            break;
        }
    }
    (hasher.finish(), offset)
}

/// The decoder's end of the event channel; collects small pieces to whole buffers.
struct ChannelOutput {
    events: SyncSender<Event>,
    used: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
    len: usize,
    blob: u64,
}

impl ChannelOutput {
    fn new(events: SyncSender<Event>, used: Receiver<Vec<u8>>) -> Self {
        Self { events, used, buffer: vec![0; BUFFER], len: 0, blob: 0 }
    }

    fn send(&mut self, event: Event) -> Result<(), IndexError> {
        // A consumer that is gone has an error of its own, which is the one that gets reported.
        self.events.send(event).map_err(|_| IndexError::Internal { thread: "consuming" })
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        if self.len == 0 {
            return Ok(());
        }
        let fresh = self.used.try_recv().unwrap_or_else(|_| vec![0; BUFFER]);
        let bytes = std::mem::replace(&mut self.buffer, fresh);
        let len = std::mem::take(&mut self.len);
        self.send(Event::Data { bytes, len, blob: self.blob })
    }
}

impl Output for ChannelOutput {
    fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.len..]
    }

    fn filled(&mut self, n: usize, blob: u64) -> Result<(), IndexError> {
        self.len += n;
        self.blob = blob;
        if self.len == self.buffer.len() { self.flush() } else { Ok(()) }
    }

    fn window(&mut self, window: Vec<u8>) -> Result<(), IndexError> {
        self.send(Event::Window(window))
    }

    fn cut(&mut self, end: u64, start: u64, entrance: Entrance) -> Result<(), IndexError> {
        self.flush()?;
        self.send(Event::Cut { end, start, entrance })
    }
}
