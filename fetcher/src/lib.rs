//! Registry client, fetch scheduling and the layer-file store.
