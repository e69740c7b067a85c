//! Container networking: bridge with NAT, port publishing, name files.
