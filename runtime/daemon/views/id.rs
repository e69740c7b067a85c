//! What views are called: in memory, on disk, and at the keeper.

use std::sync::Arc;

use lazyrun_fetcher::Layer;
use lazyrun_fs::plan::Plan;
use lazyrun_index::{Digest, LayerId, Layout};

/// Names a view: the chainID of its layers and, unless all are tar layer files that were indexed here, which files
/// they are. A view of claimed indexes must never be taken for one of the true ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ViewId {
    /// chainID of the layers.
    pub chain: Digest,
    // A letter for the layout of each layer, `-`, and a part of the digest of all file names.
    variant: Option<String>,
}

impl ViewId {
    /// The view of these layers, bottom first.
    pub fn of(layers: &[Arc<Layer>]) -> Self {
        let diff_ids: Vec<Digest> = layers.iter().map(|l| l.diff_id()).collect();
        let chain = chain_id(&diff_ids).unwrap_or_else(|| Digest::of(b""));
        let files: Vec<(LayerId, &str)> = layers.iter().map(|l| (l.id(), l.file_name())).collect();
        Self { chain, variant: variant_of(&files) }
    }

    /// The view of the layers of this chain if all were indexed here.
    pub(super) fn plain(chain: Digest) -> Self {
        Self { chain, variant: None }
    }

    /// The layer files of the view of an image with these diffIDs.
    pub fn layer_ids(&self, diff_ids: &[Digest]) -> Vec<LayerId> {
        let letters = self.variant.as_deref().unwrap_or("").bytes().take_while(|b| *b != b'-');
        let layouts = letters.map(|b| if b == TABLE { Layout::Table } else { Layout::Tar });
        let layouts = layouts.chain(std::iter::repeat(Layout::Tar));
        diff_ids.iter().zip(layouts).map(|(diff_id, layout)| LayerId { diff_id: *diff_id, layout }).collect()
    }

    pub(super) fn file_stem(&self) -> String {
        match &self.variant {
            None => self.chain.hex(),
            Some(variant) => format!("{}-{variant}", self.chain.hex()),
        }
    }
}

impl std::fmt::Display for ViewId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.file_stem())
    }
}

// In a variant: the layout of a layer file.
const TAR: u8 = b'r';
const TABLE: u8 = b'b';

fn variant_of(files: &[(LayerId, &str)]) -> Option<String> {
    if files.iter().all(|(id, name)| id.layout == Layout::Tar && *name == id.to_string()) {
        return None;
    }
    let letters = files.iter().map(|(id, _)| if id.layout == Layout::Table { TABLE } else { TAR });
    let letters: String = letters.map(char::from).collect();
    let names: Vec<&str> = files.iter().map(|(_, name)| *name).collect();
    Some(format!("{letters}-{}", &Digest::of(names.join("\n").as_bytes()).hex()[..16]))
}

/// The chainID of layers given bottom first (OCI image-spec, "Layer ChainID").
pub fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(*first, |chain, diff_id| Digest::of(format!("{chain} {diff_id}").as_bytes())))
}

pub(super) fn kept_name(id: &ViewId, plan: Plan, direct: bool) -> String {
    let name = format!("view:{}:{plan}:{}", id.chain.hex(), if direct { "direct" } else { "fuse" });
    id.variant.as_ref().map_or_else(|| name.clone(), |variant| format!("{name}:{variant}"))
}

/// What the name of a kept view says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptView {
    /// Which view it is.
    pub id: ViewId,
    /// The plan that serves it.
    pub plan: Plan,
    /// Whether it reads local files without FUSE.
    pub direct: bool,
}

/// What a name of a kept view says, and `None` for other names.
pub fn parse_kept_name(name: &str) -> Option<KeptView> {
    let mut parts = name.strip_prefix("view:")?.split(':');
    let chain = format!("sha256:{}", parts.next()?).parse().ok()?;
    let plan = parts.next()?.parse().ok()?;
    let direct = parts.next()? == "direct";
    let variant = parts.next().map(str::to_owned);
    // The descriptor of its FUSE connection is kept under a name of its own.
    let whole = parts.next().is_none() && variant.as_ref().is_none_or(|v| v.contains('-'));
    whole.then_some(KeptView { id: ViewId { chain, variant }, plan, direct })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_as_the_image_spec_says() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(&[a]), Some(a));
        assert_eq!(chain_id(&[a, b]), Some(Digest::of(format!("{a} {b}").as_bytes())));
    }

    #[test]
    fn kept_names_round_trip() {
        let (x, y) = (Digest::of(b"x"), Digest::of(b"y"));
        let files = [(LayerId::tar(x), x.hex()), (LayerId::table(y), LayerId::table(y).to_string())];
        let files: Vec<_> = files.iter().map(|(id, name)| (*id, name.as_str())).collect();
        assert_eq!(variant_of(&files[..1]), None);
        for variant in [None, variant_of(&files)] {
            let id = ViewId { chain: x, variant };
            let name = kept_name(&id, Plan::Erofs, true);
            let kept = KeptView { id, plan: Plan::Erofs, direct: true };
            assert_eq!(parse_kept_name(&name), Some(kept));
            assert_eq!(parse_kept_name(&format!("{name}:dev")), None);
        }
        assert_eq!(parse_kept_name("flat"), None);
    }

    #[test]
    fn views_of_adopted_layers_have_names_of_their_own() {
        let (x, y) = (Digest::of(b"x"), Digest::of(b"y"));
        let (own, table) = (x.hex(), LayerId::table(y).to_string());
        let adopted = format!("{own}.0123456789abcdef");
        let of = |name: &str| variant_of(&[(LayerId::tar(x), name), (LayerId::table(y), &table)]);
        assert_ne!(of(&own), of(&adopted));
        assert!(variant_of(&[(LayerId::tar(x), &adopted)]).is_some());
        let id = ViewId { chain: x, variant: of(&own) };
        assert_eq!(id.layer_ids(&[x, y]), [LayerId::tar(x), LayerId::table(y)]);
        let plain = ViewId { chain: x, variant: None };
        assert_eq!((plain.layer_ids(&[x]), plain.file_stem()), (vec![LayerId::tar(x)], x.hex()));
    }
}
