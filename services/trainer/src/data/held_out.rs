//! What training never shows, so that it can be asked for: a tenth of the pairs of things, a tenth of how many of
//! which thing, and a whole style. By names alone, so that it is the same for every seed and number of concepts.

use crate::data::{atlas::Style, concept::Concept, scene::Scene};

/// One of so many compositions is held out.
const ONE_IN: u64 = 10;

/// Returns whether these two different things are never in one image of the training data.
pub fn pair(first: Concept, second: Concept) -> bool {
    let (first, second) = (first.min(second), first.max(second));
    chosen(&format!("pair {} {}", first.name(), second.name()))
}

/// Returns whether the training data never shows this thing this often. Each is shown once: else it could not be
/// learned.
pub fn count(concept: Concept, count: u32) -> bool {
    count > 1 && chosen(&format!("count {} {count}", concept.name()))
}

/// Returns whether anything in the scene is held out.
pub fn scene(scene: &Scene) -> bool {
    composition(scene) || scene.things.iter().any(|thing| thing.style == Style::Twemoji)
}

/// Returns whether a pair or a count of the scene is held out, whatever its style.
pub fn composition(scene: &Scene) -> bool {
    let counts = scene.counts();
    let pairs = counts
        .iter()
        .enumerate()
        .flat_map(|(i, first)| counts[..i].iter().map(move |other| (first.0, other.0)));
    counts.iter().any(|&(concept, number)| count(concept, number))
        || pairs.into_iter().any(|(first, second)| pair(first, second))
}

fn chosen(what: &str) -> bool {
    let hash = blake3::hash(what.as_bytes());
    let (number, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*number).is_multiple_of(ONE_IN)
}
