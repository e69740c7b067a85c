//! Which images a pattern such as `*.registry.io:8080/path` is for, as the kubelet reads them.

/// Whether an image's name (`host[:port]/path`) matches: hosts part by part, equal ports, and the pattern's path in front
/// of the image's.
pub(super) fn matches(pattern: &str, image: &str) -> bool {
    let (host, port, path) = split(pattern);
    let (image_host, image_port, image_path) = split(image);
    let parts: Vec<&str> = host.split('.').collect();
    let image_parts: Vec<&str> = image_host.split('.').collect();
    port == image_port
        && parts.len() == image_parts.len()
        && image_path.starts_with(path)
        && parts.iter().zip(&image_parts).all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
}

/// Host, port and path of a name that may be written as a URL.
fn split(name: &str) -> (&str, &str, &str) {
    let name = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    let (place, path) = name.find('/').map_or((name, ""), |at| name.split_at(at));
    match place.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port, path),
        _ => (place, "", path),
    }
}

/// `*` stands for any number of signs, `?` for one.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where the last star was, and how much of the text it stands for.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, t) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_kubelet_matches() {
        for (pattern, image) in [
            ("registry.io", "registry.io/a/b"),
            ("https://registry.io", "registry.io/a"),
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com/app"),
            ("app*.k8s.io", "app1.k8s.io/x"),
            ("k8s.*.io", "k8s.x.io/y"),
            ("registry.io:8080/path", "registry.io:8080/path/x"),
            ("*.*.registry.io", "a.b.registry.io/x"),
            ("a?.io", "ab.io/x"),
        ] {
            assert!(matches(pattern, image), "{pattern} {image}");
        }
        for (pattern, image) in [
            ("*.io", "a.b.io/x"),
            ("*.registry.io", "registry.io/x"),
            ("registry.io", "registry.io:5000/x"),
            ("registry.io:5000", "registry.io/x"),
            ("registry.io/path", "registry.io/other"),
            ("registry.io", "evil-registry.io/x"),
            ("registry.io", "registry.io.evil/x"),
            ("", "registry.io/x"),
            ("*", "registry.io/x"),
        ] {
            assert!(!matches(pattern, image), "{pattern} {image}");
        }
    }

    #[test]
    fn stars_try_all_lengths() {
        for (pattern, text, is) in [("a*b*c", "aXbXbc", true), ("a*bc", "abbd", false), ("**", "", true)] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), is, "{pattern} {text}");
        }
    }
}
