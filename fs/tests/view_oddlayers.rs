//! Every case of the odd and hostile layers: indexed, merged, and compared with what containerd, umoci or GNU
//! tar make of it.

use crate::common::oddlayers::{self, Case};
use crate::common::tree;
use lazyrun_fs::view::View;
use lazyrun_index::LayerIndex;

/// Cases in which real tools disagree and we refuse. docs/SEMANTICS.md says why.
const REFUSED: &[&str] = &[
    "bad-gz-crc",
    "hl-to-whiteouted",
    "long-deep-4k",
    "names-nul",
    "path-dotdot",
    "path-empty",
    "wh-weird-names",
];
/// Cases in which we differ from the recorded tree on purpose.
const OWN: &[&str] = &["times-neg", "xattr-libarchive"];

fn judge(case: &Case) -> Result<(), String> {
    let outcome = oddlayers::index(case).and_then(|layers| {
        let indexes: Vec<&LayerIndex> = layers.indexes.iter().collect();
        let view = View::merge(&indexes).map_err(|e| e.to_string())?;
        Ok((view, layers.files))
    });
    let refused_on_purpose = REFUSED.contains(&case.tag.as_str());
    match (case.expect.as_str(), outcome) {
        ("reject", Err(_)) => Ok(()),
        ("reject", Ok(_)) => Err("accepted".to_owned()),
        ("either", Err(_)) if refused_on_purpose => Ok(()),
        ("either", Ok(_)) if refused_on_purpose => Err("accepted, but documented as refused".to_owned()),
        (_, Err(e)) => Err(format!("refused: {e}")),
        (_, Ok((view, files))) => match &case.expected {
            Some(expected) if !OWN.contains(&case.tag.as_str()) => {
                let differences = tree::compare(expected, &tree::of_view(&view, &files));
                if differences.is_empty() { Ok(()) } else { Err(format!("{differences:#?}")) }
            }
            _ => Ok(()),
        },
    }
}

#[test]
fn every_case_is_as_expected() {
    let cases = oddlayers::cases();
    assert!(cases.len() >= 91, "the collection is not whole");
    let mut failures = Vec::new();
    for case in &cases {
        if let Err(why) = judge(case) {
            failures.push(format!("{}: {why}", case.tag));
        }
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
