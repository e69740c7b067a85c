//! Amounts as people write them: bytes per second, and times.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A limit in bytes per second: `50MiB/s`, `1.5GB`, `100k`, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub Option<u64>);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no rate; write for example 50MiB/s, or none");
        let lower = text.trim().to_ascii_lowercase();
        if lower == "none" {
            return Ok(Self(None));
        }
        let amount = lower.strip_suffix("/s").unwrap_or(&lower);
        let number = amount.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: f64 = match amount[number.len()..].trim() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "kb" => 1e3,
            "m" | "mib" => 1024.0 * 1024.0,
            "mb" => 1e6,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "gb" => 1e9,
            _ => return Err(bad()),
        };
        let value = number.trim().parse::<f64>().map_err(|_| bad())? * unit;
        // Slower than this nothing would ever become whole.
        if !value.is_finite() || !(1024.0..1e15).contains(&value) {
            return Err(format!("{text:?} is no usable rate; it has to be 1KiB/s or more, or none"));
        }
        Ok(Self(Some(value as u64)))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(rate) => write!(f, "{rate}B/s"),
        }
    }
}

/// A time to wait: `30s`, `500ms`, `2m`; without a unit, seconds. Not zero, and a day at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeout(pub Duration);

impl FromStr for Timeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no time to wait; write for example 30s");
        let lower = text.trim().to_ascii_lowercase();
        let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &lower[number.len()..] {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        let seconds = number.trim().parse::<f64>().map_err(|_| bad())? * unit;
        if !(0.001..=86_400.0).contains(&seconds) {
            return Err(bad());
        }
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|_| bad())
    }
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        let rate = |text: &str| text.parse::<Rate>().map(|rate| rate.0);
        assert_eq!(rate("50MiB/s"), Ok(Some(50 << 20)));
        assert_eq!(rate("1.5gb"), Ok(Some(1_500_000_000)));
        assert_eq!(rate("100 k"), Ok(Some(102_400)));
        assert_eq!(rate("none"), Ok(None));
        for bad in ["", "fast", "10 potatoes/s", "-1MiB", "nan", "inf", "0", "12", "MiB/s"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        let shown: Rate = Rate(Some(5 << 20)).to_string().parse().expect("what is shown can be read");
        assert_eq!(shown, Rate(Some(5 << 20)));
    }

    #[test]
    fn times() {
        let time = |text: &str| text.parse::<Timeout>().map(|time| time.0);
        assert_eq!(time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!((time("2m"), time("7")), (Ok(Duration::from_secs(120)), Ok(Duration::from_secs(7))));
        for bad in ["", "0", "soon", "-3s", "30 years", "90000s", "nan"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
