//! Containers: OCI specs, the shim that parents each one, and the built-in runner.
