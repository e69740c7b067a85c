//! RFC 3339 times in UTC, as docker's logs write them.

use std::time::{SystemTime, UNIX_EPOCH};

/// Days since 1970-01-01 of a civil date (proleptic Gregorian).
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// Civil date (year, month, day) of days since 1970-01-01.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// `time` as RFC 3339 with nine digits of a second.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let secs = i64::try_from(since.as_secs()).unwrap_or(i64::MAX / 2);
    let (y, mo, d) = civil_from_days(secs.div_euclid(86_400));
    let s = secs.rem_euclid(86_400);
    let nanos = since.subsec_nanos();
    format!("{y:04}-{mo:02}-{d:02}T{:02}:{:02}:{:02}.{nanos:09}Z", s / 3600, s / 60 % 60, s % 60)
}

/// Nanoseconds since the epoch of an RFC 3339 time (or a date, or a time without zone, taken as UTC).
pub(crate) fn parse_rfc3339(text: &str) -> Option<i128> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let part = text.get(range)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let at = |i: usize, want: &[u8]| text.as_bytes().get(i).is_some_and(|b| want.contains(b));
    if !(at(4, b"-") && at(7, b"-")) {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (mut secs, mut nanos) = (0, 0i128);
    let mut rest = text.get(10..)?;
    if !rest.is_empty() {
        if !(at(10, b"Tt ") && at(13, b":") && at(16, b":")) {
            return None;
        }
        secs = number(11..13)? * 3600 + number(14..16)? * 60 + number(17..19)?;
        rest = text.get(19..)?;
    }
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let padded = format!("{:0<9}", fraction.get(..digits)?);
        nanos = padded.get(..9)?.parse().ok()?;
        rest = fraction.get(digits..)?;
    }
    let offset = match rest.as_bytes() {
        [] | [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2]
            if [h1, h2, m1, m2].iter().all(|b| b.is_ascii_digit()) =>
        {
            let two = |a: &u8, b: &u8| i64::from(a - b'0') * 10 + i64::from(b - b'0');
            let total = two(h1, h2) * 3600 + two(m1, m2) * 60;
            if *sign == b'+' { total } else { -total }
        }
        _ => return None,
    };
    let valid = (1..=12).contains(&month) && (1..=31).contains(&day) && (0..86_401).contains(&secs);
    let total = days_from_civil(year, month, day) * 86_400 + secs - offset;
    valid.then_some(i128::from(total) * 1_000_000_000 + nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn formats_and_parses_known_times() {
        let t = UNIX_EPOCH + Duration::new(1_709_210_096, 7);
        assert_eq!(rfc3339(t), "2024-02-29T12:34:56.000000007Z");
        assert_eq!(parse_rfc3339("2024-02-29T12:34:56.000000007Z"), Some(1_709_210_096_000_000_007));
        assert_eq!(parse_rfc3339("2024-02-29T14:34:56.5+02:00"), Some(1_709_210_096_500_000_000));
        assert_eq!(parse_rfc3339("1970-01-02"), Some(86_400_000_000_000));
        for bad in ["", "2024", "2024-13-01", "2024-01-01T1:2:3", "2024-01-01T00:00:00+x", "2024-01-01Té"] {
            assert_eq!(parse_rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_goes_there_and_back() {
        for day in -146_097..146_097 {
            let (y, m, d) = civil_from_days(day);
            assert_eq!(days_from_civil(y, m, d), day);
        }
    }
}
