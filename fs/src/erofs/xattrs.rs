//! Extended attributes, inline behind each inode.

use crate::view::{Inode, escaped};

/// `e_name_index` of the namespaces; the name without its prefix is stored.
const NAMESPACES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
];
const HEADER: usize = 12;
/// What `i_xattr_icount` can say.
pub(super) const MAX: u64 = HEADER as u64 + 4 * (u16::MAX as u64 - 1);

/// Name index, suffix and value of each attribute that can be stored. A name that is too long once it is
/// escaped is left out: nothing else keeps it from acting.
fn each(inode: &Inode, mut with: impl FnMut(u8, &[u8], &[u8])) {
    for xattr in &inode.xattrs {
        let name = escaped(&xattr.name);
        let Ok(len) = u16::try_from(xattr.value.len()) else { continue };
        for (prefix, index) in NAMESPACES {
            if let Some(suffix) = name.strip_prefix(prefix) {
                if name.len() <= 255 {
                    with(index, suffix, &xattr.value[..usize::from(len)]);
                }
                break;
            }
        }
    }
}

fn entry_len(suffix: &[u8], value: &[u8]) -> usize {
    (4 + suffix.len() + value.len()).next_multiple_of(4)
}

/// Bytes that [`encode`] writes.
pub(super) fn encoded_len(inode: &Inode) -> u64 {
    let mut len = 0;
    each(inode, |_, suffix, value| len += entry_len(suffix, value));
    if len == 0 { 0 } else { (HEADER + len) as u64 }
}

/// Appends the attributes to `out`.
pub(super) fn encode(inode: &Inode, out: &mut Vec<u8>) {
    let start = out.len();
    each(inode, |index, suffix, value| {
        if out.len() == start {
            out.extend_from_slice(&[0; HEADER]);
        }
        let end = out.len() + entry_len(suffix, value);
        // Both lengths were checked in `each`.
        out.extend_from_slice(&[suffix.len() as u8, index]);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(suffix);
        out.extend_from_slice(value);
        out.resize(end, 0);
    });
}
