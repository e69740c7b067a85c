//! Ids and made-up names for containers.

use std::io::Read;

const ADJECTIVES: &[&str] = &[
    "brisk", "calm", "clever", "cosy", "eager", "early", "easy", "fresh", "gentle", "happy", "idle", "keen",
    "lazy", "light", "lively", "mellow", "nimble", "patient", "placid", "prompt", "quick", "quiet", "ready",
    "sleepy", "snug", "steady", "swift", "tidy", "wakeful", "witty",
];
const NOUNS: &[&str] = &[
    "badger", "bear", "beaver", "cat", "crane", "dormouse", "finch", "fox", "gecko", "heron", "ibis",
    "kestrel", "koala", "lemur", "lynx", "marmot", "moth", "newt", "otter", "owl", "panda", "quail", "raven",
    "seal", "sloth", "snail", "stoat", "tortoise", "wombat", "wren",
];

/// Random bytes from the kernel.
fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // /dev/urandom is there wherever /dev is; without it ids would repeat and be refused as taken.
    if let Ok(mut source) = std::fs::File::open("/dev/urandom") {
        let _ = source.read_exact(&mut bytes);
    }
    bytes
}

/// A container id: 64 hex digits.
pub fn id() -> String {
    random_bytes::<32>().iter().map(|b| format!("{b:02x}")).collect()
}

/// A made-up name such as `lazy_otter42`.
pub fn random() -> String {
    let [a, b, c, d] = random_bytes::<4>();
    let number = u16::from_le_bytes([c, d]) % 1000;
    format!(
        "{}_{}{number}",
        ADJECTIVES[usize::from(a) % ADJECTIVES.len()],
        NOUNS[usize::from(b) % NOUNS.len()]
    )
}
