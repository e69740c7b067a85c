//! Which extended attributes of an image a view shows, and how those are written that overlayfs would obey.

use std::borrow::Cow;

use super::inode::Kind;

/// overlayfs' own namespaces: with `trusted.` and, under the option `userxattr`, with `user.`
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The name under which an attribute must be served below an overlay mount, so that an image's own
/// `trusted.overlay.*` does not act. overlayfs takes the escape away again (Linux 6.7 and later), as its
/// document says under "Nesting overlayfs mounts".
pub fn escaped(name: &[u8]) -> Cow<'_, [u8]> {
    for prefix in OVERLAY {
        if let Some(rest) = name.strip_prefix(prefix) {
            return Cow::Owned([prefix, b"overlay.", rest].concat());
        }
    }
    Cow::Borrowed(name)
}

/// Whether the kernel would let this attribute be set on a file of this kind; what it would not is left out,
/// as containerd leaves it out.
pub(super) fn settable(kind: Kind, name: &[u8], value: &[u8]) -> bool {
    let plain = matches!(kind, Kind::File | Kind::Directory);
    let in_namespace = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
    // XATTR_NAME_MAX and XATTR_SIZE_MAX.
    if name.len() > 255 || value.len() > 65_536 || name.contains(&0) {
        return false;
    }
    match name {
        b"system.posix_acl_access" => kind != Kind::Symlink && is_acl(value),
        b"system.posix_acl_default" => kind == Kind::Directory && is_acl(value),
        _ if in_namespace(b"user.") => plain,
        _ => in_namespace(b"trusted.") || in_namespace(b"security."),
    }
}

/// The form of `struct posix_acl_xattr_header` and its entries.
fn is_acl(value: &[u8]) -> bool {
    value.starts_with(&[2, 0, 0, 0]) && value.len() % 8 == 4
}
