//! Names from archives: cleaned lexically, and refused when no directory could hold them.

/// Longest component (NAME_MAX).
const COMPONENT_MAX: usize = 255;
/// Longest path (PATH_MAX).
const PATH_MAX: usize = 4096;
/// Longest symbolic link target the kernel takes (PATH_MAX without its NUL).
pub(crate) const TARGET_MAX: usize = 4095;
const WHITEOUT: &[u8] = b".wh.";

/// `name` relative to the root: no leading `/` or `./`, no empty and no `.` components; the root itself is "".
///
/// The last component of a whiteout may be four bytes longer than a file name can be: it never becomes a file.
pub(crate) fn clean(name: &[u8]) -> Result<Vec<u8>, String> {
    let mut path = Vec::with_capacity(name.len().min(PATH_MAX));
    for component in name.split(|&c| c == b'/') {
        if component.is_empty() || component == b"." {
            continue;
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
        if path.len() > PATH_MAX {
            return Err(format!("the path is longer than {PATH_MAX} bytes"));
        }
    }
    check_components(&path).map(|()| path)
}

/// Whether `path` is what [`clean`] returns, without the cost of splitting most paths.
pub(crate) fn check_clean(path: &[u8]) -> Result<(), String> {
    let first = path.first().copied().unwrap_or(b'x');
    let edge = first == b'/' || first == b'.' || first == 0 || path.last() == Some(&b'/');
    if !edge && path.len() <= COMPONENT_MAX && !maybe_odd(path) {
        return Ok(());
    }
    if path.len() > PATH_MAX {
        return Err(format!("the path is longer than {PATH_MAX} bytes"));
    }
    if !path.is_empty() && path.split(|&c| c == b'/').any(|c| c.is_empty() || c == b".") {
        return Err("the path has an empty or a \".\" component".into());
    }
    check_components(path)
}

/// Whether `path` has a NUL, or a `/` before another `/` or a `.`. May say so wrongly, never miss one: an index of
/// 100,000 entries has to open in a millisecond or two, so this looks at eight bytes at a time.
fn maybe_odd(path: &[u8]) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let zero = |w: u64| w.wrapping_sub(ONES) & !w & (ONES << 7);
    let is = |w: u64, c: u8| zero(w ^ (ONES * u64::from(c)));
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk));
    let odd = |pair: &[u8]| {
        let (a, b) = (word(pair), word(&pair[1..]));
        zero(a) | zero(b) | (is(a, b'/') & (is(b, b'/') | is(b, b'.')))
    };
    let mut found = 0;
    match path.len() {
        0 => {}
        1..=8 => {
            // Padded with something harmless on its own and after any byte.
            let mut padded = [b'x'; 9];
            padded[..path.len()].copy_from_slice(path);
            found |= odd(&padded);
        }
        len => {
            let mut at = 0;
            while at + 9 < len {
                found |= odd(&path[at..at + 9]);
                at += 8;
            }
            found |= odd(&path[len - 9..]);
        }
    }
    found != 0
}

fn check_components(path: &[u8]) -> Result<(), String> {
    if path.contains(&0) {
        return Err("the name contains a NUL byte".into());
    }
    let mut components = path.split(|&c| c == b'/').peekable();
    while let Some(component) = components.next() {
        let last = components.peek().is_none();
        if component == b".." {
            return Err("the name contains \"..\"".into());
        }
        let whiteout = last && component.starts_with(WHITEOUT);
        if component.len() > COMPONENT_MAX + if whiteout { WHITEOUT.len() } else { 0 } {
            return Err(format!("a component of the name is longer than {COMPONENT_MAX} bytes"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned() {
        for (name, want) in [
            ("./a/b", "a/b"),
            ("/a//b/./c/", "a/b/c"),
            ("./", ""),
            ("/", ""),
            ("", ""),
            ("...", "..."),
            (".a/..b", ".a/..b"),
            ("a/.wh..wh..opq", "a/.wh..wh..opq"),
        ] {
            let got = clean(name.as_bytes()).unwrap();
            assert_eq!(got, want.as_bytes(), "{name}");
            check_clean(&got).unwrap();
        }
    }

    #[test]
    fn impossible_names_are_refused() {
        let long = |n: usize| "x".repeat(n);
        for name in [
            "..".into(),
            "a/../b".into(),
            "/..".into(),
            "a\0b".into(),
            long(256),
            [long(250).as_str(); 20].join("/"),
        ] {
            assert!(clean(name.as_bytes()).is_err(), "{name}");
            assert!(check_clean(name.as_bytes()).is_err(), "{name}");
        }
        for path in ["/a", "a/", "a//b", "./a", "a/./b", ".", "a/."] {
            assert!(check_clean(path.as_bytes()).is_err(), "{path}");
        }
        // At every place of names of every short length.
        for len in 4..40usize {
            for at in 1..len - 2 {
                for odd in ["//", "/./", "\0", "/../"] {
                    let mut path = long(len);
                    path.replace_range(at..at, odd);
                    assert!(check_clean(path.as_bytes()).is_err(), "{path:?}");
                }
                let mut path = long(len);
                path.replace_range(at..at, "/");
                assert!(check_clean(path.as_bytes()).is_ok(), "{path:?}");
            }
        }
        assert!(clean(format!(".wh.{}", long(255)).as_bytes()).is_ok());
        assert!(clean(format!(".wh.{}", long(256)).as_bytes()).is_err());
        assert!(clean(format!(".wh.{}/a", long(255)).as_bytes()).is_err());
    }
}
