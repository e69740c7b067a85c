//! What registries and docker's configuration say.

use lazyrun_fetcher::Reference;
use lazyrun_fetcher::fuzzing;

/// The first byte tells what the rest is: `m`anifest or list, `c`onfig, `h`eader with a challenge, `t`oken answer,
/// `r`eference, `d`ocker configuration, manifest of an `a`rtifact or list of descriptors.
pub fn oci(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    let said = match kind {
        b'm' => fuzzing::manifest(rest),
        b'c' => fuzzing::config(rest),
        b'h' => fuzzing::challenge(&String::from_utf8_lossy(rest)),
        b't' => fuzzing::token_answer(rest),
        b'r' => reference(&String::from_utf8_lossy(rest)),
        b'a' => fuzzing::artifact(rest),
        b'd' => fuzzing::docker_config(rest),
        _ => Vec::new(),
    };
    for text in said {
        let unfit = text.chars().find(|c| c.is_control());
        assert_eq!(unfit, None, "an error is one line without control characters: {text:?}");
        assert!(text.len() < 8192, "and of a bearable length: {} bytes", text.len());
    }
}

fn reference(text: &str) -> Vec<String> {
    let reference: Reference = match text.parse() {
        Ok(reference) => reference,
        Err(error) => return vec![format!("{error}")],
    };
    assert_eq!(reference.to_string().parse().as_ref(), Ok(&reference), "a reference survives its long form");
    assert_eq!(reference.familiar().parse().as_ref(), Ok(&reference), "and its familiar one");
    let parts: Vec<&str> = reference.repository.split('/').collect();
    assert!(parts.iter().all(|part| !part.is_empty() && *part != "." && *part != ".."), "{reference}");
    let odd = |c: char| !c.is_ascii_graphic() || "?#%@\\\"'<>".contains(c);
    assert!(!reference.name().contains(odd), "a name is fit for a URL: {reference:?}");
    assert!(!reference.registry.contains('/') && !reference.endpoint().is_empty());
    Vec::new()
}
