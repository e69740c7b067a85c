//! The differ, by which commits of containers need not fetch the image.

use std::path::Path;

use toml::Value;

use super::{ContainerdConfig, Rows, Version, proxy};

/// The first containerd that takes a differ from a socket.
const SINCE: Version = Version(1, 7, 4);
const SERVICE: [&str; 3] = ["plugins", "io.containerd.service.v1.diff-service", "default"];
/// How images are unpacked by the transfer service.
pub(super) const UNPACK: [&str; 3] = ["plugins", "io.containerd.transfer.v1.local", "unpack_config"];

pub(super) fn check(
    config: &ContainerdConfig,
    running: Option<Version>,
    address: &Path,
    snapshotter: &str,
    rows: &mut Rows,
) {
    let what = "differ for commits";
    let differs = proxy::of_type(config, "diff");
    let Some(differ) = differs.iter().find(|differ| Path::new(differ.address) == address) else {
        if let Some(differ) = differs.iter().find(|differ| differ.name.contains("lazyrun")) {
            rows.error(
                what,
                format!("proxy plugin {} has the address {:?}", differ.name, differ.address),
                format!("set address = \"{}\" there and restart containerd", address.display()),
            );
        } else {
            rows.ok(
                what,
                "not set up: commits work, but fetch the whole image (docs/OPERATIONS.md, Commits)",
            );
        }
        return;
    };
    let name = differ.name;
    if running.is_some_and(|version| version < SINCE) {
        rows.error(
            what,
            format!("proxy plugin {name} is a differ, with which containerd before 1.7.4 does not start"),
            format!("remove [proxy_plugins.{name}], or update containerd"),
        );
        return;
    }
    let default = config.get(&SERVICE).and_then(Value::as_array);
    let default: Vec<&str> = default.into_iter().flatten().filter_map(Value::as_str).collect();
    let todo = format!("set default = [\"{name}\", \"walking\"] in [plugins.\"{}\"]", SERVICE[1]);
    match (default.iter().position(|d| *d == name), default.iter().position(|d| *d == "walking")) {
        (None, _) => rows.warning(what, format!("nobody asks the proxy plugin {name}"), todo),
        (Some(_), None) => rows.error(
            what,
            "nothing comes after it: what it leaves to others, such as unpacking, fails",
            todo,
        ),
        (Some(ours), Some(walking)) if ours > walking => {
            rows.warning(what, "`walking` comes first, so that it is never asked", todo);
        }
        _ => rows.ok(what, format!("proxy plugin {name} is asked first")),
    }
    for unpack in unpacks(config, snapshotter) {
        if unpack.get("differ").and_then(Value::as_str) != Some("walking") {
            rows.warning(
                what,
                format!(
                    "the transfer service may take it for unpacking images for {snapshotter}, which it can't"
                ),
                format!("set differ = \"walking\" in that [[plugins.'{}'.unpack_config]]", UNPACK[1]),
            );
        }
    }
}

/// The transfer service's settings for a snapshotter.
pub(super) fn unpacks<'a>(
    config: &'a ContainerdConfig,
    snapshotter: &str,
) -> impl Iterator<Item = &'a toml::Table> {
    let list = config.get(&UNPACK).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_table)
        .filter(move |unpack| unpack.get("snapshotter").and_then(Value::as_str) == Some(snapshotter))
}
