//! Device access rules, shared by the v1 devices controller and the v2 program.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// One rule; `None` numbers match any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    /// `a`, `b` or `c`.
    pub(super) kind: char,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) mknod: bool,
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Self {
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => 'b',
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => 'c',
            _ => 'a',
        };
        let access = rule.access().as_deref().filter(|a| !a.is_empty()).unwrap_or("rwm");
        let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
        Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major()),
            minor: number(rule.minor()),
            read: access.contains('r'),
            write: access.contains('w'),
            mknod: access.contains('m'),
        }
    }

    const fn allow(kind: char, major: Option<u32>, minor: Option<u32>, all: bool) -> Self {
        Self { allow: true, kind, major, minor, read: all, write: all, mknod: true }
    }

    /// The line that devices.allow and devices.deny take.
    pub(super) fn v1_line(&self) -> String {
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        let mut access = String::new();
        for (on, letter) in [(self.read, 'r'), (self.write, 'w'), (self.mknod, 'm')] {
            if on {
                access.push(letter);
            }
        }
        if self.kind == 'a' && self.major.is_none() && self.minor.is_none() {
            // "a" alone means everything; the kernel ignores numbers and access with it.
            return "a".to_owned();
        }
        format!("{} {}:{} {access}", self.kind, number(self.major), number(self.minor))
    }
}

/// Devices every container may use (the runtime spec's default devices, terminals), and making nodes of any.
const DEFAULTS: [Rule; 11] = [
    Rule::allow('c', None, None, false),
    Rule::allow('b', None, None, false),
    Rule::allow('c', Some(1), Some(3), true),
    Rule::allow('c', Some(1), Some(5), true),
    Rule::allow('c', Some(1), Some(7), true),
    Rule::allow('c', Some(1), Some(8), true),
    Rule::allow('c', Some(1), Some(9), true),
    Rule::allow('c', Some(5), Some(0), true),
    Rule::allow('c', Some(5), Some(1), true),
    Rule::allow('c', Some(5), Some(2), true),
    Rule::allow('c', Some(136), None, true),
];

/// The spec's rules, then the default ones, later rules winning. Nothing is added to "allow everything".
pub(super) fn with_defaults(rules: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let mut out: Vec<Rule> = rules.iter().map(Rule::of).collect();
    let open = |r: &Rule| r.allow && r.kind == 'a' && r.major.is_none() && r.minor.is_none();
    if !out.last().is_some_and(open) {
        out.extend(DEFAULTS);
    }
    out
}
