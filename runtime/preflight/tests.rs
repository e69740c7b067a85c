//! Configurations of containerd as they are written, and what is to be said of them.

use super::*;

const ADDRESS: &str = "/run/lazyrun/snapshotter.sock";
const PROXY: &str =
    "[proxy_plugins.lazyrun]\ntype = \"snapshot\"\naddress = \"/run/lazyrun/snapshotter.sock\"\n";
const CRI2: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"lazyrun\"\n";
const SHOWN: &str = "disable_snapshot_annotations = false\n";

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Files(dir)
    }

    fn rows(&self, running: Option<Version>) -> Vec<Row> {
        let mut rows = Rows::default();
        if let Some(config) = read_config(&self.0.path().join("config.toml"), &mut rows) {
            check_config(&config, running, Path::new(ADDRESS), Path::new("/var/lib/lazyrun"), &mut rows);
            let hosts = lazyrun_fetcher::HostFiles {
                hosts_dirs: vec!["/etc/containerd/certs.d".into()],
                ..Default::default()
            };
            registries::check_config_path(&config, &hosts, &mut rows);
        }
        rows.0
    }
}

fn rows(text: &str, running: Option<Version>) -> Vec<Row> {
    Files::new(&[("config.toml", text)]).rows(running)
}

/// What was found to be worse than ok.
fn bad(rows: &[Row]) -> Vec<(Level, String)> {
    let bad = rows.iter().filter(|row| row.level != Level::Ok);
    bad.map(|row| (row.level, format!("{}: {} -> {}", row.what, row.why, row.todo))).collect()
}

/// The only complaint, which has these words.
fn only(text: &str, running: Option<Version>, level: Level, words: &[&str]) {
    let rows = rows(text, running);
    let bad = bad(&rows);
    assert!(bad.len() == 1 && bad[0].0 == level, "{rows:#?}");
    for word in words {
        assert!(bad[0].1.contains(word), "no {word:?} in {}", bad[0].1);
    }
}

#[test]
fn what_the_documents_show_is_right() {
    let two = format!("version = 2\n{PROXY}{CRI2}{SHOWN}");
    assert_eq!(bad(&rows(&two, Some(Version(1, 6, 20)))), []);
    let three = "version = 3\n\
        [proxy_plugins.lazyrun]\ntype = \"snapshot\"\naddress = \"/run/lazyrun/snapshotter.sock\"\n\
        [proxy_plugins.lazyrun.exports]\nroot = \"/var/lib/lazyrun\"\nenable_remote_snapshot_annotations = \"true\"\n\
        [plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"lazyrun\"\ndisable_snapshot_annotations = false\n\
        [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux/amd64\"\nsnapshotter = \"lazyrun\"\n";
    assert_eq!(bad(&rows(three, Some(Version(2, 1, 0)))), []);
    // The transfer service passes annotations too.
    let transfer = three.replace("disable_snapshot_annotations = false\n", "");
    assert_eq!(bad(&rows(&transfer, Some(Version(2, 1, 0)))), []);
    let neither = transfer.replace("\"true\"", "\"false\"");
    only(&neither, None, Level::Error, &["disable_snapshot_annotations", "io.containerd.cri.v1.images"]);
    only(three, Some(Version(1, 7, 0)), Level::Error, &["version 3", "2.0"]);
}

#[test]
fn a_wrong_entry_of_the_snapshotter() {
    let cri = format!("{CRI2}{SHOWN}");
    only(&format!("version = 2\n{cri}"), None, Level::Error, &["no proxy plugin", ADDRESS]);
    let typed = PROXY.replace("\"snapshot\"", "\"snapshots\"");
    only(&format!("version = 2\n{typed}{cri}"), None, Level::Error, &["has type \"snapshots\""]);
    let elsewhere = PROXY.replace("/run/lazyrun/", "/run/other/");
    only(&format!("version = 2\n{elsewhere}{cri}"), None, Level::Error, &["/run/other/", "--address"]);
    let exports = "[proxy_plugins.lazyrun.exports]\nroot = \"/data\"\n";
    only(&format!("version = 2\n{PROXY}{exports}{cri}"), None, Level::Warning, &["/data", "--root"]);
    // It may have any name.
    let named = PROXY.replace(".lazyrun]", ".lazy]");
    let cri = cri.replace("\"lazyrun\"", "\"lazy\"");
    assert_eq!(bad(&rows(&format!("version = 2\n{named}{cri}"), None)), []);
}

#[test]
fn kubernetes_without_annotations_is_an_error() {
    let unset = format!("version = 2\n{PROXY}{CRI2}");
    only(
        &unset,
        None,
        Level::Error,
        &["true unless it is set", "= false in [plugins.\"io.containerd.grpc.v1.cri\".containerd]"],
    );
    only(&format!("{unset}disable_snapshot_annotations = true\n"), None, Level::Error, &["is true"]);
    let other = format!("version = 2\n{PROXY}").replace("\"lazyrun\"", "\"overlayfs\"");
    only(&other, None, Level::Warning, &["overlayfs", "snapshotter = \"lazyrun\""]);
    let off = format!("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{PROXY}");
    assert_eq!(bad(&rows(&off, None)), []);
}

#[test]
fn a_runtime_may_have_its_own_snapshotter() {
    let section = "[plugins.\"io.containerd.grpc.v1.cri\".containerd";
    let runtime = format!("{section}]\n{SHOWN}{section}.runtimes.lazy]\nsnapshotter = \"lazyrun\"\n");
    let text = format!("version = 2\n{PROXY}{runtime}");
    assert_eq!(bad(&rows(&text, Some(Version(1, 7, 0)))), []);
    only(&text, Some(Version(1, 6, 20)), Level::Warning, &["runtime lazy", "1.7"]);
}

#[test]
fn the_differ_needs_its_containerd_and_its_place() {
    let differ = PROXY.replace(".lazyrun]", ".lazyrun-diff]").replace("\"snapshot\"", "\"diff\"");
    let base = format!("version = 2\n{PROXY}{differ}{CRI2}{SHOWN}");
    let service = |default: &str| {
        format!("{base}[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = {default}\n")
    };
    let right = service("[\"lazyrun-diff\", \"walking\"]");
    assert_eq!(bad(&rows(&right, Some(Version(1, 7, 4)))), []);
    only(&right, Some(Version(1, 6, 20)), Level::Error, &["does not start", "remove"]);
    only(&base, None, Level::Warning, &["nobody asks", "\"walking\""]);
    only(&service("[\"lazyrun-diff\"]"), None, Level::Error, &["nothing comes after it"]);
    only(&service("[\"walking\", \"lazyrun-diff\"]"), None, Level::Warning, &["never asked"]);
    let unpack = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = \"lazyrun\"\n";
    only(&format!("{right}{unpack}"), None, Level::Warning, &["differ = \"walking\""]);
    assert_eq!(bad(&rows(&format!("{right}{unpack}differ = \"walking\"\n"), None)), []);
}

#[test]
fn imports_are_merged_as_containerd_does() {
    let main = format!("version = 2\nimports = [\"conf.d/*.toml\", \"more.toml\"]\n{CRI2}{SHOWN}");
    let files = Files::new(&[
        ("config.toml", &main),
        ("conf.d/10-lazyrun.toml", &format!("version = 2\n{PROXY}")),
        ("conf.d/README", "not TOML"),
        ("more.toml", "imports = [\"config.toml\"]"),
    ]);
    let found = files.rows(None);
    assert_eq!(bad(&found), []);
    assert!(found[0].why.contains("2 imported"), "{found:#?}");

    // containerd 1 takes the later section of a plugin and forgets the earlier one.
    let runtime = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.x]\nruntime_type = \"y\"\n";
    let of = |version: &str, text: &str| {
        let main = text.replace("version = 2", version);
        let drop_in = format!("{version}\n{runtime}");
        Files::new(&[("config.toml", &main), ("conf.d/x.toml", &drop_in), ("more.toml", PROXY)]).rows(None)
    };
    let two = bad(&of("version = 2", &main));
    assert_eq!(two.len(), 2, "{two:#?}");
    assert!(two[0].1.contains("counts instead of") && two[1].1.contains("overlayfs"), "{two:#?}");
    let three = main.replace("grpc.v1.cri\".containerd", "cri.v1.images\"");
    let three = bad(&of("version = 3", &three));
    assert!(three.len() == 1 && three[0].1.contains("names no root"), "{three:#?}");
}

#[test]
fn broken_and_missing_files_are_told() {
    only("version = 2\nx = \n", None, Level::Error, &["config.toml, line 2"]);
    let files = Files::new(&[("config.toml", "version = 2\nimports = [\"none.toml\"]")]);
    assert!(bad(&files.rows(None))[0].1.contains("none.toml"));
    let none = bad(&Files::new(&[]).rows(None));
    assert!(none.len() == 1 && none[0].1.contains("does not exist"), "{none:?}");
    let one = rows(&format!("{PROXY}{CRI2}{SHOWN}"), None);
    assert!(bad(&one)[0].1.contains("version 1"), "{one:#?}");
}

#[test]
fn registries_that_containerd_reads_elsewhere() {
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d:/opt/certs\"\n\
               [plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r\".auth]\npassword = \"s3cret\"\n";
    let found = rows(&format!("version = 2\n{PROXY}{CRI2}{SHOWN}{cri}"), None);
    let bad = bad(&found);
    assert_eq!(bad.len(), 2, "{found:#?}");
    assert!(bad[0].1.contains("--hosts-dir /opt/certs") && bad[1].1.contains("registry.configs"));
    assert!(!format!("{found:?}").contains("s3cret"));
}
