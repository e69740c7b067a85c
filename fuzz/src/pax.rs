//! Archives from the fuzzer's bytes.

const BLOCK: usize = 512;

/// The archive with the checksum of each header put right that says it is ustar or GNU.
pub(crate) fn mended(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar.chunks_exact_mut(BLOCK) {
        if block[257..262] == *b"ustar" {
            seal(block);
        }
    }
    tar
}

/// An archive of entries with PAX headers: `entries` are divided by bytes 0xff; each is its type flag, the length
/// of its body, the type flag of its extended header, and lines `key=value` that become the header's records.
pub(crate) fn archive(entries: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    for entry in entries.split(|byte| *byte == 0xff) {
        let [kind, len, extended, lines @ ..] = entry else { continue };
        let mut records = Vec::new();
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            // The length counts its own digits.
            let mut len = line.len() + 3;
            while format!("{len}").len() + line.len() + 2 != len {
                len += 1;
            }
            records.extend_from_slice(format!("{len} ").as_bytes());
            records.extend_from_slice(line);
            records.push(b'\n');
        }
        push(&mut tar, *extended, &records);
        push(&mut tar, *kind, &vec![b'1'; (*len).into()]);
    }
    tar.resize(tar.len() + 2 * BLOCK, 0);
    tar
}

/// An archive of one file.
pub(crate) fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    push_named(&mut tar, name, b'0', content);
    tar.resize(tar.len() + 2 * BLOCK, 0);
    tar
}

fn push(tar: &mut Vec<u8>, kind: u8, body: &[u8]) {
    push_named(tar, "name", kind, body);
}

fn push_named(tar: &mut Vec<u8>, name: &str, kind: u8, body: &[u8]) {
    let mut header = [0; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{:011o}", body.len()).as_bytes());
    header[156] = kind;
    header[157..161].copy_from_slice(b"link");
    header[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut header);
    tar.extend_from_slice(&header);
    tar.extend_from_slice(body);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}
