//! From an image's manifest or index to its blobs, by what containerd has of them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use lazyrun_fetcher::Reference;
use lazyrun_index::Digest;

use super::documents::{Document, Entry, REFERENCE};
use super::{Fetch, Platforms, Pulled, blob};
use crate::containerd::Scope;

/// Largest manifest or index that is read, in bytes; containerd's own limit.
const MAX_DOCUMENT: u64 = 8 << 20;
/// Indexes inside indexes are followed this deep.
const MAX_DEPTH: usize = 4;
/// Most documents of one image.
const MAX_DOCUMENTS: usize = 512;
/// Most blobs of one image.
const MAX_BLOBS: usize = 16_384;
/// Most repositories that are asked for a blob.
const MAX_SOURCES: usize = 8;
/// What labels begin with that tell where containerd got a blob from.
pub(super) const SOURCE: &str = "containerd.io/distribution.source.";

/// A blob that an image has.
#[derive(Debug)]
pub(super) struct Blob {
    /// What its manifest says of it.
    pub(super) entry: Entry,
    /// Repositories that may have it, the likeliest first.
    pub(super) sources: Arc<[Reference]>,
}

/// A document to look into.
struct Node {
    digest: Digest,
    kind: &'static str,
    depth: usize,
    sources: Arc<[Reference]>,
    /// Left out when containerd does not have it.
    optional: bool,
}

/// All blobs of an image, each once. Documents that are missing are fetched, and all are labelled so that containerd's
/// garbage collector keeps what they name.
///
/// # Errors
/// When a document can't be had or makes no sense.
pub(super) async fn blobs(
    fetch: &Fetch<'_>,
    scope: &Scope,
    root: Digest,
    from: Option<&Reference>,
) -> Result<Vec<Blob>> {
    let sources = from.cloned().into_iter().collect();
    let mut nodes = vec![Node { digest: root, kind: "index", depth: 0, sources, optional: false }];
    let (mut seen, mut blobs, mut documents) = (HashSet::from([root]), Vec::new(), 0);
    let mut found = false;
    while let Some(node) = nodes.pop() {
        documents += 1;
        ensure!(documents <= MAX_DOCUMENTS, "it has more than {MAX_DOCUMENTS} manifests");
        let Some((document, sources)) = open(fetch, scope, &node).await? else { continue };
        match document {
            Document::Index(entries) => {
                ensure!(node.depth < MAX_DEPTH, "its indexes are nested too deep");
                for (entry, optional) in choose(fetch.platforms, entries) {
                    if seen.insert(entry.digest) {
                        let (kind, digest, sources) = (entry.kind(), entry.digest, Arc::clone(&sources));
                        nodes.push(Node { digest, kind, depth: node.depth + 1, sources, optional });
                    }
                }
            }
            Document::Manifest(entries) => {
                found = true;
                for entry in entries {
                    if entry.is_foreign() {
                        let digest = entry.digest;
                        fetch.progress.note(&format!("layer {digest} lies in no registry and is left out"));
                    } else if seen.insert(entry.digest) {
                        let sources = sources_of_blob(entry.digest, &sources, fetch.pulled);
                        blobs.push(Blob { entry, sources });
                        ensure!(blobs.len() <= MAX_BLOBS, "it has more than {MAX_BLOBS} layers");
                    }
                }
            }
        }
    }
    match fetch.platforms {
        _ if found => Ok(blobs),
        Platforms::Best(platform) => {
            bail!("it has no variant for {platform}; --platform or --all-platforms chooses others")
        }
        Platforms::All => bail!("its index names no manifest"),
    }
}

/// Which manifests of an index are looked into, and whether they may be missing.
fn choose(platforms: &Platforms, entries: Vec<Entry>) -> Vec<(Entry, bool)> {
    let Platforms::Best(platform) = platforms else {
        return entries.into_iter().map(|entry| (entry, false)).collect();
    };
    let rank = |entry: &Entry| entry.platform.as_ref().and_then(|offered| platform.rank(offered));
    // Among equals the first.
    let best = entries.iter().rev().max_by_key(|entry| rank(entry)).filter(|entry| rank(entry).is_some());
    let best = best.map(|entry| entry.digest);
    let wanted = entries.into_iter().filter_map(|entry| match (&entry.platform, best) {
        (None, _) => Some((entry, true)),
        (Some(_), Some(best)) if best == entry.digest => Some((entry, false)),
        _ => None,
    });
    wanted.collect()
}

/// A document and where the blobs lie that it names.
async fn open(fetch: &Fetch<'_>, scope: &Scope, node: &Node) -> Result<Option<(Document, Arc<[Reference]>)>> {
    let Node { digest, sources, .. } = node;
    let known = fetch.containerd.info(scope, *digest).await?;
    let bytes = match &known {
        Some(_) => fetch.containerd.read(scope, *digest, MAX_DOCUMENT).await?,
        None => None,
    };
    let parse = |bytes: &[u8]| {
        ensure!(
            Digest::of(bytes) == *digest,
            "the bytes that containerd has of manifest {digest} are damaged"
        );
        Document::parse(bytes).with_context(|| format!("reading manifest {digest}"))
    };
    if let (Some(info), Some(bytes)) = (known, bytes) {
        let document = parse(&bytes)?;
        keep(fetch, scope, *digest, &document, &info.labels).await?;
        return Ok(Some((document, sources_of(&info.labels, sources, fetch.pulled))));
    }
    if node.optional {
        return Ok(None);
    }
    let (bytes, source) = get(fetch, *digest, sources).await?;
    let document = parse(&bytes)?;
    let mut labels = references(&document, &BTreeMap::new());
    labels.extend([source_label(&source)]);
    let (reference, size) = (format!("{}-{digest}", node.kind), bytes.len() as u64);
    match blob::begin(fetch, scope, &reference, *digest, size).await? {
        Some(mut upload) => {
            // What another namespace has is complete.
            if upload.offset() != size {
                upload.restart();
                upload.write(bytes).await?;
            }
            upload.commit(scope, *digest, labels).await?;
        }
        // Somebody else was faster.
        None => {
            let known = fetch.containerd.info(scope, *digest).await?;
            keep(fetch, scope, *digest, &document, &known.map_or_else(BTreeMap::new, |info| info.labels))
                .await?;
        }
    }
    Ok(Some((document, Arc::clone(sources))))
}

/// A document from a registry.
async fn get(fetch: &Fetch<'_>, digest: Digest, sources: &[Reference]) -> Result<(Vec<u8>, Reference)> {
    let mut failure = None;
    for source in sources {
        match fetch.client.artifact_manifest(source, digest).await {
            Ok(Some(bytes)) => return Ok((bytes.to_vec(), source.clone())),
            Ok(None) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) => Err(error.into()),
        None => anyhow::bail!(
            "manifest {digest} is neither in containerd nor in a registry that it is known from"
        ),
    }
}

/// Labels a document so that what it names is not garbage. A client that was told to drop layers after unpacking (CRI's
/// `discard_unpacked_layers`) has left those labels out.
async fn keep(
    fetch: &Fetch<'_>,
    scope: &Scope,
    digest: Digest,
    document: &Document,
    labels: &BTreeMap<String, String>,
) -> Result<()> {
    let missing = references(document, labels);
    if missing.is_empty() {
        return Ok(());
    }
    Ok(fetch.containerd.set_labels(scope, digest, missing).await?)
}

/// The labels that lack for everything to be kept that a document names.
fn references(document: &Document, labels: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kept =
        labels.iter().filter(|(name, _)| name.starts_with(REFERENCE)).map(|(_, digest)| digest.clone());
    let kept: HashSet<String> = kept.collect();
    let entries = document.entries().iter().enumerate();
    let missing = entries.map(|(i, entry)| (entry.reference_label(i), entry.digest.to_string()));
    missing.filter(|(_, digest)| !kept.contains(digest)).collect()
}

/// The label by which containerd's clients note where a blob came from: without the port.
pub(super) fn source_label(source: &Reference) -> (String, String) {
    (format!("{SOURCE}{}", host_name(&source.registry)), source.repository.clone())
}

/// A registry without its port.
fn host_name(registry: &str) -> &str {
    match registry.rsplit_once(':') {
        // The colons of an address of IPv6 are in brackets.
        Some((host, port)) if !port.contains(']') => host,
        _ => registry,
    }
}

/// Where containerd got a document from, and so what it names; then the places that are known otherwise. The image's own
/// name is asked first where containerd has noted it: it may have been given another name since. containerd notes no ports;
/// the names by which images have been `pulled` tell them.
fn sources_of(
    labels: &BTreeMap<String, String>,
    others: &[Reference],
    pulled: &[Pulled],
) -> Arc<[Reference]> {
    let noted = labels.iter().filter_map(|(name, value)| Some((name.strip_prefix(SOURCE)?, value)));
    let noted: Vec<(&str, &str)> =
        noted.flat_map(|(host, repositories)| repositories.split(',').map(move |r| (host, r))).collect();
    let is_noted = |name: &&Reference| noted.contains(&(host_name(&name.registry), name.repository.as_str()));
    let guessed: Vec<Reference> =
        noted.iter().filter_map(|(host, repository)| format!("{host}/{repository}").parse().ok()).collect();
    let by_name = others.iter().chain(pulled.iter().map(|image| &image.reference)).filter(is_noted);
    few(by_name.chain(&guessed).chain(others))
}

/// Where a blob lies: with images that were pulled and have it, then where its manifest came from.
fn sources_of_blob(digest: Digest, others: &[Reference], pulled: &[Pulled]) -> Arc<[Reference]> {
    let with_it = pulled.iter().filter(|image| image.blobs.contains(&digest)).map(|image| &image.reference);
    few(with_it.chain(others))
}

/// The first of these repositories, each once.
fn few<'a>(all: impl Iterator<Item = &'a Reference>) -> Arc<[Reference]> {
    let mut sources: Vec<Reference> = Vec::new();
    for source in all {
        if sources.len() < MAX_SOURCES && !sources.iter().any(|before| before.name() == source.name()) {
            sources.push(source.clone());
        }
    }
    sources.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noted_places_come_before_a_name_that_was_given_later() {
        let labels = BTreeMap::from([
            (format!("{SOURCE}r.example"), "a/b,c".to_owned()),
            ("containerd.io/other".to_owned(), "x".to_owned()),
        ]);
        let names = |other: &str, known: &str| -> Vec<String> {
            let parse = |name: &str| name.parse::<Reference>().unwrap();
            let pulled = [Pulled::new(parse(known), b"")];
            let sources = sources_of(&labels, &[parse(other)], &pulled);
            sources.iter().map(Reference::name).collect()
        };
        assert_eq!(names("r.example/c:1", "x"), ["r.example/c", "r.example/a/b"]);
        assert_eq!(
            names("new", "r.example:5000/c:2"),
            ["r.example:5000/c", "r.example/a/b", "r.example/c", "docker.io/library/new"]
        );
        assert_eq!(host_name("[::1]:5000"), "[::1]");
        assert_eq!(host_name("[::1]"), "[::1]");
    }

    #[test]
    fn one_variant_is_chosen_or_all() {
        let entry = |platform: Option<&str>| Entry {
            digest: Digest::of(format!("{platform:?}").as_bytes()),
            size: 1,
            media_type: String::new(),
            platform: platform.map(|text| text.parse().unwrap()),
        };
        let offered =
            || ["linux/arm/v6", "linux/arm/v7", "linux/amd64", "unknown/unknown"].map(Some).map(entry);
        let chosen =
            |platforms: Platforms| choose(&platforms, offered().into_iter().chain([entry(None)]).collect());
        let best = chosen(Platforms::Best("linux/arm/v7".parse().unwrap()));
        let best: Vec<_> = best.iter().map(|(entry, optional)| (entry.digest, *optional)).collect();
        assert_eq!(best, [(entry(Some("linux/arm/v7")).digest, false), (entry(None).digest, true)]);
        assert_eq!(chosen(Platforms::Best("linux/s390x".parse().unwrap())).len(), 1);
        assert_eq!(chosen(Platforms::All).len(), 5);
    }
}
