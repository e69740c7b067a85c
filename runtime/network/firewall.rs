//! Our nftables table: always written whole, in one transaction, by one `nft` process.
//!
//! The table is a pure function of the instance's state, so there are no rule handles to remember and a table
//! that somebody damaged is repaired by the next container that comes. Connections that are under way live
//! in the kernel's connection tracking and do not notice.

use std::io;
use std::net::Ipv4Addr;

use nftables::helper::{self, NftablesError};
use serde_json::{Map, Value, json};

use super::error::NetworkError;
use super::ipam::Subnet;
use super::ports::PortMapping;

/// Where nft is looked for when `PATH` (a daemon's may be short) does not have it.
const NFT_ELSEWHERE: [&str; 2] = ["/usr/sbin/nft", "/sbin/nft"];

/// A published port and the container it leads to.
pub(super) type Published = (Ipv4Addr, PortMapping);

/// Loads the table, replacing what was there. `program` is `nft` except in tests.
pub(super) fn load(program: &str, table: &str, ruleset: &Value) -> Result<(), NetworkError> {
    let payload = ruleset.to_string();
    let mut result = run(program, &payload);
    if program == "nft" {
        for other in NFT_ELSEWHERE {
            if !is_missing(&result) {
                break;
            }
            result = run(other, &payload);
        }
    }
    match result {
        Ok(_) => Ok(()),
        Err(e) if is_missing_error(&e) => Err(NetworkError::NftMissing),
        Err(NftablesError::NftFailed { stderr, stdout, .. }) => {
            let said = if stderr.trim().is_empty() { stdout } else { stderr };
            let message = said.lines().find(|l| !l.trim().is_empty()).unwrap_or("no reason given").to_owned();
            Err(NetworkError::Nft { table: table.to_owned(), message })
        }
        Err(e) => Err(NetworkError::Nft { table: table.to_owned(), message: e.to_string() }),
    }
}

fn run(program: &str, payload: &str) -> Result<String, NftablesError> {
    helper::apply_ruleset_raw(payload, Some(program), helper::DEFAULT_ARGS)
}

fn is_missing(result: &Result<String, NftablesError>) -> bool {
    matches!(result, Err(e) if is_missing_error(e))
}

fn is_missing_error(error: &NftablesError) -> bool {
    matches!(error, NftablesError::NftExecution { inner, .. } if inner.kind() == io::ErrorKind::NotFound)
}

/// The whole table as nft's JSON (libnftables-json(5)).
pub(super) fn ruleset(table: &str, bridge: &str, subnet: Subnet, published: &[Published]) -> Value {
    let whole = json!({"family": "ip", "name": table});
    let mut t = Commands { table, list: Vec::new() };
    // Adding first makes the deletion succeed whether or not the table was there.
    t.list.push(json!({"add": {"table": whole}}));
    t.list.push(json!({"delete": {"table": whole}}));
    t.list.push(json!({"add": {"table": whole}}));

    t.base_chain("raw", "filter", "prerouting", -300);
    t.base_chain("prerouting", "nat", "prerouting", -100);
    t.base_chain("output", "nat", "output", -100);
    t.base_chain("postrouting", "nat", "postrouting", 100);
    t.base_chain("forward", "filter", "forward", 0);
    t.list.push(json!({"add": {"chain": {"family": "ip", "table": table, "name": "publish"}}}));

    let loopback = prefix(Ipv4Addr::new(127, 0, 0, 0), 8);
    let inside = prefix(subnet.network(), subnet.prefix());
    let local = eq(json!({"fib": {"result": "type", "flags": ["daddr"]}}), json!("local"));
    let publish = json!({"jump": {"target": "publish"}});
    let accept = json!({"accept": null});
    let drop = json!({"drop": null});
    let masquerade = json!({"masquerade": null});
    let to_bridge = eq(meta("oifname"), json!(bridge));
    let from_bridge = eq(meta("iifname"), json!(bridge));
    let dnatted = is_in(json!({"ct": {"key": "status"}}), json!("dnat"));

    // route_localnet on the bridge must not let a container's raw socket reach the host's 127.0.0.1
    // (CVE-2020-8558). Replies to the host's own connections still carry the gateway's address here.
    t.rule("raw", vec![from_bridge.clone(), eq(ip("daddr"), loopback.clone()), drop.clone()]);
    // From the wire 127.0.0.0/8 is nobody's address, also when a port is published on it.
    t.rule("prerouting", vec![ne(ip("daddr"), loopback.clone()), local.clone(), publish.clone()]);
    t.rule("output", vec![local, publish]);

    t.rule(
        "postrouting",
        vec![eq(ip("saddr"), inside.clone()), ne(meta("oifname"), json!(bridge)), masquerade.clone()],
    );
    // 127.0.0.1:PORT on the host: the container must see a source it can answer to.
    t.rule("postrouting", vec![eq(ip("saddr"), loopback), to_bridge.clone(), masquerade.clone()]);
    // Hairpin: a container that goes to a published port must get its answer through us, not directly.
    t.rule("postrouting", vec![eq(ip("saddr"), inside), to_bridge.clone(), dnatted.clone(), masquerade]);

    t.rule("forward", vec![from_bridge.clone(), accept.clone()]);
    let reply = is_in(json!({"ct": {"key": "state"}}), json!(["established", "related"]));
    t.rule("forward", vec![to_bridge.clone(), reply, accept.clone()]);
    t.rule("forward", vec![to_bridge.clone(), dnatted, accept]);
    // What is not published is not reachable from the network, even for a neighbour who adds a route to us.
    t.rule("forward", vec![to_bridge, drop]);

    for (container, port) in published {
        let mut rule = Vec::new();
        if let Some(host_ip) = port.host_ip {
            rule.push(eq(ip("daddr"), json!(host_ip.to_string())));
        }
        rule.push(eq(payload(port.proto.name(), "dport"), json!(port.host_port)));
        rule.push(json!({"dnat": {"addr": container.to_string(), "port": port.container_port}}));
        t.rule("publish", rule);
    }
    json!({"nftables": t.list})
}

struct Commands<'a> {
    table: &'a str,
    list: Vec<Value>,
}

impl Commands<'_> {
    fn base_chain(&mut self, name: &str, kind: &str, hook: &str, priority: i32) {
        self.list.push(json!({"add": {"chain": {
            "family": "ip", "table": self.table, "name": name,
            "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }}}));
    }

    fn rule(&mut self, chain: &str, expr: Vec<Value>) {
        let expr = Value::Array(expr);
        self.list.push(json!({"add": {"rule": {
            "family": "ip", "table": self.table, "chain": chain, "expr": expr,
        }}}));
    }
}

fn matches_op(op: &str, left: Value, right: Value) -> Value {
    let parts = [("op".to_owned(), op.into()), ("left".to_owned(), left), ("right".to_owned(), right)];
    let parts: Map<String, Value> = parts.into_iter().collect();
    json!({"match": parts})
}

fn eq(left: Value, right: Value) -> Value {
    matches_op("==", left, right)
}

fn ne(left: Value, right: Value) -> Value {
    matches_op("!=", left, right)
}

fn is_in(left: Value, right: Value) -> Value {
    matches_op("in", left, right)
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn ip(field: &str) -> Value {
    payload("ip", field)
}

fn prefix(address: Ipv4Addr, length: u8) -> Value {
    json!({"prefix": {"addr": address.to_string(), "len": length}})
}
