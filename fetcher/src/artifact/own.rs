//! Our own index artifact: how its manifest and its blobs are made and read.

use std::io::Read as _;

use bytes::Bytes;
use lazyrun_index::{Digest, LayerIndex};
use serde_json::{Map, Value, json};

use super::descriptor::Descriptor;
use super::document::subject_of;
use super::{
    CREATED, FORMAT, LAYER_DIFF_ID, LAYER_DIGEST, MAX_PROFILE, OWN_ARTIFACT_TYPE, OWN_LAYER_INDEX,
    OWN_LAYER_INDEX_ZSTD, OWN_PROFILE_ZSTD, SPAN_SIZE, index_limit,
};
use crate::manifest::{LayerDescriptor, OCI_MANIFEST, ResolvedImage};

/// The config of an artifact that has none (image-spec, "Guidance for an Empty Descriptor").
pub(super) const EMPTY_CONFIG: &[u8] = b"{}";
const EMPTY_CONFIG_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// Above this the indexes of real layers hardly shrink further, but it takes ten times as long.
const LEVEL: i32 = 3;
/// Profiles are short.
const PROFILE_LEVEL: i32 = 12;
/// Largest window that is decoded, as a power of two: what the level above uses is far below.
const WINDOW_LOG: u32 = 27;

/// One layer's index, ready to be uploaded.
pub(super) struct OwnBlob {
    pub(super) descriptor: Descriptor,
    pub(super) bytes: Bytes,
    pub(super) format: u32,
}

/// Makes the blob for a layer from its index, which must be valid and of this layer.
///
/// # Errors
/// What is wrong with the index, as the end of a sentence.
pub(super) fn make_blob(layer: &LayerDescriptor, index: Vec<u8>) -> Result<OwnBlob, String> {
    let packed = zstd::bulk::compress(&index, LEVEL).map_err(|e| format!("it cannot be compressed: {e}"))?;
    let format = format_of(&index);
    check_index(index, layer)?;
    let mut descriptor = Descriptor::new(OWN_LAYER_INDEX_ZSTD, Digest::of(&packed), packed.len() as u64);
    for (key, value) in [(LAYER_DIGEST, layer.digest), (LAYER_DIFF_ID, layer.diff_id)] {
        descriptor.annotations.insert(key.to_owned(), value.to_string());
    }
    Ok(OwnBlob { descriptor, bytes: packed.into(), format })
}

/// The format version in an index's header; 0 if there is none.
fn format_of(index: &[u8]) -> u32 {
    index.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Gets the index out of a blob and checks that it is one, and of this layer.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub(crate) fn decode_blob(blob: Bytes, media_type: &str, layer: &LayerDescriptor) -> Result<Vec<u8>, String> {
    let index = match media_type {
        OWN_LAYER_INDEX => Vec::from(blob),
        _ => unpack(&blob, index_limit(layer.size))?,
    };
    check_index(index, layer)
}

/// Makes the blob of a profile.
///
/// # Errors
/// When it is too long, as the end of a sentence.
pub(super) fn make_profile(profile: &[u8]) -> Result<(Descriptor, Bytes), String> {
    if profile.len() as u64 > MAX_PROFILE {
        return Err(format!("it is longer than {MAX_PROFILE} bytes"));
    }
    let packed =
        zstd::bulk::compress(profile, PROFILE_LEVEL).map_err(|e| format!("it cannot be compressed: {e}"))?;
    Ok((Descriptor::new(OWN_PROFILE_ZSTD, Digest::of(&packed), packed.len() as u64), packed.into()))
}

/// Gets the profile out of a blob. What it says is not looked at here.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub(crate) fn decode_profile(blob: &[u8]) -> Result<Vec<u8>, String> {
    unpack(blob, MAX_PROFILE)
}

fn unpack(blob: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let fail = |e: std::io::Error| format!("it cannot be decompressed: {e}");
    let mut decoder = zstd::stream::read::Decoder::with_buffer(blob).map_err(fail)?;
    decoder.window_log_max(WINDOW_LOG).map_err(fail)?;
    let mut index = Vec::new();
    // Room is made as bytes come: what the frame's header says of its length is not believed.
    decoder.take(limit + 1).read_to_end(&mut index).map_err(fail)?;
    if index.len() as u64 > limit {
        return Err(format!("it is larger than the {limit} bytes allowed for it"));
    }
    Ok(index)
}

/// Gives the index back if it is valid and of this layer.
fn check_index(index: Vec<u8>, layer: &LayerDescriptor) -> Result<Vec<u8>, String> {
    // The check takes the bytes; a copy is made so that only one form goes on to the store.
    let parsed = LayerIndex::from_bytes(index.clone()).map_err(|e| e.to_string())?;
    check_parsed(&parsed, layer)?;
    Ok(index)
}

/// Whether an index is of this layer.
pub(crate) fn check_parsed(index: &LayerIndex, layer: &LayerDescriptor) -> Result<(), String> {
    if index.blob_digest() != layer.digest {
        return Err(format!("it is of another blob, {}", index.blob_digest()));
    }
    if index.blob_size() != layer.size {
        let (said, is) = (index.blob_size(), layer.size);
        return Err(format!("it says that the blob has {said} bytes, but the manifest says {is}"));
    }
    if index.diff_id() != layer.diff_id {
        return Err(format!("it is of diffID {}, but the config says {}", index.diff_id(), layer.diff_id));
    }
    Ok(())
}

/// What an artifact says about itself beside its blobs.
#[derive(Default)]
pub(super) struct About<'a> {
    pub(super) format: u32,
    pub(super) span_size: Option<u64>,
    pub(super) created: Option<&'a str>,
}

/// The artifact's manifest. The same indexes of the same image give the same bytes, so that pushing them again
/// changes nothing in the registry.
pub(super) fn make_manifest(
    image: &ResolvedImage,
    blobs: &[Descriptor],
    about: &About<'_>,
) -> (Descriptor, Bytes) {
    let mut annotations = Map::new();
    annotations.insert(FORMAT.to_owned(), json!(about.format.to_string()));
    if let Some(span_size) = about.span_size {
        annotations.insert(SPAN_SIZE.to_owned(), json!(span_size.to_string()));
    }
    if let Some(created) = about.created {
        annotations.insert(CREATED.to_owned(), json!(created));
    }
    let config = Descriptor::new(EMPTY_CONFIG_TYPE, Digest::of(EMPTY_CONFIG), EMPTY_CONFIG.len() as u64);
    // Objects of serde_json are sorted by key, so this is one text only.
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": OWN_ARTIFACT_TYPE,
        "config": config.to_json(),
        "layers": blobs.iter().map(Descriptor::to_json).collect::<Vec<Value>>(),
        "subject": subject_of(image).to_json(),
        "annotations": annotations,
    });
    let bytes = Bytes::from(manifest.to_string());
    let mut descriptor = Descriptor::new(OCI_MANIFEST, Digest::of(&bytes), bytes.len() as u64);
    descriptor.artifact_type = Some(OWN_ARTIFACT_TYPE.to_owned());
    let texts = annotations.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
    descriptor.annotations = texts.collect();
    (descriptor, bytes)
}

#[cfg(test)]
mod tests {
    use lazyrun_index::{StreamOptions, index_layer};

    use super::*;

    fn layer() -> (LayerDescriptor, Vec<u8>) {
        let tar = [0; 1024];
        let mut index = std::io::Cursor::new(Vec::new());
        let told = index_layer(tar.as_slice(), &mut (), &mut index, &StreamOptions::default()).unwrap();
        let layer = LayerDescriptor {
            digest: told.blob_digest,
            size: told.blob_size,
            media_type: String::new(),
            diff_id: told.diff_id,
            annotations: std::collections::BTreeMap::new(),
        };
        (layer, index.into_inner())
    }

    #[test]
    fn blobs_round_trip() {
        let (layer, index) = layer();
        let blob = make_blob(&layer, index.clone()).unwrap();
        assert!(blob.format > 0);
        let back = decode_blob(blob.bytes.clone(), &blob.descriptor.media_type, &layer).unwrap();
        assert_eq!(back, index);
        assert_eq!(decode_blob(index.clone().into(), OWN_LAYER_INDEX, &layer).unwrap(), index);
        assert_eq!(make_blob(&layer, index).unwrap().bytes, blob.bytes);
        for other in [
            LayerDescriptor { digest: layer.diff_id, size: 7, ..layer.clone() },
            LayerDescriptor { diff_id: Digest::of(b"x"), ..layer.clone() },
            LayerDescriptor { digest: Digest::of(b"x"), ..layer.clone() },
        ] {
            assert!(decode_blob(blob.bytes.clone(), OWN_LAYER_INDEX_ZSTD, &other).is_err());
        }
    }

    #[test]
    fn bombs_and_rubbish_are_refused() {
        let (layer, _) = layer();
        let zeros = std::io::Read::take(std::io::repeat(0), 30 << 20);
        let bomb = zstd::stream::encode_all(zeros, 1).unwrap();
        assert!(bomb.len() < 100_000);
        let error = decode_blob(bomb.into(), OWN_LAYER_INDEX_ZSTD, &layer).unwrap_err();
        assert!(error.contains("larger than"), "{error}");
        for rubbish in [&b""[..], b"x", b"\x28\xb5\x2f\xfd", &[0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff]] {
            let rubbish = Bytes::copy_from_slice(rubbish);
            assert!(decode_blob(rubbish, OWN_LAYER_INDEX_ZSTD, &layer).is_err());
        }
    }
}
