//! Paths, programs and libraries in a small tree.

use lazyrun_fs::view::View;
use lazyrun_index::EntryKind;

use super::libraries::Libraries;
use super::{command, tree};
use crate::container::spec::Command;
use crate::elf::Needs;
use layer::{Item, TestLayer};

#[expect(dead_code, unreachable_pub, reason = "of what the tests of views use, this needs a part")]
#[path = "../../../fs/tests/common/layer.rs"]
mod layer;

/// Where Debian has libraries of the machine that the tests run on.
fn multiarch(library: &str) -> String {
    format!("/usr/lib/{}-linux-gnu/{library}", std::env::consts::ARCH)
}

fn view() -> View {
    let mut layer = TestLayer::default();
    let program = |path: &str| Item::new(path, EntryKind::File).mode(0o755);
    layer.symlink("bin", "usr/bin").symlink("lib", "/usr/lib").symlink("loop", "loop").dir("app");
    layer.file("app/main.py", b"import os").file("app/run", b"not executable");
    layer
        .file(&multiarch("libc.so.6")[1..], b"c")
        .file("usr/lib/m68k-linux-gnu/libc.so.6", b"other")
        .file("usr/lib/libz.so.1.2", b"z");
    layer.symlink("usr/lib/libz.so.1", "../lib/libz.so.1.2").file("opt/lib/libown.so", b"own");
    layer.file("usr/lib64/libc.so.6", b"another").file("lib64/ld.so", b"loader");
    for path in ["usr/bin/python3", "usr/bin/sh", "usr/bin/nginx", "usr/bin/curl", "opt/bin/tool"] {
        layer.file_item(program(path), b"program");
    }
    layer.file_item(program("entry.sh"), b"#!/bin/sh -e\n");
    View::merge(&[&layer]).expect("a view")
}

fn started(args: &[&str]) -> Command {
    let env = ["PATH=/nowhere:/bin:/opt/bin", "LD_LIBRARY_PATH=/opt/other"].map(str::to_owned).to_vec();
    Command { args: args.iter().map(|arg| (*arg).to_owned()).collect(), env, workdir: "/app".to_owned() }
}

fn programs(args: &[&str]) -> Vec<String> {
    let files = command::programs(&view(), &started(args));
    files.into_iter().map(|file| String::from_utf8(file.path).expect("text")).collect()
}

#[test]
fn symlinks_lead_where_they_lead_a_process() {
    let view = view();
    let path = |path: &str| {
        tree::file(&view, path.as_bytes()).map(|file| String::from_utf8(file.path).expect("text"))
    };
    assert_eq!(path("/bin/sh").as_deref(), Some("/usr/bin/sh"));
    assert_eq!(path("/lib/libz.so.1").as_deref(), Some("/usr/lib/libz.so.1.2"));
    assert_eq!(path("/../bin/./../bin//sh").as_deref(), Some("/usr/bin/sh"));
    for none in ["/loop", "/bin", "/", "/bin/none", "/entry.sh/x"] {
        assert_eq!(path(none), None, "{none}");
    }
}

#[test]
fn a_command_names_programs() {
    assert_eq!(programs(&["nginx", "-g", "daemon off;"]), ["/usr/bin/nginx"]);
    assert_eq!(programs(&["/entry.sh", "nginx", "sh"]), ["/entry.sh", "/usr/bin/nginx", "/usr/bin/sh"]);
    assert_eq!(programs(&["python3", "main.py"]), ["/usr/bin/python3", "/app/main.py"]);
    assert_eq!(programs(&["python3", "./main.py", "--", "/app"]), ["/usr/bin/python3", "/app/main.py"]);
    let script = ["sh", "-c", "tool && exec curl nginx | none"];
    assert_eq!(programs(&script), ["/usr/bin/sh", "/opt/bin/tool", "/usr/bin/curl"]);
    assert_eq!(programs(&[]), Vec::<String>::new());
}

#[test]
fn scripts_name_their_interpreter_and_shell_scripts_programs() {
    let called = |script: &str| -> Vec<String> {
        let files = command::of_script(&view(), &started(&["x"]), script.as_bytes());
        files.into_iter().map(|file| String::from_utf8(file.path).expect("text")).collect()
    };
    assert_eq!(called("#!/bin/sh -e\ncurl nginx\n"), ["/usr/bin/sh", "/usr/bin/curl"]);
    assert_eq!(called("#! /usr/bin/env python3\ncurl nginx\n"), ["/usr/bin/python3"]);
    assert_eq!(called("curl nginx\n"), Vec::<String>::new());
    assert_eq!(called("#!"), Vec::<String>::new());
}

#[test]
fn libraries_are_found_as_the_loader_finds_them() {
    let view = view();
    let libraries = Libraries::of(&view, &started(&["x"]));
    let find = |libraries_of: &[&str], paths: &[&str]| -> Vec<String> {
        let needs = Needs {
            interpreter: Some("/lib64/ld.so".into()),
            libraries: libraries_of.iter().map(Into::into).collect(),
            paths: paths.iter().map(Into::into).collect(),
        };
        let files = libraries.find(&view, b"/opt/bin/tool", &needs);
        files.into_iter().map(|file| String::from_utf8(file.path).expect("text")).collect()
    };
    let found = find(&["libc.so.6", "libz.so.1", "libc.so.6", "libnone.so"], &[]);
    assert_eq!(found, ["/lib64/ld.so", &multiarch("libc.so.6"), "/usr/lib/libz.so.1.2"]);
    assert_eq!(find(&["libown.so"], &[]), ["/lib64/ld.so"]);
    for dir in ["$ORIGIN/../lib", "${ORIGIN}/../lib", "/opt/lib"] {
        assert_eq!(find(&["libown.so"], &[dir])[1..], ["/opt/lib/libown.so"], "{dir}");
    }
}
