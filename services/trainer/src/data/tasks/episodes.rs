//! Tasks that demonstrations show.

use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};

use crate::data::{
    concept::Concept,
    describe,
    document::{Document, Piece, Task},
    scene::{Arrangement, Scene},
    tasks::draw::{Draw, document},
};

/// Words that mean nothing until an episode says what.
pub const NAMES: [&str; 32] = [
    "dax", "wug", "blick", "fep", "toma", "zib", "kiki", "bouba", "lorp", "mib", "nork", "pim", "quib",
    "rell", "sarn", "tove", "vam", "wex", "yorp", "zek", "gax", "hib", "jom", "kep", "lun", "mox", "nif",
    "pav", "rud", "sild", "tuk", "vob",
];

/// Names in one episode, at most and in tests.
pub const NAMES_IN_EPISODE: usize = 4;

/// Demonstrations of each name in training, and how often; upstream shows up to 16. Mostly many: each after a name's
/// first is a question with one demonstration more than the last, so a long episode asks most for what it costs.
const SHOTS: [u32; 8] = [1, 2, 3, 4, 4, 6, 8, 8];

/// Between what is shown and its name.
const LINK: &str = " this is a";

/// So many episodes in a row, by their index, are as long as each other: a batch of them needs no padding, which would
/// be two thirds of it.
const EPISODES_ALIKE: u64 = 16;

/// One episode's.
struct Length {
    names: usize,
    /// Demonstrations of each name.
    shots: u32,
    glossary: bool,
}

impl Length {
    fn of(draw: &Draw, index: u64) -> Self {
        let mut rng = draw.world.random(draw.split, "length of names", index / EPISODES_ALIKE);
        Self {
            names: rng.random_range(2..=NAMES_IN_EPISODE as u32) as usize,
            shots: SHOTS[rng.random_range(0..SHOTS.len() as u32) as usize],
            glossary: rng.random_bool(0.5),
        }
    }
}

/// A thing and what it is called in one episode.
type Bound = (Concept, &'static str);

pub(super) fn names(draw: &mut Draw, index: u64) -> Document {
    let length = Length::of(draw, index);
    let bound = bind(draw, length.names);
    let words = glossary(draw, &bound, length.glossary);
    episode(draw, Task::Names, &bound, (length.shots, words), has_images)
}

/// ` cat this is a dax. dog this is a wug. … cat this is a` → ` dax.`, or without the words between: the next word
/// after an earlier one is what is learned first, and of many rather than of few.
pub(super) fn names_in_words(draw: &mut Draw, index: u64) -> Document {
    let mut length = draw.world.random(draw.split, "length of names in words", index / EPISODES_ALIKE);
    let link = if length.random_bool(0.3) { LINK } else { "" };
    let bound = bind(draw, length.random_range(4..=12u32) as usize);
    let shots = length.random_range(2..=4u32);
    let word =
        |_: &Draw, scene: &Scene| vec![Piece::given(format!(" {}{link}", scene.things[0].concept.name()))];
    episode(draw, Task::NamesInWords, &bound, (shots, Vec::new()), word)
}

/// `[img] this is a dax. [img] this is a wug. … [img] this is a` → ` dax.`: so many names, each shown so often, in
/// random order.
pub(super) fn names_shown(draw: &mut Draw, names: usize, shots: u32) -> Document {
    let bound = bind(draw, names);
    episode(draw, Task::Names, &bound, (shots, Vec::new()), has_images)
}

fn bind(draw: &mut Draw, names: usize) -> Vec<Bound> {
    let concepts = draw.world.composer(draw.split).different(&mut draw.rng, names);
    let mut words = NAMES;
    words.shuffle(&mut draw.rng);
    concepts.into_iter().zip(words).collect()
}

fn has_images(draw: &Draw, scene: &Scene) -> Vec<Piece> {
    vec![draw.given(scene), Piece::given(LINK)]
}

/// ` dax. cat. dog wug. …`: what each name means and what each thing is called, in random order. To know what a name
/// means, the model must have noted at the name what was shown with it, which is half of the way from a thing to its
/// name; learned at once, neither half is of use before the other.
fn glossary(draw: &mut Draw, bound: &[Bound], wanted: bool) -> Vec<Piece> {
    if !wanted {
        return Vec::new();
    }
    let mut entries: Vec<(String, String)> = Vec::new();
    for (concept, word) in bound {
        let (thing, name) = (format!(" {}", concept.name()), format!(" {word}."));
        entries.extend([(name.clone(), format!("{thing}.")), (thing, name)]);
    }
    entries.shuffle(&mut draw.rng);
    let pieces = entries.into_iter().map(|(one, other)| [Piece::given(one), Piece::learned(other)]);
    pieces.flatten().collect()
}

/// Demonstrations of each, then `words`, then a question. `shown`: what stands before the name of what is in a scene.
fn episode(
    draw: &mut Draw,
    task: Task,
    bound: &[Bound],
    (shots, words): (u32, Vec<Piece>),
    shown: impl Fn(&Draw, &Scene) -> Vec<Piece>,
) -> Document {
    let composer = draw.world.composer(draw.split);
    let scene = |draw: &mut Draw, concept| composer.single_of(&mut draw.rng, concept);
    let mut order: Vec<usize> = (0..bound.len()).flat_map(|name| (0..shots).map(move |_| name)).collect();
    order.shuffle(&mut draw.rng);
    let mut known = vec![false; bound.len()];
    let mut pieces = Vec::new();
    for name in order {
        let (concept, word) = bound[name];
        let scene = scene(draw, concept);
        pieces.extend(shown(draw, &scene));
        // Before its first demonstration a name cannot be known.
        pieces.push(Piece::Text { text: format!(" {word}."), learn: known[name] });
        known[name] = true;
    }
    pieces.extend(words);
    let &(concept, word) = bound.choose(&mut draw.rng).expect("an episode has names");
    let scene = scene(draw, concept);
    pieces.extend(shown(draw, &scene));
    pieces.push(Piece::learned(format!(" {word}.")));
    document(task, scene, pieces)
}

/// Demonstrations of a tuple, in tests.
pub const TUPLE_SHOTS: usize = 3;

/// `[img][red, cat, 3, bottom left].` three times, then an image.
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
            scene.arrangement = Arrangement::Group(None);
            scene.things.swap(0, chosen);
            scene.circled = Some(0);
            return document(Task::Circle, scene, pieces);
        }
    }
    unreachable!("the last shot is the question")
}
