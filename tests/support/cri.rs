//! A client of CRI, as the kubelet is one: only the fields that the tests need.

use std::path::Path;
use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Defines messages by their fields' numbers (`k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`).
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty = ($($attr:tt)*)),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, PartialEq, prost::Message)]
        pub struct $name {
            $( #[allow(missing_docs, reason = "as in the protocol")] #[prost($($attr)*)] pub $field: $kind, )*
        }
    )* };
}

messages! {
    /// Names an image.
    ImageSpec { image: String = (string, tag = "1") }
    /// A pull secret.
    AuthConfig { username: String = (string, tag = "1"), password: String = (string, tag = "2") }
    /// `PullImage`.
    PullImage {
        image: Option<ImageSpec> = (message, optional, tag = "1"),
        auth: Option<AuthConfig> = (message, optional, tag = "2"),
    }
    /// Its answer.
    Pulled { image_ref: String = (string, tag = "1") }
    /// `ImageStatus` and `RemoveImage`.
    OneImage { image: Option<ImageSpec> = (message, optional, tag = "1") }
    /// An image that is there.
    Image { id: String = (string, tag = "1"), repo_tags: Vec<String> = (string, repeated, tag = "2") }
    /// The answer of `ImageStatus`.
    ImageStatus { image: Option<Image> = (message, optional, tag = "1") }
    /// The answer of `ListImages`.
    Images { images: Vec<Image> = (message, repeated, tag = "1") }
    /// Nothing, or nothing of interest.
    Nothing {}
    /// Name, uid and namespace of a pod.
    PodMetadata {
        name: String = (string, tag = "1"),
        uid: String = (string, tag = "2"),
        namespace: String = (string, tag = "3"),
    }
    /// Which namespaces a pod has: 0 its own, 2 the node's.
    NamespaceOptions { network: i32 = (int32, tag = "1") }
    /// How a pod is kept in.
    SandboxSecurity { namespaces: Option<NamespaceOptions> = (message, optional, tag = "1") }
    /// What a pod is on Linux.
    LinuxSandbox { security: Option<SandboxSecurity> = (message, optional, tag = "2") }
    /// A pod.
    PodSandbox {
        metadata: Option<PodMetadata> = (message, optional, tag = "1"),
        hostname: String = (string, tag = "2"),
        linux: Option<LinuxSandbox> = (message, optional, tag = "8"),
    }
    /// `RunPodSandbox`.
    RunPod { config: Option<PodSandbox> = (message, optional, tag = "1") }
    /// A pod's or container's id, in requests and answers.
    Id { id: String = (string, tag = "1") }
    /// A container.
    ContainerConfig {
        metadata: Option<PodMetadata> = (message, optional, tag = "1"),
        image: Option<ImageSpec> = (message, optional, tag = "2"),
        command: Vec<String> = (string, repeated, tag = "3"),
    }
    /// `CreateContainer`.
    CreateContainer {
        pod: String = (string, tag = "1"),
        config: Option<ContainerConfig> = (message, optional, tag = "2"),
        sandbox: Option<PodSandbox> = (message, optional, tag = "3"),
    }
    /// `ExecSync`.
    Exec { container: String = (string, tag = "1"), cmd: Vec<String> = (string, repeated, tag = "2") }
    /// Its answer.
    Executed {
        stdout: Vec<u8> = (bytes = "vec", tag = "1"),
        stderr: Vec<u8> = (bytes = "vec", tag = "2"),
        exit_code: i32 = (int32, tag = "3"),
    }
}

/// A connection to a socket.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
    version: &'static str,
}

impl Cri {
    /// CRI v1 at a socket.
    pub fn at(socket: &Path) -> Cri {
        Cri::version_at("v1", socket)
    }

    /// CRI of a version at a socket.
    pub fn version_at(version: &'static str, socket: &Path) -> Cri {
        let runtime = Runtime::new().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Cri { runtime, channel, version }
    }

    /// Calls a method of `ImageService` or `RuntimeService`.
    pub fn call<M, A>(&self, service: &str, method: &str, message: M) -> Result<A, Status>
    where
        M: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let path = format!("/runtime.{}.{service}/{method}", self.version).parse().expect("a path");
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let codec = tonic_prost::ProstCodec::<M, A>::default();
        self.runtime.block_on(async {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let mut request = Request::new(message);
            request.set_timeout(Duration::from_secs(120));
            Ok(client.unary(request, path, codec).await?.into_inner())
        })
    }

    /// Calls a method of `ImageService`.
    pub fn image<M, A>(&self, method: &str, message: M) -> Result<A, Status>
    where
        M: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.call("ImageService", method, message)
    }

    /// Calls a method of `RuntimeService` that must succeed.
    pub fn run<M, A>(&self, method: &str, message: M) -> A
    where
        M: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.call("RuntimeService", method, message).unwrap_or_else(|status| panic!("{method}: {status}"))
    }

    /// Pulls an image with a user's password, if there is one.
    pub fn pull(&self, image: &str, secret: Option<(&str, &str)>) -> Result<Pulled, Status> {
        let auth = secret.map(|(user, word)| AuthConfig { username: user.into(), password: word.into() });
        self.image("PullImage", PullImage { image: Some(named(image)), auth })
    }
}

/// An image by its reference.
pub fn named(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned() }
}
