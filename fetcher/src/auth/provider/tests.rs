use super::*;

/// A node with a plugin that keeps what it is asked. Its program is the shell: one written here could be open for writing in
/// a child of another test at the moment when it is run.
struct Node(tempfile::TempDir);

impl Node {
    fn new(config: &str) -> Node {
        let node = Node(tempfile::tempdir().unwrap());
        std::fs::create_dir(node.at("bin")).unwrap();
        let config = config.replace("SCRIPT", node.at("script").to_str().unwrap());
        std::fs::write(node.at("config.yaml"), config).unwrap();
        node
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn plugin(&self, name: &str, answer: &str) {
        let script = format!(
            "cat >>{asked}\necho \" $1 $REGION\" >>{asked}\ncat <<'END'\n{answer}\nEND\n",
            asked = self.at("asked").display()
        );
        std::fs::write(self.at("script"), script).unwrap();
        let _ = std::os::unix::fs::symlink("/bin/sh", self.at("bin").join(name));
    }

    fn files(&self) -> ProviderFiles {
        ProviderFiles { config: self.at("config.yaml"), bin_dir: self.at("bin") }
    }

    fn asked(&self) -> Vec<String> {
        std::fs::read_to_string(self.at("asked")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

fn config(name: &str, images: &str) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n  - name: {name}\n    \
         matchImages:\n      - \"{images}\"\n    defaultCacheDuration: \"12h\"\n    \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n    args:\n      - SCRIPT\n      - get-credentials\n    env:\n      - \
         name: REGION\n        value: north\n"
    )
}

fn answer(key: &str, more: &str) -> String {
    format!(
        r#"{{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType": "{key}", {more} "auth": {{
            "*.r.io": {{"username": "AWS", "password": "s3cret"}},
            "*.r.io/team": {{"username": "team", "password": "other"}}}}}}"#
    )
}

async fn user(providers: &Providers, registry: &str, repository: &str) -> Result<Option<String>, String> {
    let found = providers.get(registry, repository).await?;
    Ok(found.map(|found| match found.credential {
        Credential::Password { user, .. } => user,
        Credential::IdentityToken(_) | Credential::RegistryToken(_) => panic!("plugins have passwords"),
    }))
}

#[tokio::test]
async fn a_plugin_is_asked_once_for_a_registry() {
    let node = Node::new(&config("ecr", "*.r.io"));
    node.plugin("ecr", &answer("Registry", ""));
    let providers = Providers::new(node.files());
    assert_eq!(user(&providers, "a.r.io", "app").await.unwrap().as_deref(), Some("AWS"));
    assert_eq!(user(&providers, "a.r.io", "team/app").await.unwrap().as_deref(), Some("team"));
    assert_eq!(user(&providers, "other.io", "app").await.unwrap(), None, "nobody is for it");
    let request = r#"{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"a.r.io/app","kind":"CredentialProviderRequest"}"#;
    assert_eq!(node.asked(), [format!("{request} get-credentials north")]);
    assert_eq!(user(&providers, "b.r.io", "app").await.unwrap().as_deref(), Some("AWS"));
    assert_eq!(node.asked().len(), 2, "another registry is another question");
    let found = providers.get("a.r.io", "app").await.unwrap().unwrap();
    assert!(found.source.contains("plugin ecr") && !format!("{found:?}{providers:?}").contains("s3cret"));
}

#[tokio::test]
async fn answers_are_kept_as_they_say() {
    for (key, more, asked) in [
        ("Image", "", 2),
        ("Global", "", 1),
        ("Global", r#""cacheDuration": "0s","#, 4),
        ("Global", r#""cacheDuration": "1h","#, 1),
    ] {
        let node = Node::new(&config("p", "*.r.io"));
        node.plugin("p", &answer(key, more));
        let providers = Providers::new(node.files());
        for image in ["x", "y", "x", "y"] {
            user(&providers, "a.r.io", image).await.unwrap();
        }
        assert_eq!(node.asked().len(), asked, "{key} {more}");
    }
}

#[tokio::test]
async fn many_who_wait_ask_once() {
    let node = Node::new(&config("p", "*.r.io"));
    node.plugin("p", &answer("Registry", ""));
    let providers = Providers::new(node.files());
    let all = (0..8).map(|_| user(&providers, "a.r.io", "x"));
    for found in futures_util::future::join_all(all).await {
        assert_eq!(found.unwrap().as_deref(), Some("AWS"));
    }
    assert_eq!(node.asked().len(), 1);
}

#[tokio::test]
async fn one_that_fails_is_not_run_again_at_once() {
    let node = Node::new(&config("p", "*.r.io"));
    node.plugin("p", "nonsense");
    let providers = Providers::new(node.files());
    for image in ["x", "y", "x"] {
        assert!(user(&providers, "a.r.io", image).await.unwrap_err().contains("does not answer as"));
    }
    assert_eq!(node.asked().len(), 1);
    user(&providers, "b.r.io", "x").await.unwrap_err();
    assert_eq!(node.asked().len(), 2, "another registry is another question");
}

#[tokio::test]
async fn what_goes_wrong_is_told_without_secrets() {
    let node = Node::new(&config("p", "*.r.io"));
    // Each time anew: a failure is kept for a while.
    let fails = async || user(&Providers::new(node.files()), "a.r.io", "x").await.unwrap_err();
    assert!(fails().await.contains("could not be started"));
    for (said, why) in [("s3cret", "does not answer as"), (r#"{"kind": "x"}"#, "does not answer as")] {
        node.plugin("p", said);
        let error = fails().await;
        assert!(error.contains(why) && !error.contains("s3cret"), "{error}");
    }
    std::fs::write(node.at("script"), "echo s3cret\nexit 3\n").unwrap();
    assert!(fails().await.contains("exit status: 3"));
    // A plugin without a credential is none, and for public images nothing is wrong with that.
    node.plugin("p", &answer("Registry", "").replace("*.r.io", "elsewhere.io"));
    assert_eq!(user(&Providers::new(node.files()), "a.r.io", "x").await.unwrap(), None);
}

#[test]
fn configurations() {
    let read = |text: &str| {
        let node = Node::new(text);
        config::read(&node.at("config.yaml")).map(|providers| providers.len())
    };
    assert_eq!(read(&config("p", "x")), Ok(1));
    let json = r#"{"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [
        {"name": "p", "matchImages": ["x"], "defaultCacheDuration": "0s",
         "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1", "args": null}]}"#;
    assert_eq!(read(json), Ok(1));
    // It needs a token of the pod that wants the image.
    assert_eq!(
        read(&(config("p", "x") + "    tokenAttributes:\n      requireServiceAccount: true\n")),
        Ok(0)
    );
    for (text, why) in [
        (config("../p", "x"), "not that of a file"),
        (config("p", "x").replace("k8s.io/v1\n    args", "k8s.io/v9\n    args"), "apiVersion"),
        (config("p", "x").replace("12h", "12 hours"), "duration"),
        (config("p", "x").replace("kind: Cred", "kind: Bad"), "BadentialProviderConfig"),
        ("kind: [".to_owned(), "no CredentialProviderConfig"),
        ("- s3cret: 1".to_owned(), "no CredentialProviderConfig"),
    ] {
        let error = read(&text).unwrap_err();
        assert!(error.contains(why) && !error.contains("s3cret"), "{error}");
    }
}

#[test]
fn durations() {
    let of = |text| config::duration(text).map(|d| d.as_secs_f64());
    assert_eq!(of("1h30m"), Some(5400.0));
    assert_eq!(of("1.5s"), Some(1.5));
    assert_eq!((of("0"), of("0s"), of("250ms")), (Some(0.0), Some(0.0), Some(0.25)));
    for text in ["", "h", "5", "-5s", "1x", "1..2s", "99999999999999999999h"] {
        assert_eq!(of(text), None, "{text}");
    }
}
