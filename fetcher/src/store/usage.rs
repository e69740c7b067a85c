//! What the store holds, told without opening layers that nobody uses.

use std::sync::{Arc, Weak};

use super::{Layer, LayerStore};

impl LayerStore {
    /// The layers that are open: in use, or lately so.
    pub fn opened(&self) -> Vec<Arc<Layer>> {
        self.open_layers().values().filter_map(Weak::upgrade).collect()
    }
}
