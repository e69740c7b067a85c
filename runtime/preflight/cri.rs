//! What Kubernetes' side of containerd (CRI) does with the snapshotter.

use toml::Value;

use super::{ContainerdConfig, Rows, Version, diff};

const WHAT: &str = "Kubernetes (CRI)";
/// The first containerd in which runtimes may have snapshotters of their own.
const PER_RUNTIME: Version = Version(1, 7, 0);
/// The one section of containerd 1, which containerd 2 reads too.
const OLD: &str = "io.containerd.grpc.v1.cri";
const IMAGES: &str = "io.containerd.cri.v1.images";
const RUNTIME: &str = "io.containerd.cri.v1.runtime";

/// A setting of images, wherever this version of the format has it.
fn image_setting<'a>(config: &'a ContainerdConfig, key: &str) -> Option<&'a Value> {
    let new = || config.get(&["plugins", IMAGES, key]);
    let old = || config.get(&["plugins", OLD, "containerd", key]);
    if config.version() >= 3 { new().or_else(old) } else { old() }
}

/// The section's name as one writes it.
fn section(config: &ContainerdConfig) -> String {
    if config.version() >= 3 {
        format!("[plugins.'{IMAGES}']")
    } else {
        format!("[plugins.\"{OLD}\".containerd]")
    }
}

pub(super) fn check(config: &ContainerdConfig, running: Option<Version>, snapshotter: &str, rows: &mut Rows) {
    if config.disables(&[OLD, IMAGES, "cri"]) {
        rows.ok(WHAT, "the plugin is disabled: containerd serves no Kubernetes here");
        return;
    }
    let section = section(config);
    let chosen = image_setting(config, "snapshotter").and_then(Value::as_str).unwrap_or("overlayfs");
    let runtimes = runtimes(config);
    for (runtime, own) in &runtimes {
        if own == snapshotter && running.is_some_and(|version| version < PER_RUNTIME) {
            rows.warning(
                WHAT,
                format!("runtime {runtime} has snapshotter {own}, which containerd before 1.7 passes over"),
                format!(
                    "set snapshotter = \"{snapshotter}\" in {section} for all of them, or update containerd"
                ),
            );
        } else {
            rows.ok(WHAT, format!("pods of runtime {runtime} use snapshotter {own}"));
        }
    }
    let used = chosen == snapshotter || runtimes.iter().any(|(_, own)| own == snapshotter);
    if chosen == snapshotter {
        rows.ok(WHAT, format!("pods use snapshotter {chosen}"));
    } else if !used {
        rows.warning(
            WHAT,
            format!("pods use snapshotter {chosen}: only clients that name {snapshotter} start lazily"),
            format!("set snapshotter = \"{snapshotter}\" in {section}"),
        );
    }
    if used {
        check_annotations(config, snapshotter, &section, rows);
    }
    if image_setting(config, "discard_unpacked_layers").and_then(Value::as_bool) == Some(true) {
        rows.ok(
            WHAT,
            "discard_unpacked_layers: images that had to be unpacked can't be pushed or converted on this node",
        );
    }
}

fn check_annotations(config: &ContainerdConfig, snapshotter: &str, section: &str, rows: &mut Rows) {
    let disabled = image_setting(config, "disable_snapshot_annotations").and_then(Value::as_bool);
    if disabled == Some(false) {
        rows.ok(WHAT, "the snapshotter is told which image a layer belongs to");
        return;
    }
    // With annotations disabled, containerd 2.1 pulls by its transfer service, which may pass them all the same.
    let exports = ["proxy_plugins", snapshotter, "exports", "enable_remote_snapshot_annotations"];
    let local = config.get(&["plugins", IMAGES, "use_local_image_pull"]).and_then(Value::as_bool);
    if config.version() >= 3
        && local != Some(true)
        && config.text(&exports) == Some("true")
        && diff::unpacks(config, snapshotter).next().is_some()
    {
        rows.ok(
            WHAT,
            "the transfer service of containerd 2.1 tells the snapshotter which image a layer belongs to",
        );
        return;
    }
    let is = if disabled.is_none() { "is true unless it is set" } else { "is true" };
    rows.error(
        WHAT,
        format!(
            "disable_snapshot_annotations {is}: the snapshotter isn't told which image a layer belongs to, and \
             containerd downloads and unpacks every image"
        ),
        format!("set disable_snapshot_annotations = false in {section} and restart containerd"),
    );
}

/// Runtimes with a snapshotter of their own.
fn runtimes(config: &ContainerdConfig) -> Vec<(String, String)> {
    let of = |path: &[&str]| -> Vec<(String, String)> {
        let own = |(name, table): (&str, &toml::Table)| {
            let own = table.get("snapshotter")?.as_str().filter(|own| !own.is_empty())?;
            Some((name.to_owned(), own.to_owned()))
        };
        config.entries(path).filter_map(own).collect()
    };
    let mut found = of(&["plugins", OLD, "containerd", "runtimes"]);
    if config.version() >= 3 {
        found.extend(of(&["plugins", RUNTIME, "containerd", "runtimes"]));
        found.extend(of(&["plugins", IMAGES, "runtime_platforms"]));
        found.sort();
        found.dedup();
    }
    found
}
