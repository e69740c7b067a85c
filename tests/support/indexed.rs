//! The fixture's image in a registry that has its index, too, behind a link that is counted.

use lazyrun::demo::shaper::{Shape, Shaper};

use super::docker_registry::DockerRegistry;
use super::fixture::{Fixture, TAG};
use super::instance::Lazyrun;

/// An image with an index beside it and no profile.
pub struct Indexed {
    /// What the image is made of.
    pub fixture: Fixture,
    /// The link.
    pub shaper: Shaper,
    /// The image's name through the link.
    pub image: String,
    _registry: DockerRegistry,
}

impl Indexed {
    /// Puts image and index into a registry behind a link of this shape.
    pub fn behind(shape: Shape) -> Indexed {
        let (fixture, registry) = (Fixture::new(), DockerRegistry::start());
        let shaper = Shaper::start(registry.addr(), shape).expect("start the shaper");
        let direct = registry.push(fixture.layout(), TAG, "fixture");
        Lazyrun::new().ok(&["index", "push", &direct]);
        let image = format!("{}/fixture:{TAG}", shaper.addr());
        Indexed { fixture, shaper, image, _registry: registry }
    }
}
