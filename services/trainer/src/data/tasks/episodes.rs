//! Tasks that demonstrations show.

use rand::{Rng, seq::SliceRandom};

use super::{Draw, document};
use crate::data::{Document, Layout, Piece, Scene, Task, describe};

/// Words that mean nothing until an episode says what.
pub const NAMES: [&str; 32] = [
    "dax", "wug", "blick", "fep", "toma", "zib", "kiki", "bouba", "lorp", "mib", "nork", "pim", "quib",
    "rell", "sarn", "tove", "vam", "wex", "yorp", "zek", "gax", "hib", "jom", "kep", "lun", "mox", "nif",
    "pav", "rud", "sild", "tuk", "vob",
];

/// Names in one episode, at most and in tests.
pub const NAMES_IN_EPISODE: usize = 4;

/// Demonstrations of each name in training, and how often; upstream shows up to 16.
const SHOTS: [u32; 8] = [1, 1, 2, 2, 3, 4, 4, 8];

/// So many episodes in a row, by their index, are as long as each other: a batch of them needs no padding, which would
/// be two thirds of it.
const EPISODES_ALIKE: u64 = 16;

pub(super) fn names(draw: &mut Draw, index: u64) -> Document {
    let (names, shots) = length(draw, index);
    names_shown(draw, names, shots)
}

/// ` cat this is a dax. dog this is a wug. … cat this is a` → ` dax.`
pub(super) fn names_in_words(draw: &mut Draw, index: u64) -> Document {
    let (names, shots) = length(draw, index);
    let word = |_: &Draw, scene: &Scene| Piece::given(format!(" {}", scene.things[0].concept.name()));
    episode(draw, Task::NamesInWords, (names, shots), word)
}

/// How many names, and how often each is shown.
fn length(draw: &Draw, index: u64) -> (usize, u32) {
    let mut rng = draw.world.random(draw.split, "length of names", index / EPISODES_ALIKE);
    let names = rng.random_range(2..=NAMES_IN_EPISODE as u32) as usize;
    (names, SHOTS[rng.random_range(0..SHOTS.len() as u32) as usize])
}

/// `[img] this is a dax. [img] this is a wug. … [img] this is a` → ` dax.`: so many names, each shown so often, in
/// random order.
pub(super) fn names_shown(draw: &mut Draw, names: usize, shots: u32) -> Document {
    episode(draw, Task::Names, (names, shots), |draw: &Draw, scene: &Scene| draw.given(scene))
}

/// `shown`: what stands for a scene.
fn episode(
    draw: &mut Draw,
    task: Task,
    (names, shots): (usize, u32),
    shown: impl Fn(&Draw, &Scene) -> Piece,
) -> Document {
    let composer = draw.world.composer(draw.split);
    let concepts = composer.different(&mut draw.rng, names);
    let mut words = NAMES;
    words.shuffle(&mut draw.rng);
    let mut order: Vec<usize> = (0..names).flat_map(|name| (0..shots).map(move |_| name)).collect();
    order.shuffle(&mut draw.rng);
    let asked = draw.rng.random_range(0..names as u32) as usize;
    let mut known = vec![false; names];
    let mut pieces = Vec::new();
    let mut last = None;
    for (index, name) in order.iter().copied().chain([asked]).enumerate() {
        let scene = composer.single_of(&mut draw.rng, concepts[name]);
        // Before its first demonstration a name cannot be known; the question's is learned in any case.
        let learn = known[name] || index == order.len();
        known[name] = true;
        pieces.extend([
            shown(draw, &scene),
            Piece::given(" this is a"),
            Piece::Text { text: format!(" {}.", words[name]), learn },
        ]);
        last = Some(scene);
    }
    document(task, last.expect("the question has a scene"), pieces)
}

/// Demonstrations of a tuple, in tests.
pub const TUPLE_SHOTS: usize = 3;

/// `[img][red, cat, 3, bottom left].` three times, then a picture.
pub(super) fn tuples(draw: &mut Draw) -> Document {
    let composer = draw.world.composer(draw.split);
    let mut pieces = Vec::new();
    loop {
        let scene = composer.gathered(&mut draw.rng);
        pieces.extend([draw.given(&scene), Piece::learned(describe::tuple(&scene))]);
        if pieces.len() == 2 * (TUPLE_SHOTS + 1) {
            return document(Task::Tuples, scene, pieces);
        }
    }
}

/// ` the object in the red circle:` → ` 'cat'.`, after up to three demonstrations.
pub(super) fn circle(draw: &mut Draw) -> Document {
    let shots = draw.rng.random_range(0..=3u32);
    circled(draw, shots)
}

/// The circled thing comes first in the document's scene.
pub(super) fn circled(draw: &mut Draw, shots: u32) -> Document {
    let composer = draw.world.composer(draw.split);
    let mut pieces = Vec::new();
    for shot in 0..=shots {
        let mut scene = match draw.rng.random_bool(0.5) {
            true => composer.pair(&mut draw.rng),
            false => composer.corners(&mut draw.rng),
        };
        let chosen = draw.rng.random_range(0..scene.things.len() as u32) as usize;
        scene.circled = Some(chosen);
        let name = scene.things[chosen].concept.name();
        pieces.extend([
            draw.given(&scene),
            Piece::given(" the object in the red circle:"),
            Piece::learned(format!(" '{name}'.")),
        ]);
        if shot == shots {
            // The order of things is the order they are told in, which nothing here tells.
            scene.layout = Layout::Group(None);
            scene.things.swap(0, chosen);
            scene.circled = Some(0);
            return document(Task::Circle, scene, pieces);
        }
    }
    unreachable!("the last shot is the question")
}
