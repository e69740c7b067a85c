//! Mirrors, logins and what is told of them, with the whole program.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::{Fixture, TAG, big, sha256};
use crate::support::instance::Lazyrun;
use crate::support::proxy::Proxy;
use lazyrun::demo::registry::Registry;
use lazyrun::demo::shaper::Shape;

/// The big file takes about five seconds.
const SLOW: Shape = Shape { mbit: 40.0, rtt_ms: 5.0 };

/// A directory for `--hosts-dir` with this `hosts.toml` for a registry.
fn hosts_dir(lazyrun: &Lazyrun, registry: &str, toml: &str) -> String {
    let dir = lazyrun.scratch("hosts");
    fs::create_dir_all(dir.join(registry)).unwrap();
    fs::write(dir.join(registry).join("hosts.toml"), toml).unwrap();
    dir.to_str().unwrap().to_owned()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("no JSON ({e}): {text}"))
}

#[test]
fn a_container_outlives_the_mirror_that_it_was_started_from() {
    let fixture = Fixture::new();
    let mirror = Registry::serve(fixture.layout(), SLOW).expect("serve the image once more");
    let lazyrun = Lazyrun::new();
    let toml = format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirror.addr());
    let dir = hosts_dir(&lazyrun, &fixture.registry.addr().to_string(), &toml);
    let (flag, image) = ("--hosts-dir", fixture.image());

    lazyrun.ok(&[flag, &dir, "pull", "--quiet", &image]);
    // The mirror has no referrers API: for that alone the registry is asked.
    let asked = fixture.registry.log();
    let about_referrers = |t: &str| t.contains("/referrers/") || t.contains("/manifests/sha256-");
    assert!(asked.iter().all(|r| about_referrers(&r.target)), "{asked:?}");
    assert!(mirror.log().iter().all(|r| r.target.contains("ns=127.0.0.1")), "{:?}", mirror.log());
    lazyrun.ok(&["cache", "drop", &image]);

    mirror.reset();
    fixture.registry.reset();
    let args = [flag, &dir, "run", "-d", "--name", "reader", &image, "sleep", "1000"];
    lazyrun.ok(&args);
    assert_eq!(lazyrun.ok(&["exec", "reader", "cat", "/data/last"]), "behind the big file\n");
    assert!(mirror.stats().requests > 0, "the container did not start from the mirror");
    assert_eq!(fixture.registry.stats().requests, 0, "the registry was asked");
    drop(mirror);
    let sum = lazyrun.ok(&["exec", "reader", "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
    let rest = fixture.registry.stats().bytes_down;
    assert!(rest > 1 << 20, "only {rest} bytes came from the registry");
    lazyrun.ok(&["rm", "-f", "reader"]);

    // Not in the daemon's view only: what it found out is shown.
    lazyrun.ok(&[flag, &dir, "run", "--rm", "--pull", "always", &image, "true"]);
    assert!(fixture.registry.stats().requests > 0);
    let shown = json(&lazyrun.ok(&[flag, &dir, "registry", "show", "--format", "json", &image]));
    assert_eq!((&shown[0]["role"], &shown[0]["resting"]), (&"mirror".into(), &true.into()), "{shown}");
}

#[test]
fn what_would_be_asked_is_shown_without_a_daemon() {
    let lazyrun = Lazyrun::new();
    let toml = "server = \"https://s.example\"\n[host.\"https://m.example\"]\ncapabilities = [\"pull\"]\n\
                ca = \"ca.pem\"\n[host.\"https://m.example\".header]\nauthorization = \"Bearer s3cret\"\n";
    let dir = hosts_dir(&lazyrun, "r.example", toml);
    let config = lazyrun.scratch("docker");
    fs::write(
        config.join("config.json"),
        r#"{"auths": {"m.example": {"username": "ann", "password": "s3cret"}}}"#,
    )
    .unwrap();
    let run = |args: &[&str]| {
        let mut command = lazyrun.command(&["--hosts-dir", &dir, "registry", "show"]);
        command.args(args).env("DOCKER_CONFIG", &config).env("HTTPS_PROXY", "http://u:s3cret@p.example:3128");
        command.env("NO_PROXY", "s.example");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["r.example/team/app:v1"]);
    for part in [
        "1. https://m.example/v2/ (mirror)",
        "2. https://s.example/v2/ (origin)",
        "r.example/hosts.toml",
        "team/app (ns=r.example)",
        "password of ann from",
        "http://p.example:3128",
        "authorization",
        "ca.pem",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let shown = json(&run(&["--format", "json", "r.example"]));
    assert_eq!(shown[0]["capabilities"], serde_json::json!(["pull"]));
    assert_eq!((&shown[0]["repository"], &shown[1]["proxy"]), (&"".into(), &Value::Null));
    assert!(!format!("{text}{shown}").contains("s3cret"));
    assert!(lazyrun.daemon_pid().is_none(), "a daemon was started");

    fs::write(format!("{dir}/r.example/hosts.toml"), "\n[host.\n").unwrap();
    let line = lazyrun.fails(125, &["--hosts-dir", &dir, "registry", "show", "r.example"]);
    assert!(line.contains("hosts.toml, line 2"), "{line}");
}

#[test]
fn a_login_is_checked_and_kept_as_docker_keeps_it() {
    let fixture = Fixture::guarded("ann", "s3cret");
    let lazyrun = Lazyrun::new();
    let config = lazyrun.scratch("docker");
    let registry = fixture.registry.addr().to_string();
    let run = |args: &[&str], input: &str| {
        let path = lazyrun.scratch("input").join("password");
        fs::write(&path, input).unwrap();
        let mut command: Command = lazyrun.command(args);
        command.env("DOCKER_CONFIG", &config).stdin(fs::File::open(path).unwrap());
        command
            .env("PATH", format!("{}:{}", lazyrun.scratch("bin").display(), std::env::var("PATH").unwrap()));
        let output = command.output().unwrap();
        let said = [&output.stdout[..], &output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert!(!said.contains("s3cret") && !said.contains("wr0ng"), "{said}");
        (output.status.code(), said)
    };
    let login = ["login", "-u", "ann", "--password-stdin", &registry];
    let (code, said) = run(&login, "wr0ng\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(!config.join("config.json").exists());
    let (code, said) = run(&["pull", "--quiet", &fixture.image()], "");
    assert_ne!(code, Some(0), "{said}");
    assert!(said.contains(&format!("lazyrun login {registry}")), "{said}");

    let (code, said) = run(&login, "s3cret\n");
    assert!(code == Some(0) && said.contains("Login Succeeded"), "{said}");
    let kept = json(&fs::read_to_string(config.join("config.json")).unwrap());
    assert_eq!(kept["auths"][&registry]["auth"], "YW5uOnMzY3JldA==");
    let (code, said) = run(&["pull", "--quiet", &fixture.image()], "");
    assert_eq!(code, Some(0), "{said}");

    let (code, said) = run(&["logout", &registry], "");
    assert!(code == Some(0) && said.contains("Removing"), "{said}");
    assert!(json(&fs::read_to_string(config.join("config.json")).unwrap())["auths"].get(&registry).is_none());

    // By a credential helper, which gets what Docker's protocol says.
    let helper = lazyrun.scratch("bin").join("docker-credential-test");
    let store = lazyrun.scratch("store").join("kept");
    let script = format!(
        "#!/bin/sh\ncase $1 in\nstore) cat > {0};;\nget) cat {0} 2>/dev/null || {{ echo credentials not found in native \
         keychain; exit 1; }};;\nerase) rm {0};;\nesac\n",
        store.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(config.join("config.json"), r#"{"credsStore": "test"}"#).unwrap();
    let (code, said) = run(&login, "s3cret\n");
    assert!(code == Some(0) && said.contains("docker-credential-test"), "{said}");
    let given = json(&fs::read_to_string(&store).unwrap());
    assert_eq!((&given["ServerURL"], &given["Secret"]), (&registry.as_str().into(), &"s3cret".into()));
    assert!(!fs::read_to_string(config.join("config.json")).unwrap().contains("YW5u"));
    let (code, said) = run(&["logout", &registry], "");
    assert!(code == Some(0) && said.contains("Removing") && !store.exists(), "{said}");
}

#[test]
fn the_kubelets_plugins_have_the_credential() {
    let (fixture, lazyrun) = (Fixture::guarded("ann", "s3cret"), Lazyrun::new());
    let registry = fixture.registry.addr().to_string();
    let plugins = lazyrun.scratch("plugins");
    let (script, asked, config) =
        (plugins.join("script"), plugins.join("asked"), plugins.join("config.yaml"));
    let answer = serde_json::json!({
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry",
        "auth": {&registry: {"username": "ann", "password": "s3cret"}},
    });
    fs::write(&script, format!("cat >>{0}; echo >>{0}; echo '{answer}'\n", asked.display())).unwrap();
    std::os::unix::fs::symlink("/bin/sh", plugins.join("cloud")).unwrap();
    let provider = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: cloud\n  \
         matchImages: [\"127.0.0.*:{}\"]\n  defaultCacheDuration: 1h\n  apiVersion: \
         credentialprovider.kubelet.k8s.io/v1\n  args: [{script:?}]\n",
        fixture.registry.addr().port(),
    );
    fs::write(&config, provider).unwrap();
    let run = |args: &[&str]| {
        let mut command = lazyrun.command(args);
        command.env("DOCKER_CONFIG", lazyrun.scratch("docker"));
        command.env("LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_CONFIG", &config);
        command.env("LAZYRUN_IMAGE_CREDENTIAL_PROVIDER_BIN_DIR", &plugins);
        let output = command.output().unwrap();
        let said = String::from_utf8([&output.stdout[..], &output.stderr].concat()).unwrap();
        assert!(output.status.success() && !said.contains("s3cret"), "{said}");
        said
    };
    run(&["pull", "--quiet", &fixture.image()]);
    let shown = run(&["registry", "show", &fixture.image()]);
    assert!(shown.contains("of ann from the plugin cloud"), "{shown}");
    let asked = fs::read_to_string(&asked).unwrap();
    assert_eq!(asked.lines().count(), 1, "one answer is for all images of the registry: {asked}");
    let image = fixture.image();
    assert_eq!(json(&asked)["image"], image.rsplit_once(':').expect("a tag").0);
}

#[test]
fn a_real_mirror_serves_a_real_registry() {
    let fixture = Fixture::new();
    let origin = DockerRegistry::start();
    let image = origin.push(fixture.layout(), TAG, "team/fixture");
    let mirror = DockerRegistry::mirror_of(&origin);
    let lazyrun = Lazyrun::new();
    let toml = format!("[host.\"http://{}\"]\n", mirror.addr());
    let dir = hosts_dir(&lazyrun, &origin.addr().to_string(), &toml);
    let run = ["--hosts-dir", &dir, "run", "--rm", &image, "cat", "/data/last"];
    assert_eq!(lazyrun.ok(&run), "behind the big file\n");
    drop(mirror);
    lazyrun.ok(&["cache", "drop"]);
    let sum = lazyrun.ok(&["--hosts-dir", &dir, "run", "--rm", &image, "sha256sum", "/data/big.bin"]);
    assert!(sum.starts_with(&sha256(&big())), "{sum}");
}

#[test]
fn the_daemon_uses_the_proxy_of_the_environment_it_was_started_in() {
    let fixture = Fixture::new();
    let proxy = Proxy::start(fixture.registry.addr());
    let lazyrun = Lazyrun::new();
    let dir = hosts_dir(&lazyrun, "plain.example:5000", "server = \"http://plain.example:5000\"\n");
    let image = format!("plain.example:5000/fixture:{TAG}");
    let run = |args: &[&str], with_proxy: bool| {
        let mut command = lazyrun.command(&["--hosts-dir", &dir]);
        command.args(args);
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "https_proxy", "no_proxy", "http_proxy"] {
            command.env_remove(name);
        }
        if with_proxy {
            command.env("http_proxy", proxy.url());
        }
        let output = command.output().expect("run lazyrun");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    run(&["pull", "--quiet", &image], true);
    let asked = proxy.asked();
    assert!(
        asked.iter().all(|line| line.starts_with("GET http://plain.example:5000/v2/fixture/")),
        "{asked:?}"
    );
    assert!(asked.len() >= 5, "{asked:?}");
    // The daemon's environment counts, not the command's.
    run(&["cache", "drop"], false);
    assert_eq!(run(&["run", "--rm", &image, "cat", "/data/last"], false), "behind the big file\n");
    assert!(proxy.asked().len() > asked.len());
    let shown = json(&run(&["registry", "show", "--format", "json", &image], false));
    assert_eq!(shown[0]["proxy"], proxy.url().as_str());
}

#[test]
fn a_short_name_that_podman_would_look_for_elsewhere_is_told() {
    let lazyrun = Lazyrun::new();
    let nobody = crate::support::server::free_port();
    let dir = hosts_dir(&lazyrun, "docker.io", &format!("server = \"http://127.0.0.1:{nobody}\"\n"));
    let conf = lazyrun.scratch("containers").join("registries.conf");
    fs::write(&conf, "unqualified-search-registries = [\"quay.io\", \"docker.io\"]\n").unwrap();
    let run = |args: &[&str]| {
        let mut command = lazyrun.command(&["--hosts-dir", &dir]);
        let output =
            command.args(args).env("CONTAINERS_REGISTRIES_CONF", &conf).output().expect("run lazyrun");
        (output.status.code(), String::from_utf8(output.stderr).expect("text"))
    };
    let (code, said) = run(&["pull", "--quiet", "redis:7"]);
    assert!(code == Some(125) && said.contains("mean quay.io, docker.io"), "{said}");
    let (code, said) = run(&["pull", "--quiet", "docker.io/library/redis:7"]);
    assert!(code == Some(125) && !said.contains("quay.io"), "{said}");
    let (code, said) = run(&["registry", "show", "redis"]);
    assert!(code == Some(0) && said.contains("quay.io"), "{said}");
    fs::write(&conf, "[[registry]]\nlocation = \"docker.io\"\nblocked = true\n").unwrap();
    let (code, said) = run(&["pull", "--quiet", "another"]);
    assert!(code == Some(125) && said.contains("blocked by") && said.contains("registries.conf"), "{said}");
}
