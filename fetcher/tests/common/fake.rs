//! A registry in memory with the referrers API and logins, whose habits can be chosen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use hyper::Response;
use lazyrun_index::Digest;
use serde_json::{Value, json};

use super::TestImage;
use super::server::{Reply, Seen, Server, full, status};

/// How a registry behaves.
#[derive(Clone)]
pub struct Habits {
    /// It has the referrers API and says so when a manifest with subject is put.
    pub referrers: bool,
    /// It filters referrers by type and says so.
    pub filters: bool,
    /// Referrers on one page.
    pub page: usize,
    /// What it answers to DELETE.
    pub delete: u16,
    /// It asks for a token; user and password are `u` and `p` for pushing, none for pulling.
    pub login: bool,
    /// It names only `pull` in its challenges, as one large registry does.
    pub stingy_scope: bool,
    /// The place of uploads is a whole URL instead of a path.
    pub absolute_location: bool,
    /// How many uploads it loses.
    pub lost_uploads: usize,
    /// How many manifests it says not to have their digest, though they do.
    pub doubts: usize,
}

impl Default for Habits {
    fn default() -> Self {
        Habits {
            referrers: true,
            filters: true,
            page: 100,
            delete: 202,
            login: false,
            stingy_scope: false,
            absolute_location: false,
            lost_uploads: 0,
            doubts: 0,
        }
    }
}

#[derive(Default)]
struct Held {
    blobs: BTreeMap<String, Bytes>,
    manifests: BTreeMap<String, Bytes>,
    lost: usize,
    doubted: usize,
}

/// The registry; everything lies in one repository, whatever its name.
pub struct Fake {
    pub server: Server,
    held: Arc<Mutex<Held>>,
}

impl Fake {
    pub async fn start(habits: Habits) -> Fake {
        let held = Arc::new(Mutex::new(Held::default()));
        let shared = Arc::clone(&held);
        let server = Server::start(move |seen| answer(&habits, &mut shared.lock().unwrap(), seen)).await;
        Fake { server, held }
    }

    /// Puts an image under a tag, too; gives its name.
    pub fn add(&self, image: &TestImage, tag: &str) -> String {
        let mut held = self.held.lock().unwrap();
        for blob in image.layers.iter().map(|l| &l.blob).chain([&image.config]) {
            held.blobs.insert(Digest::of(blob).to_string(), blob.clone());
        }
        drop(held);
        self.add_manifest(&image.manifest, tag);
        self.server.name(&format!("app:{tag}"))
    }

    pub fn add_manifest(&self, manifest: &Bytes, tag: &str) {
        let mut held = self.held.lock().unwrap();
        held.manifests.insert(Digest::of(manifest).to_string(), manifest.clone());
        held.manifests.insert(tag.to_owned(), manifest.clone());
    }

    pub fn add_blob(&self, blob: Bytes) {
        self.held.lock().unwrap().blobs.insert(Digest::of(&blob).to_string(), blob);
    }

    pub fn has_manifest(&self, name: &str) -> bool {
        self.held.lock().unwrap().manifests.contains_key(name)
    }
}

fn answer(habits: &Habits, held: &mut Held, seen: &Seen) -> Reply {
    let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
    if path == "/token" {
        return token(seen, query);
    }
    if habits.login
        && let Some(challenge) = challenge(habits, seen)
    {
        return challenge;
    }
    if let Some(name) = path.strip_prefix("/v2/app/manifests/") {
        return manifests(habits, held, seen, name);
    }
    if let Some(subject) = path.strip_prefix("/v2/app/referrers/").filter(|_| habits.referrers) {
        return referrers(habits, held, subject, query);
    }
    if path == "/v2/app/blobs/uploads/" {
        let host = seen.header("host").unwrap_or_default();
        let scheme = if habits.absolute_location { format!("http://{host}") } else { String::new() };
        let place = format!("{scheme}/upload/1?_state=a%2Fb");
        return Response::builder().status(202).header("location", place).body(full("")).unwrap();
    }
    if path == "/upload/1" {
        if held.lost < habits.lost_uploads {
            held.lost += 1;
            return status(404);
        }
        let digest = Digest::of(&seen.body).to_string();
        let named = query.split('&').any(|p| p.replace("%3A", ":") == format!("digest={digest}"));
        let whole = seen.header("content-length") == Some(&seen.body.len().to_string());
        if !named || !whole || !query.contains("_state=a%2Fb") {
            return status(400);
        }
        held.blobs.insert(digest, seen.body.clone());
        return status(201);
    }
    let digest = path.strip_prefix("/v2/app/blobs/").unwrap_or_default();
    match held.blobs.get(digest) {
        Some(blob) if seen.method == "GET" => super::server::blob_reply(seen, blob),
        Some(_) => status(200),
        None => status(404),
    }
}

fn manifests(habits: &Habits, held: &mut Held, seen: &Seen, name: &str) -> Reply {
    match seen.method.as_str() {
        "PUT" if name.starts_with("sha256:") && held.doubted < habits.doubts => {
            held.doubted += 1;
            let error = json!({"errors": [{"code": "DIGEST_INVALID", "message": "provided digest did not match uploaded content"}]});
            Response::builder().status(400).body(full(error.to_string())).unwrap()
        }
        "PUT" => {
            let manifest: Value = serde_json::from_slice(&seen.body).unwrap();
            let blobs = manifest["layers"].as_array().cloned().unwrap_or_default();
            let missing =
                blobs.iter().any(|b| !held.blobs.contains_key(b["digest"].as_str().unwrap_or_default()));
            if missing {
                let error = json!({"errors": [{"code": "MANIFEST_BLOB_UNKNOWN", "message": "blob unknown to registry"}]});
                return Response::builder().status(400).body(full(error.to_string())).unwrap();
            }
            held.manifests.insert(name.to_owned(), seen.body.clone());
            held.manifests.insert(Digest::of(&seen.body).to_string(), seen.body.clone());
            let mut reply = Response::builder().status(201);
            if let Some(subject) = manifest["subject"]["digest"].as_str().filter(|_| habits.referrers) {
                reply = reply.header("oci-subject", subject);
            }
            reply.body(full("")).unwrap()
        }
        "DELETE" if habits.delete == 202 => {
            status(if held.manifests.remove(name).is_some() { 202 } else { 404 })
        }
        "DELETE" => status(habits.delete),
        _ => held.manifests.get(name).map_or_else(|| status(404), |m| Response::new(full(m.clone()))),
    }
}

fn referrers(habits: &Habits, held: &Held, subject: &str, query: &str) -> Reply {
    let parameter = |name: &str| {
        query
            .split('&')
            .find_map(|p| p.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.replace("%2F", "/").replace("%2B", "+"))
    };
    let wanted = parameter("artifactType").filter(|_| habits.filters);
    let from: usize = parameter("from").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut found: BTreeMap<String, Value> = BTreeMap::new();
    for bytes in held.manifests.values() {
        let manifest: Value = serde_json::from_slice(bytes).unwrap();
        let kind = manifest["artifactType"]
            .as_str()
            .or(manifest["config"]["mediaType"].as_str())
            .unwrap_or_default();
        if manifest["subject"]["digest"] == subject && wanted.as_deref().is_none_or(|w| w == kind) {
            let digest = Digest::of(bytes).to_string();
            found.insert(
                digest.clone(),
                json!({"mediaType": manifest["mediaType"], "digest": digest,
                "size": bytes.len(), "artifactType": kind, "annotations": manifest["annotations"]}),
            );
        }
    }
    let page: Vec<&Value> = found.values().skip(from).take(habits.page).collect();
    let mut reply = Response::builder().header("content-type", "application/vnd.oci.image.index.v1+json");
    if from + page.len() < found.len() {
        let kept = query.split('&').filter(|p| !p.starts_with("from=") && !p.is_empty());
        let next: Vec<String> =
            kept.map(str::to_owned).chain([format!("from={}", from + page.len())]).collect();
        reply =
            reply.header("link", format!("</v2/app/referrers/{subject}?{}>; rel=\"next\"", next.join("&")));
    }
    if wanted.is_some() {
        reply = reply.header("oci-filters-applied", "artifactType");
    }
    let list = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": page});
    reply.body(full(list.to_string())).unwrap()
}

/// A token names what it allows; pushing needs the password.
fn token(seen: &Seen, query: &str) -> Reply {
    let query = query.replace("%3A", ":").replace("%2C", ",");
    let scope = query.split('&').find_map(|p| p.strip_prefix("scope=")).unwrap_or_default();
    let known = seen.header("authorization") == Some("Basic dTpw");
    let actions = scope.strip_prefix("repository:app:").unwrap_or_default();
    let granted = if known { actions } else { "pull" };
    Response::new(full(json!({"token": granted}).to_string()))
}

/// 401 unless the token allows the request.
fn challenge(habits: &Habits, seen: &Seen) -> Option<Reply> {
    let needed = match seen.method.as_str() {
        "GET" | "HEAD" => "pull",
        "DELETE" => "delete",
        _ => "push",
    };
    let held = seen.header("authorization").and_then(|a| a.strip_prefix("Bearer ")).unwrap_or_default();
    if held.split(',').any(|a| a == needed) {
        return None;
    }
    let host = seen.header("host").unwrap_or_default();
    let named = match needed {
        _ if habits.stingy_scope => "pull",
        "push" => "pull,push",
        other => other,
    };
    let value =
        format!("Bearer realm=\"http://{host}/token\",service=\"s\",scope=\"repository:app:{named}\"");
    Some(Response::builder().status(401).header("www-authenticate", value).body(full("")).unwrap())
}
