//! A TCP proxy that makes loopback behave like a link: one bandwidth shared by all connections, a round-trip
//! time on every exchange and one more for setting a connection up; and it counts what passes.
//!
//! Each direction is a first-in-first-out link: a chunk occupies it for `len / bandwidth`, then travels half a
//! round trip. Buffers are bounded by what the link carries, so a reader that stops is felt by the sender.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// How far ahead of the link a sender may run: what a real sender's socket buffer would hold.
const LEAD: Duration = Duration::from_millis(40);
/// Bytes taken from a socket at once; the grain in which connections share the link.
const CHUNK: usize = 16 * 1024;
/// Chunks under way per connection and direction; beyond it the sender waits.
const IN_FLIGHT: usize = 256;
/// A request head longer than this is not looked at (it is still forwarded).
const MAX_HEAD: usize = 64 * 1024;
/// Requests remembered in the log; later ones are only counted.
const MAX_LOG: usize = 200_000;

/// The link to imitate. The default does not shape, it only counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Bandwidth per direction in 10^6 bits per second, shared by all connections; 0 means unlimited.
    pub mbit: f64,
    /// Round-trip time in milliseconds.
    pub rtt_ms: f64,
}

impl Shape {
    fn rtt(&self) -> Duration {
        Duration::try_from_secs_f64(self.rtt_ms / 1000.0).unwrap_or_default()
    }
}

/// What passed since the start or the last reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// HTTP requests seen.
    pub requests: u64,
    /// Bytes delivered to clients, heads included.
    pub bytes_down: u64,
    /// Bytes delivered to the upstream.
    pub bytes_up: u64,
    /// Connections accepted.
    pub connections: u64,
}

/// One HTTP request that passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoggedRequest {
    /// Seconds since the start or the last reset.
    pub at: f64,
    /// Number of the connection it came over.
    pub connection: u64,
    /// The method, such as `GET`.
    pub method: String,
    /// The request target, such as `/v2/demo/blobs/sha256:…`.
    pub target: String,
    /// The value of the `Range` header.
    pub range: Option<String>,
}

/// A running proxy; it stops when dropped.
pub struct Shaper {
    addr: SocketAddr,
    state: Arc<State>,
    runtime: Option<Runtime>,
}

impl Shaper {
    /// Listens on a free loopback port and forwards to `upstream` over a link of the given shape.
    ///
    /// # Errors
    /// When no port or no thread can be had.
    pub fn start(upstream: SocketAddr, shape: Shape) -> io::Result<Shaper> {
        let runtime = runtime("shaper")?;
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let state = Arc::new(State::new(shape));
        let guard = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        drop(guard);
        runtime.spawn(accept(listener, upstream, state.clone()));
        Ok(Shaper { addr, state, runtime: Some(runtime) })
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What passed since the start or the last [`Shaper::reset`].
    pub fn traffic(&self) -> Traffic {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            requests: get(&self.state.requests),
            bytes_down: get(&self.state.down.bytes),
            bytes_up: get(&self.state.up.bytes),
            connections: get(&self.state.connections),
        }
    }

    /// The requests since the start or the last [`Shaper::reset`], oldest first.
    pub fn log(&self) -> Vec<LoggedRequest> {
        lock(&self.state.log).requests.clone()
    }

    /// Sets the counters to zero and empties the log. Connections stay.
    pub fn reset(&self) {
        for counter in
            [&self.state.requests, &self.state.down.bytes, &self.state.up.bytes, &self.state.connections]
        {
            counter.store(0, Ordering::Relaxed);
        }
        let mut log = lock(&self.state.log);
        log.requests.clear();
        log.since = Instant::now();
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        // Also right inside another runtime, where waiting for the threads would panic.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A small runtime of its own, so that synchronous callers (benches, tests) need none.
pub(super) fn runtime(name: &str) -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build()
}

struct State {
    shape: Shape,
    up: Link,
    down: Link,
    requests: AtomicU64,
    connections: AtomicU64,
    /// Never reset, unlike `connections`: it names connections in the log.
    next_connection: AtomicU64,
    log: Mutex<Log>,
}

struct Log {
    since: Instant,
    requests: Vec<LoggedRequest>,
}

impl State {
    fn new(shape: Shape) -> State {
        State {
            shape,
            up: Link::new(shape.mbit),
            down: Link::new(shape.mbit),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            next_connection: AtomicU64::new(0),
            log: Mutex::new(Log { since: Instant::now(), requests: Vec::new() }),
        }
    }

    fn record(&self, connection: u64, head: &str) {
        let mut lines = head.lines();
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some(version)) = (first.next(), first.next(), first.next()) else {
            return;
        };
        if !version.starts_with("HTTP/1") {
            return;
        }
        let range = lines
            .filter_map(|line| line.split_once(':'))
            .find_map(|(name, value)| name.eq_ignore_ascii_case("range").then(|| value.trim().to_owned()));
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut log = lock(&self.log);
        if log.requests.len() < MAX_LOG {
            let at = log.since.elapsed().as_secs_f64();
            let (method, target) = (method.to_owned(), target.to_owned());
            log.requests.push(LoggedRequest { at, connection, method, target, range });
        }
    }
}

/// One direction of the link.
struct Link {
    /// Nanoseconds per byte; 0 means unlimited.
    pace: f64,
    /// When the link is free again.
    free: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Link {
    fn new(mbit: f64) -> Link {
        let pace = if mbit > 0.0 { 8000.0 / mbit } else { 0.0 };
        Link { pace, free: Mutex::new(Instant::now()), bytes: AtomicU64::new(0) }
    }

    /// Takes the next slot for `len` bytes and says when its last bit has left.
    fn slot(&self, len: usize) -> Instant {
        if self.pace == 0.0 {
            return Instant::now();
        }
        let mut free = lock(&self.free);
        let now = Instant::now();
        if *free < now {
            *free = now;
        }
        *free += Duration::from_nanos((self.pace * len as f64) as u64);
        *free
    }
}

async fn accept(listener: TcpListener, upstream: SocketAddr, state: Arc<State>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                state.connections.fetch_add(1, Ordering::Relaxed);
                let number = state.next_connection.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(connection(client, upstream, state.clone(), number));
            }
            // Out of descriptors or the like: a pause lets connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn connection(client: TcpStream, upstream: SocketAddr, state: Arc<State>, number: u64) {
    let accepted = Instant::now();
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    // Delays are ours to make; a client that cannot be tuned still works.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let rtt = state.shape.rtt();
    // The client believes the connection is set up at once; its first bytes pay for the handshake.
    let up = pump(client_read, server_write, state.clone(), Some(number), accepted + rtt);
    let down = pump(server_read, client_write, state, None, accepted);
    tokio::join!(up, down);
}

/// Moves one direction of a connection; `requests` names the connection when it carries requests.
async fn pump(
    mut from: OwnedReadHalf,
    to: OwnedWriteHalf,
    state: Arc<State>,
    requests: Option<u64>,
    not_before: Instant,
) {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    let upward = requests.is_some();
    let writer = tokio::spawn(deliver(receiver, to, state.clone(), upward));
    let link = if upward { &state.up } else { &state.down };
    let travel = state.shape.rtt() / 2;
    let mut heads = HeadScanner::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        let bytes = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(len) => &buffer[..len],
        };
        if let Some(number) = requests {
            heads.feed(bytes, |head| state.record(number, head));
        }
        let leaves = link.slot(bytes.len());
        let arrives = leaves.max(not_before) + travel;
        if sender.send((arrives, bytes.to_vec())).await.is_err() {
            break;
        }
        if let Some(wait) = leaves.checked_sub(LEAD) {
            sleep_until(wait).await;
        }
    }
    drop(sender);
    let _ = writer.await;
}

async fn deliver(
    mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut to: OwnedWriteHalf,
    state: Arc<State>,
    upward: bool,
) {
    let link = if upward { &state.up } else { &state.down };
    while let Some((arrives, bytes)) = chunks.recv().await {
        sleep_until(arrives).await;
        if to.write_all(&bytes).await.is_err() {
            return;
        }
        link.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
    let _ = to.shutdown().await;
}

/// Sleeps unless the moment is so near that the timer (1 ms) would overshoot it.
async fn sleep_until(moment: Instant) {
    if moment.saturating_duration_since(Instant::now()) > Duration::from_micros(500) {
        tokio::time::sleep_until(moment.into()).await;
    }
}

/// Finds request heads in what a client sends. It knows requests without a body only, which is all that a
/// pull sends.
#[derive(Default)]
struct HeadScanner {
    pending: Vec<u8>,
}

impl HeadScanner {
    fn feed(&mut self, bytes: &[u8], mut found: impl FnMut(&str)) {
        self.pending.extend_from_slice(bytes);
        while let Some(end) = self.pending.windows(4).position(|window| window == b"\r\n\r\n") {
            found(&String::from_utf8_lossy(&self.pending[..end]));
            self.pending.drain(..end + 4);
        }
        if self.pending.len() > MAX_HEAD {
            self.pending.clear();
        }
    }
}

/// Locks also after another thread panicked: counters stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A server that answers every connection's first bytes with `len` bytes and closes.
    fn upstream(len: usize) -> SocketAddr {
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let _ = stream.read(&mut [0; 1024]);
                    let _ = stream.write_all(&vec![7; len]);
                });
            }
        });
        addr
    }

    fn get(addr: SocketAddr) -> usize {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        stream.write_all(b"GET /v2/a/blobs/x HTTP/1.1\r\nRange: bytes=1-2\r\n\r\n").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    }

    #[test]
    fn counts_bytes_and_requests_and_forgets_them() {
        let shaper = Shaper::start(upstream(100_000), Shape::default()).unwrap();
        assert_eq!(get(shaper.addr()), 100_000);
        let traffic = shaper.traffic();
        assert_eq!((traffic.requests, traffic.bytes_down, traffic.connections), (1, 100_000, 1));
        let log = shaper.log();
        assert_eq!(log[0].target, "/v2/a/blobs/x");
        assert_eq!(log[0].range.as_deref(), Some("bytes=1-2"));
        shaper.reset();
        assert_eq!(shaper.traffic(), Traffic::default());
        assert!(shaper.log().is_empty());
    }

    #[test]
    fn first_exchange_costs_two_round_trips() {
        let shaper = Shaper::start(upstream(10), Shape { mbit: 0.0, rtt_ms: 60.0 }).unwrap();
        let start = Instant::now();
        get(shaper.addr());
        assert!(start.elapsed() >= Duration::from_millis(119), "{:?}", start.elapsed());
    }

    #[test]
    fn bandwidth_is_shared_by_all_connections() {
        // 2 × 250 kB at 20 Mbit/s occupy the link for 200 ms together.
        let shaper = Shaper::start(upstream(250_000), Shape { mbit: 20.0, rtt_ms: 0.0 }).unwrap();
        let start = Instant::now();
        let addr = shaper.addr();
        let threads = [(); 2].map(|()| std::thread::spawn(move || get(addr)));
        for thread in threads {
            assert_eq!(thread.join().unwrap(), 250_000);
        }
        assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
    }

    #[test]
    fn heads_split_over_packets_are_found() {
        let mut scanner = HeadScanner::default();
        let mut found = Vec::new();
        for part in ["GET /a HT", "TP/1.1\r\nA: b\r", "\n\r\nGET /b HTTP/1.1\r\n\r\n"] {
            scanner.feed(part.as_bytes(), |head| found.push(head.to_owned()));
        }
        assert_eq!(found, ["GET /a HTTP/1.1\r\nA: b", "GET /b HTTP/1.1"]);
    }
}
