//! Times as Go writes them in tables (RFC 3339): `2006-01-02T15:04:05.999999999+07:00`, or `Z`.

use crate::Timestamp;

/// The moment that `text` says; `None` if it is no such time. Of a fraction nine digits count.
pub(crate) fn parse(text: &[u8]) -> Option<Timestamp> {
    let (date, rest) = text.split_at_checked(11)?;
    let (clock, rest) = rest.split_at_checked(8)?;
    let [y @ .., b'-', m1, m2, b'-', d1, d2, b'T' | b't'] = date else { return None };
    let (year, month, day) = (digits(y)?, digits(&[*m1, *m2])?, digits(&[*d1, *d2])?);
    let [h1, h2, b':', n1, n2, b':', s1, s2] = *clock else { return None };
    let (hour, minute, second) = (digits(&[h1, h2])?, digits(&[n1, n2])?, digits(&[s1, s2])?);
    // A leap second counts as the one after, as POSIX time has none.
    if hour > 23 || minute > 59 || second > 60 || day < 1 || day > days_in(year, month)? {
        return None;
    }
    let (nanos, zone) = match rest.strip_prefix(b".") {
        None => (0, rest),
        Some(fraction) => {
            let len = fraction.iter().take_while(|c| c.is_ascii_digit()).count();
            let (fraction, zone) = fraction.split_at(len);
            if fraction.is_empty() {
                return None;
            }
            let digit = |i: usize| fraction.get(i).map_or(0, |c| u32::from(c - b'0'));
            ((0..9).fold(0, |n, i| n * 10 + digit(i)), zone)
        }
    };
    let secs = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some(Timestamp { secs: secs - offset(zone)?, nanos })
}

/// Seconds that a zone is ahead of UTC.
fn offset(zone: &[u8]) -> Option<i64> {
    match *zone {
        [b'Z' | b'z'] => Some(0),
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (digits(&[h1, h2])?, digits(&[m1, m2])?);
            let ahead = hours * 3600 + minutes * 60;
            (hours < 24 && minutes < 60).then_some(if sign == b'-' { -ahead } else { ahead })
        }
        _ => None,
    }
}

fn digits(text: &[u8]) -> Option<i64> {
    let digit = |n: i64, c: &u8| c.is_ascii_digit().then(|| n * 10 + i64::from(c - b'0'));
    text.iter().try_fold(0, digit)
}

fn days_in(year: i64, month: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => Some(31),
        4 | 6 | 9 | 11 => Some(30),
        2 => Some(if leap { 29 } else { 28 }),
        _ => None,
    }
}

/// Days of the Gregorian calendar, counted in years that start in March so that leap days come last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, secs, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2006-01-02T15:04:05.999999999Z", 1_136_214_245, 999_999_999),
            ("2006-01-02T22:04:05.5+07:00", 1_136_214_245, 500_000_000),
            ("2006-01-02T07:34:05-07:30", 1_136_214_245, 0),
            ("2000-02-29T12:00:00Z", 951_825_600, 0),
            ("1969-12-31T23:59:59.25Z", -1, 250_000_000),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
            ("2106-02-07T06:28:16Z", 4_294_967_296, 0),
            ("2016-12-31T23:59:60Z", 1_483_228_800, 0),
            ("1970-01-01T00:00:00.1234567899Z", 0, 123_456_789),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(Timestamp { secs, nanos }), "{text}");
        }
    }

    #[test]
    fn no_times() {
        for text in [
            "",
            "1970-01-01",
            "1970-01-01T00:00:00",
            "1970-13-01T00:00:00Z",
            "1970-00-01T00:00:00Z",
            "1970-01-32T00:00:00Z",
            "2001-02-29T00:00:00Z",
            "1970-01-00T00:00:00Z",
            "1970-01-01T24:00:00Z",
            "1970-01-01T00:60:00Z",
            "1970-01-01T00:00:61Z",
            "1970-01-01T00:00:00.Z",
            "1970-01-01T00:00:00+0700",
            "1970-01-01T00:00:00+24:00",
            "1970-01-01T00:00:00Zx",
            "197x-01-01T00:00:00Z",
            "11970-01-01T00:00:00Z",
            "-970-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }
}
