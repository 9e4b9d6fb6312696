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
    tasks::{
        copying::tokens,
        draw::{Draw, document},
    },
};

/// Words that mean nothing until an episode says what.
pub const NAMES: [&str; 32] = [
    "dax", "wug", "blick", "fep", "toma", "zib", "kiki", "bouba", "lorp", "mib", "nork", "pim", "quib",
    "rell", "sarn", "tove", "vam", "wex", "yorp", "zek", "gax", "hib", "jom", "kep", "lun", "mox", "nif",
    "pav", "rud", "sild", "tuk", "vob",
];

/// Names in one episode, at most and in tests.
pub const NAMES_IN_EPISODE: usize = 4;

/// Demonstrations of each name in training, and how often: of things, and of tokens. Upstream shows up to 16.
const SHOTS: &[u32] = &[1, 2, 2, 3, 4, 4, 6, 9];
const SHOTS_OF_TOKENS: &[u32] = &[2, 3, 4];

/// Between what is shown and its name.
const LINK: &str = " this is a";

/// So many episodes in a row, by their index, have as many names and demonstrations as each other: a batch of them
/// needs little padding, which would be two thirds of it.
const EPISODES_ALIKE: u64 = 32;

/// Syllables of a name that is made up anew.
const SYLLABLES: std::ops::RangeInclusive<u32> = 2..=3;

/// What is called how in one episode, and how often each is shown before the question.
struct Episode {
    task: Task,
    names: Vec<String>,
    shots: u32,
}

impl Episode {
    /// Draws the names of episode `index` of a task, in half of the episodes new ones: no model can know them by heart.
    fn draw(draw: &mut Draw, task: Task, index: u64) -> Self {
        let (names, shots) = match task {
            Task::NamesOfTokens => (2..=8, SHOTS_OF_TOKENS),
            _ => (2..=NAMES_IN_EPISODE as u32, SHOTS),
        };
        let stream = format!("length of {}", task.name());
        let mut length = draw.world.random(draw.split, &stream, index / EPISODES_ALIKE);
        let count = length.random_range(names) as usize;
        let shots = *shots.choose(&mut length).expect("not empty");
        let names = if draw.rng.random_bool(0.5) { new_names(draw, count) } else { known_names(draw, count) };
        Self { task, names, shots }
    }

    /// Tells the episode: demonstrations of each name in random order, then a question. `shown`: what stands before the
    /// name of that index.
    fn tell(
        &self,
        draw: &mut Draw,
        mut shown: impl FnMut(&mut Draw, usize) -> (Scene, Vec<Piece>),
    ) -> Document {
        let shots = self.shots as usize;
        let mut order: Vec<usize> = (0..self.names.len()).flat_map(|name| vec![name; shots]).collect();
        order.shuffle(&mut draw.rng);
        let mut known = vec![false; self.names.len()];
        let mut pieces = Vec::new();
        for name in order {
            pieces.extend(shown(draw, name).1);
            // Before its first demonstration a name cannot be known.
            pieces.push(Piece::Text { text: format!(" {}.", self.names[name]), learn: known[name] });
            known[name] = true;
        }
        let asked: Vec<usize> = (0..self.names.len()).collect();
        let &asked = asked.choose(&mut draw.rng).expect("an episode has names");
        let (scene, question) = shown(draw, asked);
        pieces.extend(question);
        pieces.push(Piece::learned(format!(" {}.", self.names[asked])));
        document(self.task, scene, pieces)
    }

    /// Tells the episode with another image of a thing each time.
    fn of_things(&self, draw: &mut Draw, things: &[Concept]) -> Document {
        self.tell(draw, |draw, name| {
            let scene = draw.world.composer(draw.split).single_of(&mut draw.rng, things[name]);
            let image = draw.given(&scene);
            linked(scene, image)
        })
    }
}

/// Returns `count` of [`NAMES`].
fn known_names(draw: &mut Draw, count: usize) -> Vec<String> {
    let mut names = NAMES;
    names.shuffle(&mut draw.rng);
    names[..count].iter().map(|&name| name.to_owned()).collect()
}

/// Returns `count` different words of random syllables.
fn new_names(draw: &mut Draw, count: usize) -> Vec<String> {
    let mut names = Vec::new();
    while names.len() < count {
        let syllables = draw.rng.random_range(SYLLABLES);
        let mut letter = |letters: &[u8]| char::from(*letters.choose(&mut draw.rng).expect("not empty"));
        let name: String =
            (0..syllables).flat_map(|_| [letter(b"bdfgklmnprstvz"), letter(b"aeiou")]).collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// `[img] this is a dax. [img] this is a wug. … [img] this is a` → ` dax.`: other images of the same things.
pub(super) fn names(draw: &mut Draw, index: u64) -> Document {
    let episode = Episode::draw(draw, Task::Names, index);
    let things = draw.world.composer(draw.split).different(&mut draw.rng, episode.names.len());
    episode.of_things(draw, &things)
}

/// The same of this many of [`NAMES`], each shown so often, in tests.
pub(super) fn names_shown(draw: &mut Draw, names: usize, shots: u32) -> Document {
    let things = draw.world.composer(draw.split).different(&mut draw.rng, names);
    let names = known_names(draw, names);
    Episode { task: Task::Names, names, shots }.of_things(draw, &things)
}

/// The same with one image of each thing, which comes again and again: nothing in it need be understood.
pub(super) fn names_of_same_images(draw: &mut Draw, index: u64) -> Document {
    let episode = Episode::draw(draw, Task::NamesOfSameImages, index);
    let composer = draw.world.composer(draw.split);
    let things = composer.different(&mut draw.rng, episode.names.len());
    let scenes: Vec<_> = things.iter().map(|&thing| composer.single_of(&mut draw.rng, thing)).collect();
    episode.tell(draw, |draw, name| linked(scenes[name].clone(), draw.given(&scenes[name])))
}

/// `#7#90 this is a dax. … #7#90 this is a` → ` dax.`, where #7 is a token by its number; or without the words between:
/// what stands right after a token is found first.
pub(super) fn names_of_tokens(draw: &mut Draw, index: u64) -> Document {
    let episode = Episode::draw(draw, Task::NamesOfTokens, index);
    let has_link = draw.rng.random_bool(0.5);
    let mut key = || {
        let len = draw.rng.random_range(1..=2u32) as usize;
        Piece::Tokens { numbers: tokens(&mut draw.rng, len), learn: false }
    };
    let keys: Vec<_> = episode.names.iter().map(|_| key()).collect();
    episode.tell(draw, |_, name| {
        let (scene, mut pieces) = linked(Scene::empty(), keys[name].clone());
        pieces.truncate(if has_link { 2 } else { 1 });
        (scene, pieces)
    })
}

fn linked(scene: Scene, shown: Piece) -> (Scene, Vec<Piece>) {
    (scene, vec![shown, Piece::given(LINK)])
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
