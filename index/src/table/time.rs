//! Times as Go writes them: RFC 3339, "Internet Date/Time Format".

use crate::Timestamp;

/// What Go writes for a time that was never set; tar writers store 0 for it.
const GO_ZERO: i64 = -62_135_596_800;

/// Reads `2006-01-02T15:04:05`, an optional fraction, and `Z` or an offset such as `+07:00`.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    let (date, rest) = text.split_at_checked(10)?;
    let (clock, rest) = rest.split_at_checked(9)?;
    let [year, month, day] = fields(date, b'-', [4, 2, 2])?;
    let [hour, minute, second] = fields(clock.strip_prefix(['T', 't'])?, b':', [2, 2, 2])?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanos, zone) = fraction(rest)?;
    let secs = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset(zone)?;
    Some(if secs == GO_ZERO { Timestamp::default() } else { Timestamp { secs, nanos } })
}

/// Three decimal fields of fixed widths.
fn fields(text: &str, separator: u8, widths: [usize; 3]) -> Option<[i64; 3]> {
    let mut out = [0; 3];
    let mut at = 0;
    for (field, width) in out.iter_mut().zip(widths) {
        if at > 0 {
            (*text.as_bytes().get(at)? == separator).then_some(())?;
            at += 1;
        }
        *field = digits(text.get(at..at + width)?)?;
        at += width;
    }
    (at == text.len()).then_some(out)
}

fn digits(text: &str) -> Option<i64> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Nanoseconds, and what follows them.
fn fraction(text: &str) -> Option<(u32, &str)> {
    let Some(rest) = text.strip_prefix('.') else { return Some((0, text)) };
    let count = rest.bytes().take_while(u8::is_ascii_digit).count();
    if count == 0 {
        return None;
    }
    let (number, zone) = rest.split_at(count);
    let nanos = number.bytes().chain(std::iter::repeat(b'0')).take(9);
    Some((nanos.fold(0, |n, c| n * 10 + u32::from(c - b'0')), zone))
}

/// Seconds east of Greenwich.
fn offset(zone: &str) -> Option<i64> {
    let (sign, rest) = match zone.as_bytes().first()? {
        b'Z' | b'z' => return (zone.len() == 1).then_some(0),
        b'+' => (1, zone.get(1..)?),
        b'-' => (-1, zone.get(1..)?),
        _ => return None,
    };
    let (hours, minutes) = rest.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes) = (digits(hours)?, digits(minutes)?);
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

/// Days from 1970-01-01 in the Gregorian calendar; years start in March so that the leap day comes last.
fn days(year: i64, month: i64, day: i64) -> i64 {
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
