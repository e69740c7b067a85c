//! A strict reader of Prometheus' text format 0.0.4: what a lenient scraper would take is refused here.

use std::collections::{BTreeMap, BTreeSet};

type Labels = BTreeMap<String, String>;

/// Metrics that were read.
#[derive(Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<(String, Labels), f64>,
    families: BTreeMap<String, String>,
}

impl Metrics {
    /// Reads a scrape; panics with the line that is wrong.
    pub fn parse(text: &str) -> Metrics {
        assert!(text.ends_with('\n'), "the last line does not end");
        let mut metrics = Metrics::default();
        let mut family = (String::new(), String::new());
        let mut helped = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
                assert!(is_name(name) && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                let before = metrics.families.insert(name.to_owned(), kind.to_owned());
                assert!(before.is_none(), "a family comes twice: {line}");
                family = (name.to_owned(), kind.to_owned());
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
                assert!(name == family.0 && !help.is_empty() && helped.insert(name.to_owned()), "{line}");
            } else {
                assert!(!line.starts_with('#') && !line.trim().is_empty(), "an odd line: {line:?}");
                let (name, labels, value) = sample(line);
                let suffixes: &[&str] =
                    if family.1 == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                let of_family = suffixes.iter().any(|suffix| name == format!("{}{suffix}", family.0));
                assert!(of_family, "a sample away from its family {family:?}: {line}");
                assert!(family.1 == "gauge" || value >= 0.0, "{line}");
                assert_eq!(labels.contains_key("le"), name.ends_with("_bucket"), "{line}");
                assert!(metrics.samples.insert((name, labels), value).is_none(), "comes twice: {line}");
            }
        }
        assert!(metrics.families.keys().all(|name| helped.contains(name)), "families without help");
        metrics.check_histograms();
        metrics
    }

    fn check_histograms(&self) {
        for name in self.families.iter().filter(|(_, kind)| *kind == "histogram").map(|(name, _)| name) {
            let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
            for ((_, labels), value) in self.of(&format!("{name}_bucket")) {
                let mut rest = labels.clone();
                let bound = rest.remove("le").expect("a bound");
                series.entry(rest).or_default().push((number(&bound), *value));
            }
            for (labels, mut buckets) in series {
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                assert!(
                    buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1),
                    "{name} {labels:?}: {buckets:?}"
                );
                let get = |part: &str| self.samples.get(&(format!("{name}_{part}"), labels.clone()));
                let last = buckets.last().expect("buckets");
                assert_eq!((last.0, Some(&last.1)), (f64::INFINITY, get("count")), "{name} {labels:?}");
                assert!(get("sum").is_some(), "{name} {labels:?} has no sum");
            }
        }
    }

    fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a (String, Labels), &'a f64)> {
        self.samples.iter().filter(move |((own, _), _)| own == name)
    }

    /// The samples of this name that have all these labels, together. There must be one.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |own: &Labels| labels.iter().all(|(k, v)| own.get(*k).is_some_and(|own| own == v));
        let found: Vec<f64> =
            self.of(name).filter(|((_, own), _)| has(own)).map(|(_, value)| *value).collect();
        assert!(!found.is_empty(), "there is no {name} {labels:?} in {:#?}", self.samples);
        found.iter().sum()
    }

    /// All values of a label.
    pub fn values(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.of(name).filter_map(|((_, labels), _)| labels.get(label).cloned()).collect()
    }

    /// The names of all families.
    pub fn families(&self) -> BTreeSet<String> {
        self.families.keys().cloned().collect()
    }
}

fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    name.starts_with(|c: char| good(c) && !c.is_ascii_digit()) && name.chars().all(good)
}

fn number(text: &str) -> f64 {
    match text {
        "+Inf" => f64::INFINITY,
        text => text.parse().unwrap_or_else(|_| panic!("{text:?} is no number")),
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line}"));
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = Labels::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(is_name(label) && !label.contains(':'), "{line}");
            let (value, after) = quoted(after).unwrap_or_else(|| panic!("{line}"));
            assert!(labels.insert(label.to_owned(), value).is_none(), "a label comes twice: {line}");
            match after.split_at(1) {
                (",", after) => rest = after,
                ("}", after) => break rest = after,
                _ => panic!("{line}"),
            }
        }
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}"));
    (name.to_owned(), labels, number(value))
}

/// A value up to its closing quote, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let (mut value, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                c @ ('\\' | '"') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}
