//! containerd's filter language, as requests to list snapshots use it.
//!
//! A filter is a list of selectors with commas between them, all of which must match:
//! `kind==committed,labels."containerd.io/snapshot.ref"~=/^sha256/`. Operators are `==`, `!=` and `~=` (a regular
//! expression); a field alone asks whether it is there. Fields and values may be quoted as in Go, values of `~=` also
//! between slashes or bars.

use std::borrow::Cow;

use regex::Regex;

/// Longest filter that is read, in bytes: a label's name and value have 4096.
const MAX_LEN: usize = 16 << 10;
/// What a regular expression may grow to, in bytes.
const MAX_REGEX: usize = 1 << 20;

/// What a filter looks at.
pub trait Fields {
    /// The value of a field and whether it is there.
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>>;
}

/// A filter that has been understood.
#[derive(Debug)]
pub struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Whether all selectors match.
    pub fn matches(&self, thing: &impl Fields) -> bool {
        self.0.iter().all(|selector| {
            let value = thing.field(&selector.path);
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value.is_some_and(|v| v == *wanted),
                Test::NotEqual(wanted) => value.unwrap_or_default() != *wanted,
                Test::Matches(regex) => regex.is_match(&value.unwrap_or_default()),
            }
        })
    }
}

/// Understands filters, any of which has to match. None at all match everything, and so does an empty one.
///
/// # Errors
/// What is wrong, and where, in one sentence.
pub fn parse_all(filters: &[String]) -> Result<Vec<Filter>, String> {
    filters.iter().map(|text| parse(text)).collect()
}

/// Whether any of the filters matches; no filters match everything.
pub fn any_matches(filters: &[Filter], thing: &impl Fields) -> bool {
    filters.is_empty() || filters.iter().any(|filter| filter.matches(thing))
}

fn parse(text: &str) -> Result<Filter, String> {
    if text.len() > MAX_LEN {
        return Err(format!("a filter of {} bytes is too long", text.len()));
    }
    let mut parser = Parser { text, at: 0 };
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(Filter(selectors));
    }
    loop {
        selectors.push(parser.selector()?);
        parser.skip_space();
        match parser.next() {
            None => return Ok(Filter(selectors)),
            Some(',') => {}
            Some(other) => return Err(parser.error(&format!("unexpected {other:?}"))),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn error(&self, what: &str) -> String {
        format!("the filter {:?} can't be understood: {what} before byte {}", self.text, self.at)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let start = self.at;
        while self.peek().is_some_and(&wanted) {
            self.next();
        }
        self.text[start..self.at].to_owned()
    }

    fn selector(&mut self) -> Result<Selector, String> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        self.skip_space();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator.as_str() {
            "" => Test::Present,
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(self.regex()?),
            other => return Err(self.error(&format!("unknown operator {other:?}"))),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, String> {
        self.skip_space();
        if matches!(self.peek(), Some('"' | '\'')) {
            return self.quoted();
        }
        let field = self.take_while(is_field);
        if field.is_empty() { Err(self.error("a field is missing")) } else { Ok(field) }
    }

    fn value(&mut self, bars: bool) -> Result<String, String> {
        self.skip_space();
        match self.peek() {
            Some('"' | '\'') => return self.quoted(),
            Some('/' | '|') if bars => return self.quoted(),
            _ => {}
        }
        let value = self.take_while(|c| c != ',' && !c.is_whitespace());
        if value.is_empty() { Err(self.error("a value is missing")) } else { Ok(value) }
    }

    fn regex(&mut self) -> Result<Regex, String> {
        let value = self.value(true)?;
        let built = regex::RegexBuilder::new(&value).size_limit(MAX_REGEX).build();
        built.map_err(|error| self.error(&format!("{error}")))
    }

    // Go's rules for what is in quotes, whichever they are.
    fn quoted(&mut self) -> Result<String, String> {
        let quote = self.next();
        let mut bytes = Vec::new();
        let mut utf8 = [0; 4];
        loop {
            let Some(c) = self.next().filter(|c| *c != '\n') else {
                return Err(self.error("a quote is not closed"));
            };
            if Some(c) == quote {
                break;
            }
            if c != '\\' {
                bytes.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
                continue;
            }
            match self.next() {
                Some('a') => bytes.push(7),
                Some('b') => bytes.push(8),
                Some('f') => bytes.push(12),
                Some('n') => bytes.push(b'\n'),
                Some('r') => bytes.push(b'\r'),
                Some('t') => bytes.push(b'\t'),
                Some('v') => bytes.push(11),
                Some('\\') => bytes.push(b'\\'),
                Some('x') => bytes.push(self.number(16, 2)? as u8),
                Some('u') => self.code_point(4, &mut bytes)?,
                Some('U') => self.code_point(8, &mut bytes)?,
                Some(c) if c.is_digit(8) => {
                    self.at -= 1;
                    let value = self.number(8, 3)?;
                    bytes.push(u8::try_from(value).map_err(|_| self.error("an escape is too large"))?);
                }
                // In a regular expression between slashes a backslash mostly means one.
                Some(c) if Some(c) == quote => bytes.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()),
                _ => return Err(self.error("an escape is unknown")),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.error("what is in quotes is not UTF-8"))
    }

    fn code_point(&mut self, digits: usize, bytes: &mut Vec<u8>) -> Result<(), String> {
        let value = self.number(16, digits)?;
        let c = char::from_u32(value).ok_or_else(|| self.error("an escape is no character"))?;
        bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        Ok(())
    }

    fn number(&mut self, radix: u32, digits: usize) -> Result<u32, String> {
        let mut value: u32 = 0;
        for _ in 0..digits {
            let digit = self.next().and_then(|c| c.to_digit(radix));
            let digit = digit.ok_or_else(|| self.error("a number is too short"))?;
            value = value.checked_mul(radix).and_then(|v| v.checked_add(digit)).unwrap_or(u32::MAX);
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing;

    impl Fields for Thing {
        fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            match path.as_slice() {
                ["name"] => Some("c1/x".into()),
                ["kind"] => Some("committed".into()),
                ["labels", "a.b/c"] => Some("v 1".into()),
                _ => None,
            }
        }
    }

    fn holds(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
        any_matches(&parse_all(&filters).expect("a filter"), &Thing)
    }

    #[test]
    fn what_matches() {
        for filter in [
            "",
            "name",
            "name==c1/x",
            "name == \"c1/x\"",
            "kind!=active",
            "nothing!=x",
            "name~=^c[0-9]/",
            r#"labels."a.b/c"=="v 1",kind==committed"#,
            r"labels.'a.b/c'=='v\x201'",
            r#"labels."\141.b/\u0063""#,
            "name~=/^c1.x$/",
            "name~=|x$|",
        ] {
            assert!(holds(&[filter]), "{filter}");
        }
        assert!(holds(&[]) && holds(&["kind==view", "name==c1/x"]));
    }

    #[test]
    fn what_does_not() {
        for filter in ["nothing", "nothing==x", "name==c1", "kind!=committed", "name,kind==view", "name~=^x"]
        {
            assert!(!holds(&[filter]), "{filter}");
        }
    }

    #[test]
    fn what_is_no_filter() {
        let long = format!("name=={}", "x".repeat(MAX_LEN));
        for filter in [
            ",",
            "name,",
            "name=x",
            "name==",
            "==x",
            "name==\"x",
            "name==\"\\q\"",
            "na-me",
            ".name",
            "name..x",
            "name~=(",
            "name==x y",
            "name==\"\\xf\"",
            "name~=(a{1000}){1000}",
            &long,
            "name==\"\\777\"",
        ] {
            assert!(parse(filter).is_err(), "{filter}");
        }
    }

    #[test]
    fn no_text_makes_it_panic() {
        let pieces =
            ["name", "==", "~=", "\"", "\\", "x", ",", ".", "é", "\n", " ", "'", "|", "\\u", "{", "9"];
        let mut state: u64 = 7;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..8 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                text.push_str(pieces[(state >> 33) as usize % pieces.len()]);
            }
            let _ = parse(&text);
        }
    }
}
