//! containerd's entry for the snapshotter.

use std::path::Path;

use toml::{Table, Value};

use super::{ContainerdConfig, Rows};

const WHAT: &str = "snapshotter in containerd";

/// A plugin that containerd reaches by a socket.
pub(super) struct Proxy<'a> {
    pub(super) name: &'a str,
    pub(super) address: &'a str,
    entry: &'a Table,
}

/// The proxy plugins of a type.
pub(super) fn of_type<'a>(config: &'a ContainerdConfig, kind: &str) -> Vec<Proxy<'a>> {
    let text = |entry: &'a Table, key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default();
    let entries = config.entries(&["proxy_plugins"]).filter(|(_, entry)| text(entry, "type") == kind);
    let proxy = |(name, entry)| {
        let address = text(entry, "address");
        Proxy { name, address: address.strip_prefix("unix://").unwrap_or(address), entry }
    };
    entries.map(proxy).collect()
}

/// Checks the entry and returns its name.
pub(super) fn check(config: &ContainerdConfig, address: &Path, root: &Path, rows: &mut Rows) -> String {
    let snapshotters = of_type(config, "snapshot");
    let here = snapshotters.iter().find(|proxy| Path::new(proxy.address) == address);
    let proxy = here.or_else(|| snapshotters.iter().find(|proxy| proxy.name == "lazyrun"));
    let shown = address.display();
    let Some(proxy) = proxy else {
        let other = config.text(&["proxy_plugins", "lazyrun", "type"]);
        let other =
            other.map_or_else(String::new, |kind| format!("; [proxy_plugins.lazyrun] has type {kind:?}"));
        rows.error(
            WHAT,
            format!("no proxy plugin of type \"snapshot\" has the address {shown}{other}"),
            format!(
                "add to {}: [proxy_plugins.lazyrun] with type = \"snapshot\" and address = \"{shown}\", and restart \
                 containerd",
                config.path().display()
            ),
        );
        return "lazyrun".to_owned();
    };
    let name = proxy.name;
    if here.is_none() {
        rows.error(
            WHAT,
            format!("proxy plugin {name} has the address {:?}, the snapshotter listens at {shown}", proxy.address),
            format!(
                "set address = \"{shown}\" in [proxy_plugins.{name}] and restart containerd, or say with --address where \
                 the snapshotter listens"
            ),
        );
    } else {
        rows.ok(WHAT, format!("proxy plugin {name} leads to {shown}"));
    }
    check_exports(config, proxy, root, rows);
    name.to_owned()
}

/// The root directory is of use to containerd's accounts only, but a wrong one is a mistake.
fn check_exports(config: &ContainerdConfig, proxy: &Proxy<'_>, root: &Path, rows: &mut Rows) {
    let exports = proxy.entry.get("exports").and_then(Value::as_table);
    let exported = exports.and_then(|exports| exports.get("root")).and_then(Value::as_str);
    let (name, shown) = (proxy.name, root.display());
    match exported {
        Some(exported) if Path::new(exported) != root => rows.warning(
            WHAT,
            format!("[proxy_plugins.{name}.exports] names the root {exported}, this one is {shown}"),
            format!("set root = \"{shown}\" there, or check with --root {exported}"),
        ),
        None if config.version() >= 3 => rows.warning(
            WHAT,
            format!("[proxy_plugins.{name}.exports] names no root: Kubernetes is told of a wrong disk"),
            format!("set root = \"{shown}\" there"),
        ),
        _ => {}
    }
}
