//! `--format`: JSON, or Go-template-like text over the same JSON.

use serde_json::Value;

use crate::failure::Failure;

/// Renders `value` by a template: `{{.A.B}}` is a field, `{{json .A}}` a field as JSON, `{{.}}` all of it; `\t`
/// and `\n` are what they are in Go templates given on a command line.
///
/// # Errors
/// When an action isn't closed or isn't one of these.
pub(super) fn render(template: &str, value: &Value) -> Result<String, Failure> {
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find("{{") {
        out.push_str(&unescape(&rest[..at]));
        let Some(end) = rest[at..].find("}}") else {
            return Err(Failure::daemon(format!("the template {template:?} has an action without end")));
        };
        out.push_str(&action(rest[at + 2..at + end].trim(), value)?);
        rest = &rest[at + end + 2..];
    }
    out.push_str(&unescape(rest));
    Ok(out)
}

fn action(action: &str, value: &Value) -> Result<String, Failure> {
    let (json, path) = match action.strip_prefix("json ") {
        Some(path) => (true, path.trim()),
        None => (false, action),
    };
    let Some(path) = path.strip_prefix('.') else {
        return Err(Failure::daemon(format!(
            "{{{{{action}}}}} is no field; write {{{{.Name}}}} or {{{{json .Name}}}}"
        )));
    };
    let field = path.split('.').filter(|p| !p.is_empty()).try_fold(value, |v, key| match v {
        Value::Object(map) => map.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v),
        _ => None,
    });
    Ok(match field {
        Some(Value::String(text)) if !json => text.clone(),
        Some(field) => field.to_string(),
        None => return Err(Failure::daemon(format!("there is no field .{path} to show"))),
    })
}

fn unescape(text: &str) -> String {
    text.replace("\\t", "\t").replace("\\n", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_json_and_text() {
        let value = json!({"ID": "x", "State": {"Pid": 7, "Names": ["a"]}});
        assert_eq!(render("{{.ID}}\\t{{ .State.Pid }}!", &value).expect("render"), "x\t7!");
        assert_eq!(render("{{json .State.Names}}{{json .ID}}", &value).expect("render"), "[\"a\"]\"x\"");
        assert!(render("{{.Nope}}", &value).is_err() && render("{{.ID", &value).is_err());
        assert!(render("{{range .ID}}", &value).is_err());
    }
}
