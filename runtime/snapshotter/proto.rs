//! containerd's services as they are published, compiled by `runtime/snapshotter/proto/generate` and kept here;
//! `tests/tools/proto.sh check` compares.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]

/// `containerd.types`.
pub mod types {
    include!("proto/generated/containerd.types.rs");
}

/// `containerd.services`.
pub mod services {
    /// `containerd.services.content`.
    pub mod content {
        /// `containerd.services.content.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.content.v1.rs");
        }
    }

    /// `containerd.services.diff`.
    pub mod diff {
        /// `containerd.services.diff.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.diff.v1.rs");
        }
    }

    /// `containerd.services.images`.
    pub mod images {
        /// `containerd.services.images.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.images.v1.rs");
        }
    }

    /// `containerd.services.leases`.
    pub mod leases {
        /// `containerd.services.leases.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.leases.v1.rs");
        }
    }

    /// `containerd.services.snapshots`.
    pub mod snapshots {
        /// `containerd.services.snapshots.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.snapshots.v1.rs");
        }
    }

    /// `containerd.services.version`.
    pub mod version {
        /// `containerd.services.version.v1`.
        pub mod v1 {
            include!("proto/generated/containerd.services.version.v1.rs");
        }
    }
}
