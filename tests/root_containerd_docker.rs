//! Docker with containerd's image store on top of the snapshotter: `make test-containerd` runs this with Debian's.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use lazyrun::demo::shaper::Shape;

use crate::support::containerd::{Containerd, PROXY};
use crate::support::docker_registry::DockerRegistry;
use crate::support::fixture::sha256;
use crate::support::indexed::Indexed;
use crate::support::server::Server;
use crate::support::snapshotter::Snapshotter;
use crate::support::wait_for;

/// A running dockerd.
struct Docker {
    address: String,
    _server: Server,
}

impl Docker {
    fn start(containerd: &Containerd, dir: &Path) -> Docker {
        let at = |name: &str| dir.join(name).to_str().expect("a path in UTF-8").to_owned();
        let address = format!("unix://{}", at("s"));
        let namespace = containerd.namespace();
        // No network of its own: the host's is not to be touched.
        let mut command = Command::new("dockerd");
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--userland-proxy=false"]);
        command.args(["--storage-driver", PROXY]);
        command.args(["--host", &address, "--pidfile", &at("pid")]);
        command.args(["--data-root", &at("data"), "--exec-root", &at("exec")]);
        command.arg("--containerd").arg(containerd.socket());
        command.args(["--containerd-namespace", namespace]);
        command.args(["--containerd-plugins-namespace", &format!("{namespace}-plugins")]);
        let features = r#"{"features": {"containerd-snapshotter": true}}"#;
        std::fs::write(at("daemon.json"), features).expect("write dockerd's configuration");
        command.args(["--config-file", &at("daemon.json")]);
        let mut server = Server::start(&mut command, &dir.join("log"));
        wait_for("dockerd to answer", Duration::from_secs(60), || {
            server.assert_alive();
            let info = docker(&address).arg("info").output().expect("run docker");
            info.status.success().then_some(())
        });
        Docker { address, _server: server }
    }

    fn run(&self, args: &[&str]) -> Output {
        docker(&self.address).args(args).output().expect("run docker")
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn docker(address: &str) -> Command {
    let mut command = Command::new("docker");
    command.args(["--host", address]);
    command
}

#[test]
#[ignore = "needs dockerd: make test-containerd"]
fn a_lazy_image_is_committed_saved_and_pushed() {
    let (indexed, registry) = (Indexed::behind(Shape::default()), DockerRegistry::start());
    let (image, snapshotter) = (&indexed.image, Snapshotter::start());
    snapshotter.lazyrun.ok(&["hydrate", "--pause"]);
    let containerd = snapshotter.containerd_with_differ();
    let docker = Docker::start(&containerd, &snapshotter.lazyrun.scratch("docker"));
    docker.ok(&["pull", "--quiet", image]);
    let content = containerd.output(["content", "ls", "-q"]);
    for layer in &indexed.fixture.layers {
        assert!(!content.contains(&layer.digest), "a layer was downloaded: {content}");
    }
    let script = "echo by the container >/data/new && cat /data/first";
    let args = ["run", "--name", "work", "--network", "none", image, "sh", "-c", script];
    assert_eq!(docker.ok(&args), "replaced\n");
    let before = indexed.shaper.traffic().bytes_down;
    docker.ok(&["commit", "work", "made:1"]);
    assert_eq!(indexed.shaper.traffic().bytes_down, before, "no byte of the image is read for a commit");

    let pushed = format!("{}/made:1", registry.addr());
    docker.ok(&["tag", "made:1", &pushed]);
    let refused = docker.run(&["push", "--quiet", &pushed]);
    assert!(!refused.status.success());
    // The layers that the commit took over from the image are those that are missing.
    let args = ["containerd", "fetch", "-n", containerd.namespace(), "--format", "{{.Fetched}}", "made:1"];
    assert_eq!(snapshotter.lazyrun.ok(&args), "3\n");
    docker.ok(&["push", "--quiet", &pushed]);
    for layer in &indexed.fixture.layers {
        assert_eq!(sha256(&registry.blob(&layer.digest)), layer.digest[7..]);
    }
    let archive = snapshotter.lazyrun.scratch("saved").join("tar");
    docker.ok(&["save", "--output", archive.to_str().unwrap(), "made:1"]);
    let mut saved = tar::Archive::new(std::fs::File::open(&archive).unwrap());
    let entries = saved.entries().unwrap().map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned());
    let names: Vec<String> = entries.collect();
    for layer in &indexed.fixture.layers {
        assert!(names.contains(&format!("blobs/sha256/{}", &layer.digest[7..])), "{names:?}");
    }
    let args = ["run", "--rm", "--network", "none", "made:1", "cat", "/data/new"];
    assert_eq!(docker.ok(&args), "by the container\n");
    docker.ok(&["rm", "work"]);
    for name in [image, "made:1", &pushed] {
        docker.ok(&["rmi", name]);
    }
}
