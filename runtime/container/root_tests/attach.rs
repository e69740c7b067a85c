//! Streams: attached clients, terminals, slow readers.

use super::super::proto::{Frame, Request};
use super::*;
use client::Connection;

fn waiting(script: &str, run: RunOptions, terminal: bool) -> Container {
    let mut c = Container::new().sh(script, RunOptions { tty: terminal, ..run });
    (c.config.wait_attach, c.config.open_stdin, c.config.terminal) = (true, true, terminal);
    c
}

/// Everything up to the exit frame: stdout, stderr, code.
fn drain(connection: &mut Connection) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match connection.receive().unwrap() {
            Some(Frame::Stdout(b)) => out.extend(b),
            Some(Frame::Stderr(b)) => err.extend(b),
            Some(Frame::Exit(code)) => return (out, err, code),
            Some(Frame::Error(code, text)) => panic!("{code}: {text}"),
            Some(_) => {}
            None => panic!("hung up"),
        }
    }
}

fn attach(c: &Container, stdin: bool, logs: bool) -> Connection {
    Connection::open(&c.config.socket, &Request::Attach { stdin, logs }).unwrap()
}

#[test]
fn the_foreground_client_gives_input_and_its_end() {
    let mut c = waiting("cat; echo done >&2; exit 5", options(), false);
    c.started();
    let mut connection = attach(&c, true, false);
    let mut sender = connection.sender().unwrap();
    for _ in 0..100 {
        sender.send(&Frame::Stdin(vec![b'x'; 10_000])).unwrap();
    }
    sender.send(&Frame::StdinEof).unwrap();
    let (out, err, code) = drain(&mut connection);
    assert_eq!((out.len(), err.as_slice(), code), (1_000_000, b"done\n".as_slice(), 5));
    c.ended();
}

#[test]
fn a_terminal_is_one() {
    let mut c = waiting(
        "tty; stty size; read line; echo got $line; stty size; ls -l /proc/self/fd | grep -c pts",
        options(),
        true,
    );
    c.started();
    let mut connection = attach(&c, true, false);
    let mut sender = connection.sender().unwrap();
    sender.send(&Frame::Resize(33, 111)).unwrap();
    sender.send(&Frame::Stdin(b"hello\r".to_vec())).unwrap();
    let (out, _, code) = drain(&mut connection);
    let text = String::from_utf8(out).unwrap();
    assert_eq!(code, 0);
    assert!(text.contains("/dev/pts/0") || text.contains("/dev/console"), "{text}");
    assert!(text.contains("got hello") && text.contains("33 111"), "{text}");
    c.ended();
}

#[test]
fn exec_has_terminals_and_input_too() {
    let mut c = Container::new().sh("sleep 1000", options());
    c.started();
    let tty =
        ExecProcess { args: vec!["tty".into()], terminal: true, size: Some((7, 77)), ..Default::default() };
    let (ending, out) = c.exec(&tty, None).unwrap();
    assert_eq!(ending, Ending::Exited(0));
    assert!(out.starts_with("/dev/pts/"), "{out}");
    let size = ExecProcess { args: vec!["stty".into(), "size".into()], ..tty };
    assert_eq!(c.exec(&size, None).unwrap().1.trim(), "7 77");
    let (read, write) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&write, b"through").unwrap();
    drop(write);
    let cat = ExecProcess { args: vec!["cat".into()], stdin: true, ..Default::default() };
    assert_eq!(c.exec(&cat, Some(&read)).unwrap(), (Ending::Exited(0), "through".to_owned()));
    client::kill(&c.config.socket, 9).unwrap();
    c.ended();
}

#[test]
fn late_clients_see_the_log_first_and_nothing_twice() {
    let mut c = Container::new().sh("echo one; echo two >&2; printf par; cat /tmp/go 2>/dev/null; while ! [ -e /tmp/go ]; do sleep 0.02; done; echo tial", options());
    c.started();
    assert!(eventually(|| c.output().1 == "two\n"));
    let mut connection = attach(&c, false, true);
    let started = connection.receive().unwrap();
    assert!(matches!(started, Some(Frame::Started(_))), "{started:?}");
    // The first bytes come from the log and from the unfinished line.
    std::fs::write(c.root().join("tmp/go"), "").unwrap();
    let (out, err, code) = drain(&mut connection);
    assert_eq!(
        (out.as_slice(), err.as_slice(), code),
        (b"one\npartial\n".as_slice(), b"two\n".as_slice(), 0)
    );
    c.ended();
}

#[test]
fn slow_readers_lose_nothing_in_the_foreground_and_block_nobody_else() {
    let mut c = waiting("yes | head -c 8000000", options(), false);
    c.started();
    let mut connection = attach(&c, false, false);
    // Longer than the patience with clients that only follow.
    std::thread::sleep(Duration::from_millis(1500));
    let (out, _, code) = drain(&mut connection);
    assert_eq!((out.len(), code), (8_000_000, 0));
    c.ended();
    let mut c =
        Container::new().sh("while ! [ -e /tmp/go ]; do sleep 0.02; done; yes | head -c 8000000", options());
    c.started();
    let idle = attach(&c, false, false);
    assert!(eventually(|| client::state(&c.config.socket).is_ok()));
    std::fs::write(c.root().join("tmp/go"), "").unwrap();
    assert_eq!(c.ended().exit_code, 0);
    drop(idle);
    assert_eq!(c.output().0.len(), 8_000_000);
}

#[test]
fn nonsense_from_a_client_harms_nobody() {
    use std::io::{Read, Write};
    let mut c = Container::new().sh("sleep 1000", options());
    c.started();
    for bytes in [&b"{}\n"[..], b"\xff\xfe\n", b"{\"op\":\"attach\"}\n\xff\xff\xff\xff\xff\xff", b"{\"op\":"]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(&c.config.socket).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(client::state(&c.config.socket).unwrap().status, "running");
    client::kill(&c.config.socket, 9).unwrap();
    c.ended();
}
