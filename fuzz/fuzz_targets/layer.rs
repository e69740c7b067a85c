//! Any bytes as a layer blob: gzip, zstd or tar. What is taken has to hydrate and every span to decode.
#![no_main]

use lazyrun_index::{LayerIndex, StreamOptions, hydrate_layer, index_layer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|blob: &[u8]| {
    let mut out = std::io::Cursor::new(Vec::new());
    let options = StreamOptions { span_size: 4096, span_len: 1 << 16, max_span_len: 1 << 17 };
    if index_layer(blob, &mut (), &mut out, &options).is_err() {
        return;
    }
    let index = LayerIndex::from_bytes(out.into_inner()).expect("an index just written opens");
    hydrate_layer(&index, blob, &mut ()).expect("the blob just indexed hydrates");
    let mut bytes = Vec::new();
    for (i, span) in index.spans().enumerate().filter(|(_, span)| span.restartable) {
        let from = span.blob_offset as usize;
        let compressed = &blob[from..from + span.blob_len as usize];
        index.decode_span(i, compressed, &mut bytes).expect("every restartable span decodes");
    }
});
