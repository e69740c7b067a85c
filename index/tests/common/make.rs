//! Makes blobs the ways real tools do.

use std::ffi::c_int;

use libz_rs_sys as z;

/// Deflate's strategies, as zlib numbers them.
pub(crate) const DEFAULT: c_int = z::Z_DEFAULT_STRATEGY;
pub(crate) const FIXED: c_int = z::Z_FIXED;
pub(crate) const HUFFMAN_ONLY: c_int = z::Z_HUFFMAN_ONLY;

/// One gzip member.
pub(crate) fn gzip(data: &[u8], level: c_int, strategy: c_int) -> Vec<u8> {
    let mut stream = z::z_stream::default();
    let size = size_of::<z::z_stream>() as c_int;
    // SAFETY: a default-initialised stream with its own size; 31 asks for gzip framing.
    let code =
        unsafe { z::deflateInit2_(&raw mut stream, level, 8, 31, 8, strategy, z::zlibVersion(), size) };
    assert_eq!(code, z::Z_OK);
    let mut out = vec![0; data.len() + data.len() / 100 + 100_000];
    stream.next_in = data.as_ptr();
    stream.avail_in = data.len() as u32;
    stream.next_out = out.as_mut_ptr();
    stream.avail_out = out.len() as u32;
    // SAFETY: the pointers and lengths are those of live slices.
    let code = unsafe { z::deflate(&raw mut stream, z::Z_FINISH) };
    assert_eq!(code, z::Z_STREAM_END);
    out.truncate(out.len() - stream.avail_out as usize);
    // SAFETY: the stream was initialised above.
    unsafe { z::deflateEnd(&raw mut stream) };
    out
}

/// Deflate data with a flush after every `piece` bytes.
fn deflate(data: &[u8], piece: usize, flush: c_int) -> Vec<u8> {
    let mut stream = z::z_stream::default();
    let size = size_of::<z::z_stream>() as c_int;
    // SAFETY: a default-initialised stream with its own size; -15 asks for raw deflate.
    let code = unsafe { z::deflateInit2_(&raw mut stream, 6, 8, -15, 8, 0, z::zlibVersion(), size) };
    assert_eq!(code, z::Z_OK);
    let mut out = vec![0; data.len() + data.len() / piece * 100 + 100_000];
    stream.next_out = out.as_mut_ptr();
    stream.avail_out = out.len() as u32;
    for part in data.chunks(piece) {
        stream.next_in = part.as_ptr();
        stream.avail_in = part.len() as u32;
        // SAFETY: the pointers and lengths are those of live slices.
        assert_eq!(unsafe { z::deflate(&raw mut stream, flush) }, z::Z_OK);
    }
    // SAFETY: as above.
    assert_eq!(unsafe { z::deflate(&raw mut stream, z::Z_FINISH) }, z::Z_STREAM_END);
    out.truncate(out.len() - stream.avail_out as usize);
    // SAFETY: the stream was initialised above.
    unsafe { z::deflateEnd(&raw mut stream) };
    out
}

fn framed(data: &[u8], extra: &[u8], deflated: &[u8]) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, if extra.is_empty() { 0 } else { 4 }, 0, 0, 0, 0, 0, 255];
    if !extra.is_empty() {
        out.extend((extra.len() as u16).to_le_bytes());
        out.extend(extra);
    }
    out.extend(deflated);
    // SAFETY: pointer and length are those of a live slice.
    let crc = unsafe { z::crc32_z(0, data.as_ptr(), data.len()) as u32 };
    out.extend(crc.to_le_bytes());
    out.extend((data.len() as u32).to_le_bytes());
    out
}

/// One gzip member with an extra field.
pub(crate) fn gzip_member(data: &[u8], extra: &[u8]) -> Vec<u8> {
    framed(data, extra, &deflate(data, usize::MAX, 0))
}

/// One gzip member that is flushed after every `piece` bytes.
pub(crate) fn gzip_flushed(data: &[u8], piece: usize, flush: c_int) -> Vec<u8> {
    framed(data, &[], &deflate(data, piece, flush))
}

/// One zstd frame.
pub(crate) fn zstd(data: &[u8], level: i32) -> Vec<u8> {
    zstd::bulk::compress(data, level).unwrap()
}

/// Bytes that are neither random nor all the same, from a fixed seed.
pub(crate) fn text(len: usize, mut seed: u64) -> Vec<u8> {
    let mut next = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let words: Vec<Vec<u8>> =
        (0..500).map(|_| (0..next() % 9 + 2).map(|_| b'a' + (next() % 26) as u8).collect()).collect();
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        if next() % 50 == 0 {
            out.extend((0..next() % 200).map(|_| next() as u8));
        }
        out.extend_from_slice(&words[next() % words.len()]);
        out.push(b' ');
    }
    out.truncate(len);
    out
}

/// A tar with `files` files of up to `max` bytes, directories and links.
pub(crate) fn archive(files: usize, max: usize, seed: u64) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for i in 0..files {
        let data = text((i * 7919 + 13) % max, seed + i as u64);
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_600_000_000 + i as u64);
        header.set_entry_type(tar::EntryType::Regular);
        let name = format!("dir{}/{}file{i}", i % 10, "long-name-".repeat(i % 20));
        tar.append_data(&mut header, &name, &data[..]).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        tar.append_link(&mut header, format!("link{i}"), &name).unwrap();
    }
    tar.into_inner().unwrap()
}

/// An archive with one entry of every kind, some files in it large enough for several spans.
pub(crate) fn zoo() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let header = |kind, size| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o755);
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(1_700_000_000);
        header
    };
    let pax = |tar: &mut tar::Builder<Vec<u8>>, records: &[(&str, &[u8])]| {
        tar.append_pax_extensions(records.iter().copied()).unwrap();
    };
    let mut add = |path: &str, kind, data: &[u8], link: &str, records: &[(&str, &[u8])]| {
        if !records.is_empty() {
            pax(&mut tar, records);
        }
        let mut header = header(kind, data.len() as u64);
        if matches!(kind, tar::EntryType::Char) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        if link.is_empty() {
            tar.append_data(&mut header, path, data).unwrap();
        } else {
            tar.append_link(&mut header, path, link).unwrap();
        }
    };
    use tar::EntryType as T;
    add("bin/", T::Directory, b"", "", &[]);
    let attributes: [(&str, &[u8]); 3] =
        [("mtime", b"1600000000.7"), ("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"2")];
    add("bin/tool", T::Regular, &text(90_000, 1), "", &attributes);
    add("bin/alias", T::Symlink, b"", "tool", &[]);
    add("bin/second", T::Link, b"", "bin/tool", &[]);
    add("null", T::Char, b"", "", &[]);
    add("pipe", T::Fifo, b"", "", &[]);
    for i in 0..40 {
        add(&format!("lib/{i}"), T::Regular, &text(9000, 10 + i), "", &[]);
    }
    add("empty", T::Regular, b"", "", &[]);
    tar.into_inner().unwrap()
}
