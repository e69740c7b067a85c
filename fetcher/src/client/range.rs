//! What a server made of a Range header.

use reqwest::StatusCode;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap};

/// How the body of an answer relates to the bytes that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyStart {
    /// The body starts with the first wanted byte.
    AtRange,
    /// The body is the whole blob: so many bytes come before the first wanted one.
    Skip(u64),
}

/// Judges an answer to a request for bytes `start..end`.
pub(crate) fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    start: u64,
    end: u64,
) -> Result<BodyStart, String> {
    match status {
        StatusCode::OK => Ok(if start == 0 { BodyStart::AtRange } else { BodyStart::Skip(start) }),
        StatusCode::PARTIAL_CONTENT => judge_partial(headers, start, end).map(|()| BodyStart::AtRange),
        StatusCode::RANGE_NOT_SATISFIABLE => Err(format!("it refuses the range {start}..{end}")),
        other => Err(format!("unexpected status {}", other.as_u16())),
    }
}

fn judge_partial(headers: &HeaderMap, start: u64, end: u64) -> Result<(), String> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    if text(CONTENT_TYPE).is_some_and(|t| t.to_ascii_lowercase().starts_with("multipart/")) {
        return Err("it answers one range with several parts".to_owned());
    }
    let Some(range) = headers.get(CONTENT_RANGE) else {
        // Some caches drop the header; the length then has to tell that this is the range (and digests prove it).
        let length = text(CONTENT_LENGTH).and_then(|l| l.parse::<u64>().ok());
        return if length == end.checked_sub(start) {
            Ok(())
        } else {
            Err("a partial answer without Content-Range".to_owned())
        };
    };
    let parsed = range.to_str().ok().and_then(parse_content_range);
    match parsed {
        // Less than asked for is allowed, the rest is asked for again.
        Some((first, last)) if first == start && last >= first && last < end => Ok(()),
        Some((first, last)) => Err(format!("it sent bytes {first}-{last} instead of {start}-{}", end - 1)),
        None => Err("a Content-Range that makes no sense".to_owned()),
    }
}

/// `bytes 0-9/100` or `bytes 0-9/*` → (0, 9).
pub(super) fn parse_content_range(text: &str) -> Option<(u64, u64)> {
    let rest = text.trim().strip_prefix("bytes ")?;
    let (range, total) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse::<u64>().ok()?);
    match total.trim() {
        "*" => {}
        total => {
            if total.parse::<u64>().ok()? <= last {
                return None;
            }
        }
    }
    Some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partial(range: Option<&str>, length: Option<&str>, start: u64, end: u64) -> Result<BodyStart, String> {
        let mut headers = HeaderMap::new();
        if let Some(range) = range {
            headers.insert(CONTENT_RANGE, range.parse().unwrap());
        }
        if let Some(length) = length {
            headers.insert(CONTENT_LENGTH, length.parse().unwrap());
        }
        judge(StatusCode::PARTIAL_CONTENT, &headers, start, end)
    }

    #[test]
    fn content_range_must_fit() {
        assert_eq!(partial(Some("bytes 10-19/100"), None, 10, 20), Ok(BodyStart::AtRange));
        assert_eq!(partial(Some("bytes 10-14/*"), None, 10, 20), Ok(BodyStart::AtRange));
        assert_eq!(partial(None, Some("10"), 10, 20), Ok(BodyStart::AtRange));
        for bad in
            ["bytes 11-19/100", "bytes 10-20/100", "bytes 10-19/15", "bytes 19-10/100", "10-19/100", ""]
        {
            assert!(partial(Some(bad), None, 10, 20).is_err(), "{bad}");
        }
        assert!(partial(None, None, 10, 20).is_err());
        assert!(partial(None, Some("100"), 10, 20).is_err());
    }

    #[test]
    fn whole_bodies_are_skipped_into() {
        let none = HeaderMap::new();
        assert_eq!(judge(StatusCode::OK, &none, 0, 5), Ok(BodyStart::AtRange));
        assert_eq!(judge(StatusCode::OK, &none, 3, 5), Ok(BodyStart::Skip(3)));
        assert!(judge(StatusCode::RANGE_NOT_SATISFIABLE, &none, 3, 5).is_err());
    }
}
