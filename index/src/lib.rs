//! What an OCI layer contains and where its bytes are.
