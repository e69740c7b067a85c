//! Times in tables that Go wrote.

use crate::{Timestamp, rfc3339};

/// What Go writes for a time that was never set; tar writers store 0 for it.
const GO_ZERO: i64 = -62_135_596_800;

/// Reads a time (RFC 3339); one that was never set is 0.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    let time = rfc3339::parse(text.as_bytes())?;
    Some(if time.secs == GO_ZERO { Timestamp::default() } else { time })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, secs, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2020-09-13T12:26:40Z", 1_600_000_000, 0),
            ("2020-09-13T14:26:40.25+02:00", 1_600_000_000, 250_000_000),
            ("1969-12-31T01:00:00+01:00", -86_400, 0),
            ("1969-12-31T23:59:59.999999999Z", -1, 999_999_999),
            ("2000-02-29T00:00:00-08:30", 951_782_400 + 30_600, 0),
            ("2038-01-19T03:14:08.0000000019Z", 1 << 31, 1),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
            ("0001-01-01T00:00:00Z", 0, 0),
        ] {
            assert_eq!(parse(text), Some(Timestamp { secs, nanos }), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "2020",
            "2020-09-13",
            "2020-09-13T12:26:40",
            "2020-09-13 12:26:40Z",
            "2020-13-01T00:00:00Z",
            "2020-00-01T00:00:00Z",
            "2020-01-32T00:00:00Z",
            "2020-01-01T24:00:00Z",
            "2020-01-01T00:00:00.Z",
            "2020-01-01T00:00:00+0100",
            "2020-01-01T00:00:00+1:00",
            "2020-01-01T00:00:00Zz",
            "+020-01-01T00:00:00Z",
            "2020-01-01T00:00:00é",
            "202é-01-01T00:00:00Z",
            "10000-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
