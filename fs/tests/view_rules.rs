//! The union rules of docs/SEMANTICS.md, one test each.

use crate::common::layer::{Files, Item, TestLayer};
use crate::common::tree;
use lazyrun_fs::view::{View, ViewError};
use lazyrun_index::{EntryKind, Extent};

fn layer(build: impl FnOnce(&mut TestLayer)) -> TestLayer {
    let mut l = TestLayer::default();
    build(&mut l);
    l
}

fn merge(layers: &[TestLayer]) -> Result<View, ViewError> {
    View::merge(&layers.iter().collect::<Vec<_>>())
}

/// Paths with their kinds; of files the contents, of links the target.
fn show(layers: &[TestLayer]) -> Vec<String> {
    let view = merge(layers).expect("layers merge");
    let files = Files::of(layers);
    let mut out = Vec::new();
    let mut todo = vec![(0, String::new())];
    while let Some((ino, path)) = todo.pop() {
        let inode = view.inode(ino);
        for (name, child) in view.children(ino) {
            todo.push((child, format!("{path}/{}", tree::escape(name))));
        }
        let mut text = Vec::new();
        for e in inode.extents.iter() {
            let start = e.layer_offset as usize;
            text.extend_from_slice(&files.0[usize::from(e.layer)][start..start + e.len as usize]);
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let target = String::from_utf8_lossy(&inode.target).into_owned();
        out.push(match inode.kind {
            lazyrun_fs::view::Kind::Directory => format!("{path}/"),
            lazyrun_fs::view::Kind::Symlink => format!("{path} -> {target}"),
            _ => format!("{path} = {text}"),
        });
    }
    out.sort();
    out
}

fn refused(layers: &[TestLayer]) -> String {
    merge(layers).expect_err("must be refused").to_string()
}

fn base() -> TestLayer {
    layer(|l| {
        l.dir("d").file("d/a", b"a").file("d/b", b"b").dir("d/sub").file("d/sub/x", b"x").file("top", b"t");
    })
}

#[test]
fn a_whiteout_hides_what_is_below_only() {
    let upper = layer(|l| {
        l.file("d/a", b"new").file("d/.wh.a", b"").file("d/.wh.sub", b"").file(".wh.nothing", b"");
    });
    assert_eq!(show(&[base(), upper]), ["/", "/d/", "/d/a = new", "/d/b = b", "/top = t"]);
}

#[test]
fn a_directory_made_anew_in_the_layer_that_whites_it_out_is_empty() {
    let upper = layer(|l| {
        l.file(".wh.d", b"").dir("d").file("d/n", b"n");
    });
    assert_eq!(show(&[base(), upper]), ["/", "/d/", "/d/n = n", "/top = t"]);
}

#[test]
fn an_opaque_mark_hides_what_is_below_wherever_it_stands() {
    let upper = layer(|l| {
        l.file("d/n", b"n").file("d/.wh..wh..opq", b"").file("d/sub/y", b"y");
    });
    assert_eq!(show(&[base(), upper]), ["/", "/d/", "/d/n = n", "/d/sub/", "/d/sub/y = y", "/top = t"]);
}

#[test]
fn an_opaque_root_hides_nothing() {
    let upper = layer(|l| {
        l.file(".wh..wh..opq", b"").file("n", b"n");
    });
    assert_eq!(show(&[base(), upper]).len(), 8);
}

#[test]
fn whiteouts_in_missing_directories_leave_the_directory() {
    let only = layer(|l| {
        l.file("no/.wh.x", b"").file("gone/.wh..wh..opq", b"");
    });
    assert_eq!(show(&[only]), ["/", "/gone/", "/no/"]);
}

#[test]
fn aufs_metadata_is_hidden() {
    let only = layer(|l| {
        l.dir(".wh..wh.plnk").file(".wh..wh.aufs", b"").dir("d").dir("d/.wh..wh.orph").file("f", b"f");
    });
    assert_eq!(show(&[only]), ["/", "/d/", "/f = f"]);
}

#[test]
fn whiteouts_of_no_name_are_refused() {
    for bad in [".wh.", ".wh..", "d/.wh..."] {
        let message = refused(&[layer(|l| {
            l.file(bad, b"");
        })]);
        assert!(message.contains(bad) && message.contains("layer 1 (sha256:test)"), "{message}");
    }
}

#[test]
fn character_device_0_0_is_a_whiteout() {
    let upper = layer(|l| {
        l.file("d/a", b"new")
            .add(Item::new("d/a", EntryKind::CharDevice))
            .add(Item::new("top", EntryKind::CharDevice));
    });
    assert_eq!(show(&[base(), upper]), ["/", "/d/", "/d/b = b", "/d/sub/", "/d/sub/x = x"]);
}

#[test]
fn types_change_over_layers() {
    let upper = layer(|l| {
        l.file("d", b"now a file").dir("top").file("top/in", b"i");
    });
    let third = layer(|l| {
        l.symlink("top", "d").file("d/again", b"dir");
    });
    assert_eq!(
        show(&[base(), upper.clone()]),
        ["/", "/d = now a file", "/top -> x", "/top/", "/top/in = i"]
            .into_iter()
            .filter(|s| !s.contains("->"))
            .collect::<Vec<_>>()
    );
    assert_eq!(show(&[base(), upper, third]), ["/", "/d/", "/d/again = dir", "/top -> d"]);
}

#[test]
fn directories_keep_children_and_take_the_last_attributes() {
    let upper = layer(|l| {
        l.add(Item::new("d", EntryKind::Directory).mode(0o700).owner(3, 4).time(7, 8));
        l.add(Item::new("d", EntryKind::Directory).mode(0o711).owner(5, 6).time(9, 10));
    });
    let implicit = layer(|l| {
        l.file("d/sub/new/n", b"n");
    });
    let view = merge(&[base(), upper, implicit]).expect("merges");
    let d = view.lookup(0, b"d").expect("d");
    let inode = view.inode(d);
    assert_eq!((inode.mode, inode.uid, inode.gid, inode.mtime.secs, inode.mtime.nanos), (0o711, 5, 6, 9, 10));
    assert_eq!((inode.nlink, view.children(d).len()), (3, 3));
    let sub = view.lookup(d, b"sub").expect("sub");
    let new = view.inode(view.lookup(sub, b"new").expect("new"));
    assert_eq!((new.mode, new.uid, new.gid, new.mtime.secs), (0o755, 0, 0, 0));
    assert_eq!(view.parent(sub), d);
}

#[test]
fn the_root_is_always_0755_root() {
    let l = layer(|l| {
        l.add(Item::new("", EntryKind::Directory).mode(0o700).owner(1, 2).time(5, 6)).file("", b"no name");
    });
    let view = merge(&[l]).expect("merges");
    let root = view.inode(0);
    assert_eq!((root.mode, root.uid, root.gid, root.mtime.secs, root.nlink), (0o755, 0, 0, 5, 2));
}

#[test]
fn symlinks_of_lower_layers_give_way_to_directories() {
    let lower = layer(|l| {
        l.dir("usr").dir("usr/lib").file("usr/lib/c", b"c").symlink("lib", "usr/lib");
    });
    let upper = layer(|l| {
        l.file("lib/foo", b"foo");
    });
    assert_eq!(
        show(&[lower, upper]),
        ["/", "/lib/", "/lib/foo = foo", "/usr/", "/usr/lib/", "/usr/lib/c = c"]
    );
}

#[test]
fn symlinks_of_the_same_layer_lead_inside_the_root() {
    let only = layer(|l| {
        l.dir("usr").dir("usr/lib").symlink("lib", "/usr/lib").file("lib/foo", b"foo");
        l.symlink("up", "../../../../etc").file("up/evil", b"evil");
    });
    assert_eq!(
        show(&[only]),
        [
            "/",
            "/etc/",
            "/etc/evil = evil",
            "/lib -> /usr/lib",
            "/up -> ../../../../etc",
            "/usr/",
            "/usr/lib/",
            "/usr/lib/foo = foo"
        ]
    );
    let through_itself = layer(|l| {
        l.symlink("s", ".").file("s/s", b"instead").file("s/y", b"y");
    });
    assert_eq!(show(&[through_itself]), ["/", "/s/", "/s/y = y"]);
    let l = refused(&[layer(|l| {
        l.symlink("a", "b").symlink("b", "a").file("a/x", b"");
    })]);
    assert!(l.contains("loop"), "{l}");
}

#[test]
fn long_detours_by_symlinks_end() {
    let l = refused(&[layer(|l| {
        l.dir("d").symlink("s0", vec!["./"; 2000].concat());
        for i in 1..200 {
            l.symlink(format!("s{i}"), [&vec!["./"; 2000].concat(), &*format!("s{}", i - 1)].concat());
        }
        for i in 0..1000 {
            l.file(format!("s199/{i}"), b"").file(format!("d/{i}"), b"");
        }
    })]);
    assert!(l.contains("too many"), "{l}");
}

#[test]
fn hard_links_share_an_inode() {
    let lower = layer(|l| {
        l.file("f", b"f").hardlink("g", "f").symlink("s", "f").hardlink("sl", "s");
    });
    let upper = layer(|l| {
        l.hardlink("h", "g").file("f", b"other").symlink("dir", "/").hardlink("i", "dir/g");
    });
    let view = merge(&[lower, upper]).expect("merges");
    let at = |name: &str| view.lookup(0, name.as_bytes()).expect("name");
    assert_eq!((at("g"), at("g")), (at("h"), at("i")));
    assert_ne!(at("f"), at("g"));
    assert_eq!(view.inode(at("g")).nlink, 3);
    assert_eq!(at("s"), at("sl"));
    assert_eq!(&*view.inode(at("s")).target, b"f");
}

#[test]
fn hard_links_to_nothing_or_directories_are_refused() {
    for build in [
        &(|l: &mut TestLayer| _ = l.hardlink("bad", "later").file("later", b"")) as &dyn Fn(&mut TestLayer),
        &|l| _ = l.hardlink("bad", "d"),
        &|l| _ = l.hardlink("bad", ""),
        &|l| _ = l.file(".wh.top", b"").hardlink("bad", "top"),
        &|l| _ = l.file("d/.wh..wh..opq", b"").hardlink("bad", "d/a"),
        &|l| _ = l.file("d", b"").hardlink("bad", "d/a"),
    ] {
        let message = refused(&[base(), layer(build)]);
        assert!(message.contains("'bad' of layer 2"), "{message}");
    }
}

#[test]
fn bad_extents_are_refused() {
    for extents in
        [vec![(0, 0, 11)], vec![(5, 0, 5), (0, 5, 5)], vec![(u64::MAX, 0, 2)], vec![(0, u64::MAX, 2)]]
    {
        let l = layer(|l| {
            let mut item = Item::new("f", EntryKind::File);
            item.size = 10;
            item.extents = extents
                .iter()
                .map(|&(file_offset, layer_offset, len)| Extent { file_offset, layer_offset, len })
                .collect();
            l.add(item);
        });
        assert!(matches!(merge(&[l]), Err(ViewError::BadExtents(..))), "{extents:?}");
    }
}

#[test]
fn attributes_that_cannot_be_set_are_left_out() {
    let l = layer(|l| {
        l.add(Item::new("s", EntryKind::Symlink).link("f").xattr("user.a", b"v").xattr("security.b", b"w"));
        l.add(
            Item::new("f", EntryKind::File).xattr("user.b", b"1").xattr("user.a", b"1").xattr("user.a", b"2"),
        );
        l.add(Item::new("p", EntryKind::Fifo).xattr("btrfs.x", b"v").xattr("user.", b"v"));
        l.add(Item::new("q", EntryKind::File).xattr("system.posix_acl_access", b"nonsense"));
    });
    let view = merge(&[l]).expect("merges");
    let names = |name: &str| -> Vec<String> {
        let ino = view.lookup(0, name.as_bytes()).expect("name");
        view.inode(ino)
            .xattrs
            .iter()
            .map(|x| format!("{}={}", tree::escape(&x.name), tree::escape(&x.value)))
            .collect()
    };
    assert_eq!(names("s"), ["security.b=w"]);
    assert_eq!(names("f"), ["user.a=2", "user.b=1"]);
    assert!(names("p").is_empty() && names("q").is_empty());
}

#[test]
fn deep_paths_and_many_links_do_not_overflow_the_stack() {
    let l = layer(|l| {
        l.file(vec!["a"; 2048].join("/"), b"deep");
    });
    assert_eq!(merge(&[l]).expect("merges").len(), 2049);
}
