//! containerd's diff service: what a container changes of a lazy image becomes a layer, and only that is read.
//!
//! containerd 1.6 knows no proxies of differs. These tests ask the service as containerd 1.7 would; the snapshots, the
//! content store, the leases and what unpacks the layers are containerd's own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lazyrun::demo::shaper::Shape;
use lazyrun::snapshotter::proto::services::diff::v1::{self as diff_api, diff_client::DiffClient};
use lazyrun::snapshotter::proto::services::snapshots::v1::{self as api, snapshots_client::SnapshotsClient};
use lazyrun::snapshotter::proto::types::{Descriptor, Mount};
use lazyrun_index::Digest;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::support::containerd::{Containerd, PROXY};
use crate::support::fixture::Fixture;
use crate::support::indexed::Indexed;
use crate::support::snapshotter::{Snapshotter, pull, try_pull};
use crate::support::tree::{Tree, assert_equal, scan};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A client of containerd and of the diff service.
struct Client<'a> {
    containerd: &'a Containerd,
    runtime: Runtime,
    channel: Channel,
    ours: Channel,
}

impl<'a> Client<'a> {
    fn connect(containerd: &'a Containerd, snapshotter: &Snapshotter) -> Client<'a> {
        let runtime = Runtime::new().expect("a runtime");
        let ours = Endpoint::from_shared(format!("unix://{}", snapshotter.socket().display()));
        let ours = runtime.block_on(ours.expect("an address").connect()).expect("connect to the snapshotter");
        let endpoint = Endpoint::from_shared(format!("unix://{}", containerd.socket().display()));
        let channel =
            runtime.block_on(endpoint.expect("an address").connect()).expect("connect to containerd");
        Client { containerd, runtime, channel, ours }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(120));
        let namespace = self.containerd.namespace().parse().expect("a header");
        request.metadata_mut().insert("containerd-namespace", namespace);
        request
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn mounts(&self, key: &str) -> Vec<Mount> {
        let request = self.request(api::MountsRequest { snapshotter: PROXY.into(), key: key.into() });
        let answer = self.runtime.block_on(self.snapshots().mounts(request));
        answer.expect("mounts").into_inner().mounts
    }

    fn prepare(&self, snapshotter: &str, key: &str, parent: &str) -> Vec<Mount> {
        let request = self.request(api::PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
            parent: parent.into(),
            labels: gc_root(),
        });
        let answer = self.runtime.block_on(self.snapshots().prepare(request));
        answer.expect("prepare").into_inner().mounts
    }

    fn view(&self, key: &str, parent: &str) -> Vec<Mount> {
        let request = self.request(api::ViewSnapshotRequest {
            snapshotter: PROXY.into(),
            key: key.into(),
            parent: parent.into(),
            labels: gc_root(),
        });
        self.runtime.block_on(self.snapshots().view(request)).expect("view").into_inner().mounts
    }

    fn diff(&self, left: &[Mount], right: &[Mount], media_type: &str) -> Result<Descriptor, Status> {
        let request = self.request(diff_api::DiffRequest {
            left: left.to_vec(),
            right: right.to_vec(),
            media_type: media_type.into(),
            labels: BTreeMap::from([("test/label".to_owned(), "kept".to_owned())]),
            ..Default::default()
        });
        let answer = self.runtime.block_on(DiffClient::new(self.ours.clone()).diff(request))?;
        Ok(answer.into_inner().diff.expect("a descriptor"))
    }

    fn apply(&self, diff: &Descriptor, mounts: &[Mount]) {
        let request = self.request(diff_api::ApplyRequest {
            diff: Some(diff.clone()),
            mounts: mounts.to_vec(),
            ..Default::default()
        });
        let answer = self.runtime.block_on(DiffClient::new(self.channel.clone()).apply(request));
        answer.expect("containerd unpacks the layer");
    }

    /// A blob, as containerd's content store has it.
    fn blob(&self, descriptor: &Descriptor) -> Vec<u8> {
        let output = self.containerd.ctr(["content", "get", &descriptor.digest]).output().expect("run ctr");
        assert_eq!(output.stdout.len() as i64, descriptor.size);
        assert_eq!(Digest::of(&output.stdout).to_string(), descriptor.digest);
        output.stdout
    }
}

/// What keeps a snapshot that nothing names from containerd's garbage collector.
fn gc_root() -> BTreeMap<String, String> {
    BTreeMap::from([("containerd.io/gc.root".to_owned(), "2026-01-01T00:00:00Z".to_owned())])
}

/// Mounts what containerd says as `mount -t` does, for as long as this lives.
struct Mounted<'a>(&'a Path);

impl Mounted<'_> {
    fn at<'a>(mounts: &[Mount], dir: &'a Path) -> Mounted<'a> {
        let [mount] = mounts else { panic!("{mounts:?}") };
        let options = mount.options.join(",");
        let mut command = Command::new("mount");
        match mount.r#type.as_str() {
            "bind" => command.args(["--rbind", &mount.source]).arg(dir),
            kind => command.args(["-t", kind, "-o", &options, &mount.source]).arg(dir),
        };
        let done = command.output().expect("run mount");
        assert!(done.status.success(), "{mounts:?}: {done:?}");
        Mounted(dir)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Every kind of change that a layer can say, without reading any of the big file.
fn change(root: &Path) {
    let at = |path: &str| root.join(path);
    fs::write(at("data/last"), "changed\n").unwrap();
    fs::remove_file(at("data/first")).unwrap();
    fs::remove_file(at("data/big.bin")).unwrap();
    // A directory by a file, a file by a directory, a directory by another one.
    fs::remove_dir_all(at("data/small")).unwrap();
    fs::write(at("data/small"), "a file now\n").unwrap();
    fs::remove_file(at("etc/group")).unwrap();
    fs::create_dir(at("etc/group")).unwrap();
    fs::write(at("etc/group/inside"), "x").unwrap();
    fs::remove_dir_all(at("var/opaque")).unwrap();
    fs::create_dir(at("var/opaque")).unwrap();
    fs::write(at("var/opaque/new"), "only this\n").unwrap();
    fs::set_permissions(at("bin"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::create_dir(at("made")).unwrap();
    fs::write(at("made/one"), "linked\n").unwrap();
    fs::hard_link(at("made/one"), at("made/two")).unwrap();
    symlink("../etc/passwd", at("made/symlink")).unwrap();
    symlink("x".repeat(300), at("made/long target")).unwrap();
    fs::write(at("made/setuid"), "#!/bin/sh\n").unwrap();
    std::os::unix::fs::chown(at("made/setuid"), Some(3_000_000), Some(1000)).unwrap();
    fs::set_permissions(at("made/setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    let deep = format!("made/{}/{}", "long".repeat(50), "näme".repeat(40));
    fs::create_dir_all(at(&deep)).unwrap();
    fs::write(at(&deep).join("file"), "deep\n").unwrap();
    let sparse = fs::File::create(at("made/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    sparse.write_all_at(b"middle", 300 << 20).unwrap();
    sparse.write_all_at(b"end", (1 << 30) - 3).unwrap();
    let mode = Mode::from_bits_truncate(0o640);
    mknod(&at("made/char"), SFlag::S_IFCHR, mode, makedev(7, 300)).unwrap();
    mknod(&at("made/block"), SFlag::S_IFBLK, mode, makedev(8, 1)).unwrap();
    mknod(&at("made/pipe"), SFlag::S_IFIFO, mode, 0).unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::setxattr(at(path), name, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set("made/one", "user.note", b"binary \0\xff");
    set("made", "user.dir", b"on a directory");
    // cap_net_raw, as `setcap` writes it; with two names, of which the second is unpacked after it.
    fs::write(at("made/capable"), "x").unwrap();
    fs::hard_link(at("made/capable"), at("made/capable-too")).unwrap();
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("made/capable", "security.capability", &capability);
    let old = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    fs::File::open(at("made/setuid")).unwrap().set_modified(old).unwrap();
}

/// The topmost layer's chainID of the fixture's image, which is its name among containerd's own snapshots.
fn top_of(containerd: &Containerd, snapshotter: &str) -> String {
    let listed = containerd.output(["snapshots", "--snapshotter", snapshotter, "ls"]);
    let rows: Vec<Vec<&str>> = listed.lines().skip(1).map(|l| l.split_whitespace().collect()).collect();
    let committed = rows.iter().filter(|row| row.last() == Some(&"Committed"));
    let top = committed.clone().find(|row| !committed.clone().any(|other| other.get(1) == row.first()));
    (*top.and_then(|row| row.first()).expect("a snapshot")).to_owned()
}

fn decoded(blob: &[u8], suffix: &str) -> Vec<u8> {
    let mut tar = Vec::new();
    match suffix {
        "+gzip" => flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut tar).map(drop),
        "+zstd" => zstd::stream::copy_decode(blob, &mut tar),
        _ => tar.write_all(blob),
    }
    .expect("decode the layer");
    tar
}

#[test]
fn a_commit_reads_only_what_changed() {
    let indexed = Indexed::behind(Shape::default());
    let (image, snapshotter) = (&indexed.image, Snapshotter::start());
    snapshotter.lazyrun.ok(&["hydrate", "--pause"]);
    let containerd = snapshotter.containerd_with_diffs();
    pull(&containerd, image);
    // A container makes some of the changes, this test those that need other programs than its image has.
    let script = "mkdir /work && echo by the container >/work/file && rm /etc/passwd && chmod 700 /home";
    containerd.run(["run", "--snapshotter", PROXY, image, "work", "sh", "-c", script]);
    let client = Client::connect(&containerd, &snapshotter);
    let dir = snapshotter.lazyrun.scratch("tree");
    let right = client.mounts("work");
    let changed: Tree = {
        let _mounted = Mounted::at(&right, &dir);
        change(&dir);
        scan(&dir.join("made"))
    };
    assert!(changed.len() > 14, "{}", changed.len());
    let left = client.view("below", &top_of(&containerd, PROXY));

    let before = indexed.shaper.traffic().bytes_down;
    let diffs = ["", "+gzip", "+zstd"].map(|suffix| {
        let media_type = format!("{LAYER}{suffix}");
        let diff = client.diff(&left, &right, &media_type).expect("a layer");
        assert_eq!(diff.media_type, media_type);
        let tar = decoded(&client.blob(&diff), suffix);
        assert!(tar.len() < 200_000, "holes are not written: {} bytes", tar.len());
        let labels = containerd.output(["content", "ls"]);
        let line = labels.lines().find(|line| line.starts_with(&diff.digest)).expect("it is in the list");
        let uncompressed = format!("containerd.io/uncompressed={}", Digest::of(&tar));
        assert!(line.contains(&uncompressed) && line.contains("test/label=kept"), "{line}");
        (diff, tar)
    });
    let fetched = indexed.shaper.traffic().bytes_down - before;
    assert_eq!(fetched, 0, "no byte of the image is read for a commit");
    assert!(diffs.iter().all(|(_, tar)| *tar == diffs[0].1), "one tar, compressed in three ways");
    // Unpacked by containerd on its own overlayfs, on the whole image, each of them gives the container's tree.
    let ours = {
        let _mounted = Mounted::at(&right, &dir);
        scan(&dir)
    };
    try_pull(&containerd, "overlayfs", image).expect("pull by overlayfs");
    let below = top_of(&containerd, "overlayfs");
    for (i, (diff, _)) in diffs.iter().enumerate() {
        let mounts = client.prepare("overlayfs", &format!("unpacked-{i}"), &below);
        client.apply(diff, &mounts);
        let _mounted = Mounted::at(&mounts, &dir);
        assert_equal(&ours, &scan(&dir));
    }
}

#[test]
fn what_is_no_change_of_ours_is_left_to_the_next_differ() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd_with_diffs());
    pull(&containerd, &image);
    let client = Client::connect(&containerd, &snapshotter);
    let top = top_of(&containerd, PROXY);
    let (left, right) = (client.view("below", &top), client.prepare(PROXY, "active", &top));
    let refused = |left: &[Mount], right: &[Mount], media_type: &str| {
        client.diff(left, right, media_type).err().map(|status| status.code())
    };
    assert_eq!(refused(&left, &right, LAYER), None);
    assert_eq!(refused(&right, &left, LAYER), Some(Code::Unimplemented), "the other way round");
    assert_eq!(refused(&left, &right, "application/x-odd"), Some(Code::Unimplemented));
    // Directories that only look like a snapshot's.
    let odd = |path: &str| {
        let mut mounts = right.clone();
        let upper = mounts[0].options.iter_mut().find(|o| o.starts_with("upperdir=")).expect("an upper");
        *upper = format!("upperdir={path}");
        mounts
    };
    let view = left[0].source.clone();
    for path in ["/etc", "/etc/../etc", &view, &view.replace("/fs", "/../../.."), "relative"] {
        assert_eq!(refused(&left, &odd(path), LAYER), Some(Code::Unimplemented), "{path}");
    }
    // What the directory alone does not say: a container cannot write this, a kernel with redirect_dir does.
    let upper = right[0].options.iter().find_map(|o| o.strip_prefix("upperdir=")).expect("an upper");
    let moved = Path::new(upper).join("moved");
    fs::create_dir(&moved).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&moved, "trusted.overlay.redirect", b"/data", flags).unwrap();
    assert_eq!(refused(&left, &right, LAYER), Some(Code::Unimplemented));
    let active = containerd.output(["content", "active"]);
    assert_eq!(active.lines().count(), 1, "no upload is left open: {active}");
    let leases = containerd.output(["leases", "ls", "-q"]);
    assert_eq!(
        leases.lines().filter(|id| id.starts_with("lazyrun-")).count(),
        1,
        "that of the layer: {leases}"
    );
}

#[test]
fn committed_snapshots_have_a_difference_too() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    let (image, containerd) = (fixture.image(), snapshotter.containerd_with_diffs());
    pull(&containerd, &image);
    let client = Client::connect(&containerd, &snapshotter);
    let dir = snapshotter.lazyrun.scratch("tree");
    let mut parent = top_of(&containerd, PROXY);
    for name in ["first", "second"] {
        let mounts = client.prepare(PROXY, "active", &parent);
        {
            let _mounted = Mounted::at(&mounts, &dir);
            fs::write(dir.join(name), name).unwrap();
        }
        containerd.run(["snapshots", "--snapshotter", PROXY, "commit", name, "active"]);
        parent = name.to_owned();
    }
    let (left, right) = (client.view("left", "first"), client.view("right", "second"));
    let diff = client.diff(&left, &right, &format!("{LAYER}+zstd")).expect("a layer");
    let tar = decoded(&client.blob(&diff), "+zstd");
    let mut archive = tar::Archive::new(tar.as_slice());
    let paths: Vec<_> = archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
    assert_eq!(paths, [Path::new("second")]);
}

#[test]
fn a_containerd_that_is_not_there_is_named() {
    let (fixture, snapshotter) = (Fixture::new(), Snapshotter::start());
    // Not the one that it was told of.
    let containerd = snapshotter.containerd();
    pull(&containerd, &fixture.image());
    let client = Client::connect(&containerd, &snapshotter);
    let top = top_of(&containerd, PROXY);
    let (left, right) = (client.view("below", &top), client.prepare(PROXY, "active", &top));
    let status = client.diff(&left, &right, LAYER).expect_err("no containerd");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("--containerd-address"), "{}", status.message());
}
