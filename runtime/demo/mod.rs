//! The demonstration: a real image of the host's own files, an embedded registry, four ways to start.
