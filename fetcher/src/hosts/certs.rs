//! Certificates in a registry's directory, named as Docker has them: `*.crt` is an authority, `*.cert` with the `*.key`
//! of the same name is what the client shows.

use std::path::Path;

use super::endpoint::TlsSettings;
use super::stamp::Reader;
use crate::error::FetchError;

/// The certificates in a directory.
///
/// # Errors
/// When the directory cannot be read, or a certificate of the client has no key.
pub(crate) fn in_dir(dir: &Path, reader: &mut Reader) -> Result<TlsSettings, FetchError> {
    let files = reader.list(dir)?;
    let mut tls = TlsSettings::default();
    for file in &files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => tls.ca.push(file.clone()),
            Some("cert") => {
                let key = file.with_extension("key");
                if !files.contains(&key) {
                    return Err(FetchError::bad_config(
                        file,
                        None,
                        format!("its key {} is missing", key.display()),
                    ));
                }
                tls.client.push((file.clone(), Some(key)));
            }
            Some("key") if !files.contains(&file.with_extension("cert")) => {
                return Err(FetchError::bad_config(
                    file,
                    None,
                    format!("its certificate {} is missing", file.with_extension("cert").display()),
                ));
            }
            _ => {}
        }
    }
    if !tls.is_plain() {
        tls.from = Some(dir.to_owned());
    }
    tls.stamp(reader);
    Ok(tls)
}
