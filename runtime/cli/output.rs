//! What goes to stdout: tables for people, JSON and templates for scripts.

use std::io::{self, Write};

use serde::Serialize;

use super::template;
use crate::failure::Failure;

/// Writes lines to stdout; a reader that has gone away is no error.
///
/// # Errors
/// When stdout can't be written for another reason, such as a full disk.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::daemon(format!("the result can't be written to standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// One value: as indented JSON, or by a template.
///
/// # Errors
/// A bad template.
pub(super) fn value<T: Serialize>(value: &T, format: Option<&str>) -> Result<(), Failure> {
    let json = to_json(value)?;
    match format {
        None | Some("json") => {
            print(&format!("{}\n", serde_json::to_string_pretty(&json).unwrap_or_default()))
        }
        Some(format) => print(&format!("{}\n", template::render(format, &json)?)),
    }
}

/// A column of a table: its name, and the cell of a row.
pub(super) type Column<'a, T> = (&'a str, fn(&T) -> String);

/// Rows: a table with these columns, or for each row a line of JSON or of the template.
///
/// # Errors
/// A bad template.
pub(super) fn rows<T: Serialize>(
    rows: &[T],
    format: Option<&str>,
    columns: &[Column<'_, T>],
) -> Result<(), Failure> {
    more_rows(rows, format, columns, true)
}

/// As [`rows`], for a list that comes in pieces: only the first has a `header`.
///
/// # Errors
/// As [`rows`].
pub(super) fn more_rows<T: Serialize>(
    rows: &[T],
    format: Option<&str>,
    columns: &[Column<'_, T>],
    header: bool,
) -> Result<(), Failure> {
    let mut text = String::new();
    match format {
        Some(format) if format != "table" => {
            for row in rows {
                let json = to_json(row)?;
                text += &if format == "json" { json.to_string() } else { template::render(format, &json)? };
                text.push('\n');
            }
        }
        _ => {
            let names = header.then(|| columns.iter().map(|(name, _)| (*name).to_owned()).collect());
            let lines: Vec<Vec<String>> = names
                .into_iter()
                .chain(rows.iter().map(|row| columns.iter().map(|(_, cell)| cell(row)).collect()))
                .collect();
            text = table(&lines);
        }
    }
    print(&text)
}

/// Cells in columns, three spaces apart.
pub(super) fn table(lines: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for line in lines {
        for (i, cell) in line.iter().enumerate() {
            match widths.get_mut(i) {
                Some(width) => *width = (*width).max(cell.chars().count()),
                None => widths.push(cell.chars().count()),
            }
        }
    }
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            row += &format!("{cell:<width$}   ");
        }
        text += row.trim_end();
        text.push('\n');
    }
    text
}

/// Bytes for people, in powers of a thousand as docker shows them.
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" {
                format!("{n}B")
            } else {
                format!("{value:.3}").chars().take(4).collect::<String>().trim_end_matches('.').to_owned()
                    + unit
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1}TB")
}

fn to_json<T: Serialize>(value: &T) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(value).map_err(|e| Failure::daemon(format!("the result can't be shown: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(bytes(0), "0B");
        assert_eq!(bytes(999), "999B");
        assert_eq!(bytes(1_500), "1.50kB");
        assert_eq!(bytes(480_000_000), "480MB");
    }

    #[test]
    fn columns_line_up() {
        let lines = vec![vec!["A".into(), "BB".into()], vec!["xyz".into(), "1".into()]];
        assert_eq!(table(&lines), "A     BB\nxyz   1\n");
    }
}
