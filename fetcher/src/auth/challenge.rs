//! `WWW-Authenticate` challenges (RFC 9110 section 11.6.1).

use std::collections::HashMap;

/// Longest header value that is looked at; registries send a few hundred bytes.
const MAX_HEADER: usize = 8192;

/// What a registry wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User name and password.
    Basic,
    /// A token from `realm`.
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// Finds the challenges in the values of all `WWW-Authenticate` headers; unknown schemes are left out.
pub(crate) fn parse<'a>(values: impl Iterator<Item = &'a str>) -> Vec<Challenge> {
    let mut found = Vec::new();
    for value in values.filter(|v| v.len() <= MAX_HEADER) {
        for (scheme, mut params) in split_schemes(value) {
            if scheme.eq_ignore_ascii_case("basic") {
                found.push(Challenge::Basic);
            } else if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = params.remove("realm")
            {
                found.push(Challenge::Bearer {
                    realm,
                    service: params.remove("service"),
                    scope: params.remove("scope"),
                });
            }
        }
    }
    found
}

/// Cuts `Bearer realm="x",scope="a,b", Basic realm="y"` into schemes with their parameters.
fn split_schemes(value: &str) -> Vec<(String, HashMap<String, String>)> {
    let mut schemes: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        if word.is_empty() {
            return schemes;
        }
        let tail = tail.trim_start_matches([' ', '\t']);
        match (tail.strip_prefix('='), schemes.last_mut()) {
            (Some(after), Some((_, params))) => {
                let (text, next) = take_value(after.trim_start_matches([' ', '\t']));
                params.entry(word.to_ascii_lowercase()).or_insert(text);
                rest = next;
            }
            // A parameter before any scheme: skip it.
            (Some(after), None) => rest = take_value(after).1,
            (None, _) => {
                schemes.push((word.to_owned(), HashMap::new()));
                rest = tail;
            }
        }
    }
}

/// A token or quoted string at the start of `text`, and what follows it.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut out = String::new();
    let mut escaped = false;
    for (i, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                out.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (out, &quoted[i + 1..]),
            _ => out.push(c),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(value: &str) -> Vec<Challenge> {
        parse(std::iter::once(value))
    }

    #[test]
    fn reads_dockers_challenge() {
        let value = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            one(value),
            [Challenge::Bearer {
                realm: "https://auth.docker.io/token".into(),
                service: Some("registry.docker.io".into()),
                scope: Some("repository:a/b:pull,push".into()),
            }]
        );
    }

    #[test]
    fn reads_several_schemes_and_odd_spacing() {
        let value = r#"Negotiate, basic realm="a\"b" , BEARER realm = x ,scope="""#;
        assert_eq!(
            one(value),
            [
                Challenge::Basic,
                Challenge::Bearer { realm: "x".into(), service: None, scope: Some(String::new()) }
            ]
        );
    }

    #[test]
    fn survives_nonsense() {
        for value in
            ["", ",,,", "=", "a=b", "Bearer", "Bearer realm", "Bearer realm=\"x", "\"", "Bearer é=\"\\"]
        {
            let _ = one(value);
        }
        assert_eq!(one("Bearer service=x"), []);
        let huge = format!("Basic realm=\"{}\"", "x".repeat(MAX_HEADER));
        assert_eq!(one(&huge), []);
    }
}
