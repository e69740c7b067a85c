//! TLS as a registry's settings have it: whose certificates count, and which one is shown.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ResolvesClientCert};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_platform_verifier::Verifier;

use crate::error::FetchError;
use crate::hosts::TlsSettings;

/// Makes the configuration of a connection. `needs_roots`: without any authority there is no use in it.
///
/// # Errors
/// When a file cannot be used, or there is no authority.
pub(super) fn config(settings: &TlsSettings, needs_roots: bool) -> Result<ClientConfig, FetchError> {
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| no_tls(e.to_string()))?;
    let mut roots = Vec::new();
    for path in &settings.ca {
        roots.extend(certificates(path)?);
    }
    let builder = if settings.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(Arc::clone(&provider))))
    } else {
        match Verifier::new_with_extra_roots(roots, Arc::clone(&provider)) {
            Ok(verifier) => builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)),
            // A machine without CA certificates can still use registries in plain http.
            Err(_) if !needs_roots => builder.with_root_certificates(RootCertStore::empty()),
            Err(error) => return Err(no_tls(error.to_string())),
        }
    };
    let mut config = if settings.client.is_empty() {
        builder.with_no_client_auth()
    } else {
        let keys = settings.client.iter().map(|(cert, key)| own(cert, key.as_deref(), &provider));
        builder.with_client_cert_resolver(Arc::new(Own(keys.collect::<Result<_, _>>()?)))
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The configuration of a client that makes no secure connections: it believes nobody.
///
/// # Errors
/// When the crypto provider knows no protocol.
pub(super) fn unused() -> Result<ClientConfig, FetchError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| no_tls(e.to_string()))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn provider() -> Arc<CryptoProvider> {
    CryptoProvider::get_default()
        .cloned()
        .unwrap_or_else(|| Arc::new(rustls::crypto::ring::default_provider()))
}

fn no_tls(reason: String) -> FetchError {
    FetchError::Tls { host: "any host".to_owned(), reason }
}

fn read(path: &Path) -> Result<Vec<u8>, FetchError> {
    crate::hosts::read_small(path).map_err(|e| FetchError::bad_config(path, None, e.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FetchError> {
    let bytes = read(path)?;
    let found = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(FetchError::bad_config(path, None, "it holds no certificate in PEM")),
        Err(error) => Err(FetchError::bad_config(path, None, error.to_string())),
    }
}

/// A certificate of the client with its key.
fn own(cert: &Path, key: Option<&Path>, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, FetchError> {
    let chain = certificates(cert)?;
    let file = key.unwrap_or(cert);
    // What is wrong with a key is told without its bytes.
    let bad = |reason: &str| FetchError::bad_config(file, None, reason);
    let key =
        PrivateKeyDer::from_pem_slice(&read(file)?).map_err(|_| bad("it holds no private key in PEM"))?;
    let found = CertifiedKey::from_der(chain, key, provider);
    found.map(Arc::new).map_err(|e| bad(&format!("the key cannot be used with {}: {e}", cert.display())))
}

/// The client's certificates. The one that an authority has made whom the server accepts is shown.
#[derive(Debug)]
struct Own(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Own {
    fn resolve(&self, accepted: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let can_sign = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        // The issuer's name stands in a certificate as the server sends it.
        let is_accepted = |key: &&Arc<CertifiedKey>| {
            key.cert.iter().any(|cert| accepted.iter().any(|name| holds(cert, name)))
        };
        let usable = || self.0.iter().filter(can_sign);
        usable().find(is_accepted).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && bytes.windows(part.len()).any(|window| window == part)
}

/// Believes every certificate: somebody has said `skip_verify`.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
