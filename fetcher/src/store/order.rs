//! Spans in the order in which their bytes lie in the blob.
//!
//! The spans of a tar layer file are in that order already. Those of a table layer file follow the table, and
//! several of them may need the same bytes. Whoever fetches counts in *ranks*, places in the blob's order.

use lazyrun_index::LayerIndex;

/// Translates between spans and ranks.
pub(super) struct BlobOrder {
    /// `None`: both are the same.
    shuffled: Option<Shuffled>,
}

struct Shuffled {
    spans: Vec<u32>,
    ranks: Vec<u32>,
}

impl BlobOrder {
    pub(super) fn of(index: &LayerIndex) -> BlobOrder {
        if index.spans().map(|s| s.blob_offset).is_sorted() {
            return BlobOrder { shuffled: None };
        }
        let mut keyed: Vec<(u64, u32)> = index.spans().map(|s| (s.blob_offset, s.index)).collect();
        keyed.sort_unstable();
        let spans: Vec<u32> = keyed.into_iter().map(|(_, span)| span).collect();
        let mut ranks = vec![0; spans.len()];
        for (rank, span) in spans.iter().enumerate() {
            // There are no more spans than a u32 can number.
            ranks[*span as usize] = rank as u32;
        }
        BlobOrder { shuffled: Some(Shuffled { spans, ranks }) }
    }

    /// The span at a rank.
    pub(super) fn span(&self, rank: usize) -> usize {
        self.shuffled.as_ref().map_or(rank, |s| s.spans[rank] as usize)
    }

    /// The rank of a span.
    pub(super) fn rank(&self, span: usize) -> usize {
        self.shuffled.as_ref().map_or(span, |s| s.ranks[span] as usize)
    }
}
