//! A forward proxy for plain http that leads every name to one address.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// It runs until the test's process ends.
pub struct Proxy {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// Starts one on a free port.
    pub fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port for the proxy");
        let (addr, asked) = (listener.local_addr().expect("its address"), Arc::default());
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let log = Arc::clone(&log);
                std::thread::spawn(move || drop(serve(client, target, &log)));
            }
        });
        Proxy { addr, asked }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// First lines of the requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("the proxy's log").clone()
    }
}

/// One request, and whatever comes after it on the connection.
fn serve(mut client: TcpStream, target: SocketAddr, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let (line, rest) = head.split_once("\r\n").unwrap_or_default();
    log.lock().expect("the proxy's log").push(line.to_owned());
    let mut server = TcpStream::connect(target)?;
    // From absolute form to the path, and no second request on the connection.
    let (method, url) = line.split_once(" http://").unwrap_or_default();
    let path = &url[url.find('/').unwrap_or(url.len())..];
    server.write_all(format!("{method} {path}\r\nConnection: close\r\n{rest}").as_bytes())?;
    std::io::copy(&mut server, &mut client)?;
    client.shutdown(Shutdown::Both)
}
