//! An image, and text about it.

use emu2_llm::prompt::{GROUNDING_SYSTEM_MESSAGE, SYSTEM_MESSAGE};
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};

use crate::data::{
    describe,
    document::{Document, Piece, Task},
    scene::{Arrangement, Place, Scene, Thing},
    tasks::draw::{Draw, document},
};

/// Upstream's wording.
const DESCRIBE: &str = "Describe the image in details:";

/// The whole scene in words, after its image or before it. What is to be painted is tidy.
pub(super) fn caption(draw: &mut Draw) -> Document {
    if draw.rng.random_bool(0.5) {
        let scene = draw.world.painter(draw.split).any(&mut draw.rng);
        let text = Piece::learned(format!("{}.", describe::whole(&scene)));
        let pieces = vec![text, draw.painted(&scene)];
        return document(Task::Caption, scene, pieces);
    }
    let scene = draw.world.composer(draw.split).any(&mut draw.rng);
    match draw.rng.random_range(0..4u32) {
        0 if matches!(scene.arrangement, Arrangement::Single(_)) => name(draw, scene),
        0 | 1 => {
            let text = Piece::learned(format!(" {}.", describe::whole(&scene.in_reading_order())));
            let pieces = vec![draw.given(&scene), text];
            document(Task::Caption, scene, pieces)
        }
        _ => description(draw, scene),
    }
}

/// ` this is` → ` a cat.`
pub(super) fn name(draw: &Draw, scene: Scene) -> Document {
    let name = format!(" {}.", scene.things[0].concept.with_article());
    let pieces = vec![draw.given(&scene), Piece::given(" this is"), Piece::learned(name)];
    document(Task::Caption, scene, pieces)
}

/// `Describe the image in details:` → ` a cat left of a dog on a red background.`
///
/// In reading order: told from either thing at random, every word after the first depends on a choice that nothing in
/// the image decides.
pub(super) fn description(draw: &Draw, scene: Scene) -> Document {
    let text = format!(" {}.", describe::whole(&scene.in_reading_order()));
    let pieces = vec![draw.given(&scene), Piece::given(DESCRIBE), Piece::learned(text)];
    document(Task::Caption, scene, pieces)
}

/// What is asked of a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    What,
    HowMany,
    Where,
    Colour,
    Related,
}

/// A question that the scene has one short answer to, and that answer.
pub(crate) fn ask(asked: Asked, scene: &Scene, thing: usize) -> Option<(String, String)> {
    let concept = scene.things[thing].concept;
    let alike = scene.things.iter().filter(|other| other.concept == concept).count();
    Some(match asked {
        Asked::What => match scene.arrangement {
            Arrangement::Single(_) | Arrangement::Group(_) => {
                ("what is in the picture?".to_owned(), concept.name().to_owned())
            }
            Arrangement::Pair(_) | Arrangement::Corners(_) => return None,
        },
        Asked::HowMany if alike == scene.things.len() => {
            ("how many things are there?".to_owned(), alike.to_string())
        }
        Asked::HowMany => (format!("how many {} are there?", concept.plural()), alike.to_string()),
        Asked::Where => {
            let place = place(scene, thing)?;
            let (verb, name) = match alike {
                1 => ("is", concept.name().to_owned()),
                _ => ("are", concept.plural()),
            };
            (format!("where {verb} the {name}?"), place.name().to_owned())
        }
        Asked::Colour => ("which colour is the background?".to_owned(), scene.background.name().to_owned()),
        Asked::Related => {
            let Arrangement::Pair(relation) = scene.arrangement else { return None };
            let [first, second] = [0, 1].map(|index: usize| scene.things[index].concept.name());
            (format!("what is {} the {second}?", relation.name()), first.to_owned())
        }
    })
}

fn place(scene: &Scene, thing: usize) -> Option<Place> {
    match &scene.arrangement {
        Arrangement::Single(place) | Arrangement::Group(Some(place)) => Some(*place),
        Arrangement::Corners(places) => Some(places[thing]),
        Arrangement::Group(None) | Arrangement::Pair(_) => None,
    }
}

/// In the wording of upstream's few-shot prompts, or in a chat.
pub(super) fn question(draw: &mut Draw) -> Document {
    const WEIGHTS: [(Asked, u32); 5] =
        [(Asked::What, 4), (Asked::HowMany, 5), (Asked::Where, 3), (Asked::Colour, 2), (Asked::Related, 2)];
    let asked = *WEIGHTS.choose_weighted(&mut draw.rng, |(_, weight)| *weight).expect("weights are positive");
    let chat = draw.rng.random_bool(0.25);
    question_about(draw, asked.0, chat)
}

pub(super) fn relation(draw: &mut Draw) -> Document {
    let document = if draw.rng.random_bool(0.5) {
        question_about(draw, Asked::Related, false)
    } else {
        let scene = draw.world.composer(draw.split).pair(&mut draw.rng);
        description(draw, scene)
    };
    Document { task: Task::Relation, ..document }
}

/// Turns of an interview, at most.
const TURNS_MAX: usize = 5;
/// The turns of an interview about where things are, which takes each of them at its place and in its box.
const PLACES_MAX: usize = 8;

/// Several questions about one image, in the wording of a single one: each is another look for the price of its own
/// tokens, where an image with one question takes three times as many. Half of them ask where each of several things
/// is: what a question names must be found in the image, and chance answers half of what is asked of one or two.
pub(super) fn interview(draw: &mut Draw) -> Document {
    let composer = draw.world.composer(draw.split);
    let (scene, where_only) = match draw.rng.random_range(0..8u32) {
        0..4 => (composer.corners(&mut draw.rng), true),
        4..6 => (composer.pair(&mut draw.rng), false),
        6 => (composer.corners(&mut draw.rng), false),
        _ => (composer.any(&mut draw.rng), false),
    };
    let mut turns = if where_only { whereabouts(&scene) } else { turns(&scene) };
    turns.shuffle(&mut draw.rng);
    turns.truncate(if where_only { PLACES_MAX } else { TURNS_MAX });
    let mut pieces = vec![draw.given(&scene)];
    Draw::asked(&mut pieces, turns);
    document(Task::Interview, scene, pieces)
}

/// Where each thing is, in words and as a box.
fn whereabouts(scene: &Scene) -> Vec<(String, String)> {
    let of = |thing: usize| {
        let place = ask(Asked::Where, scene, thing);
        let place = place.map(|(question, answer)| (in_short(&question), format!(" {answer}")));
        place.into_iter().chain([located(&scene.things[thing])])
    };
    (0..scene.things.len()).flat_map(of).collect()
}

/// All that can be asked of a scene, with the answers.
fn turns(scene: &Scene) -> Vec<(String, String)> {
    const ALL: [Asked; 5] = [Asked::What, Asked::HowMany, Asked::Where, Asked::Colour, Asked::Related];
    let mut turns = Vec::new();
    let tellings = match scene.arrangement {
        Arrangement::Pair(_) => vec![scene.clone(), scene.turned()],
        _ => vec![scene.clone()],
    };
    turns.push((DESCRIBE.to_owned(), format!(" {}.", describe::whole(&scene.in_reading_order()))));
    for scene in &tellings {
        for thing in 0..scene.things.len() {
            let asked = ALL.into_iter().filter_map(|asked| ask(asked, scene, thing));
            turns.extend(asked.map(|(question, answer)| (in_short(&question), format!(" {answer}"))));
            // Of several alike a name means none.
            if scene.counts().len() == scene.things.len() {
                turns.push(located(&scene.things[thing]));
            }
        }
    }
    turns.sort();
    turns.dedup();
    turns
}

/// In the wording of upstream's few-shot prompts.
fn in_short(question: &str) -> String {
    format!("based on the picture, {question} short answer:")
}

pub(super) fn question_about(draw: &mut Draw, asked: Asked, chat: bool) -> Document {
    let composer = draw.world.composer(draw.split);
    loop {
        let scene = match asked {
            // Counts 1 to 4 alike often, in both arrangements.
            Asked::HowMany if draw.rng.random_bool(0.5) => composer.spread(&mut draw.rng),
            Asked::HowMany => composer.gathered(&mut draw.rng),
            Asked::What => composer.single(&mut draw.rng),
            Asked::Related => composer.pair(&mut draw.rng),
            Asked::Where | Asked::Colour => composer.any(&mut draw.rng),
        };
        let thing = draw.rng.random_range(0..scene.things.len() as u32) as usize;
        if let Some((question, answer)) = ask(asked, &scene, thing) {
            return answered(draw, scene, &question, &answer, chat);
        }
    }
}

fn answered(draw: &Draw, scene: Scene, question: &str, answer: &str, chat: bool) -> Document {
    let image = draw.given(&scene);
    let answer = Piece::learned(format!(" {answer}"));
    let pieces = if chat {
        let opening = Piece::given(format!("{SYSTEM_MESSAGE} [USER]: "));
        vec![opening, image, Piece::given(format!("{question} [ASSISTANT]:")), answer]
    } else {
        vec![image, Piece::given(in_short(question)), answer]
    };
    document(Task::Question, scene, pieces)
}

/// Boxes of what is named, or a name for what is in a box.
pub(super) fn grounding(draw: &mut Draw) -> Document {
    let composer = draw.world.composer(draw.split);
    match draw.rng.random_range(0..10u32) {
        0..5 => locate(draw),
        5..7 => located_in_chat(draw),
        7..9 => {
            let scene = composer.any(&mut draw.rng);
            let text = Piece::learned(format!("{}.", grounded(&scene.in_reading_order())));
            let pieces = vec![draw.given(&scene), Piece::given("<grounding>"), text];
            document(Task::Grounding, scene, pieces)
        }
        _ => {
            let scene = one_of_each(draw);
            let thing = some_thing(draw, &scene);
            let object = format!("what is <object>{}</object>? short answer:", coordinates(&thing));
            let answer = Piece::learned(format!(" {}", thing.concept.name()));
            let pieces = vec![draw.given(&scene), Piece::given(object), answer];
            document(Task::Grounding, scene, pieces)
        }
    }
}

/// The scene's things are all different, so that a name means one.
fn one_of_each(draw: &mut Draw) -> Scene {
    let composer = draw.world.composer(draw.split);
    match draw.rng.random_range(0..3u32) {
        0 => composer.single(&mut draw.rng),
        1 => composer.pair(&mut draw.rng),
        _ => composer.corners(&mut draw.rng),
    }
}

fn some_thing(draw: &mut Draw, scene: &Scene) -> Thing {
    *scene.things.choose(&mut draw.rng).expect("a scene has a thing")
}

fn coordinates(thing: &Thing) -> String {
    describe::coordinates(thing.bounds)
}

/// `<grounding><phrase>a cat</phrase><object>` → four coordinates, `</object>`. The thing asked for comes first in the
/// document's scene.
pub(super) fn locate(draw: &mut Draw) -> Document {
    let (scene, thing, image) = asked_for(draw);
    let (phrase, answer) = located(&thing);
    document(Task::Grounding, scene, vec![image, Piece::given(phrase), Piece::learned(answer)])
}

fn located(thing: &Thing) -> (String, String) {
    let phrase = format!("<grounding><phrase>{}</phrase><object>", thing.concept.with_article());
    (phrase, format!("{}</object>", coordinates(thing)))
}

fn asked_for(draw: &mut Draw) -> (Scene, Thing, Piece) {
    let mut scene = one_of_each(draw);
    let image = draw.given(&scene);
    let chosen = draw.rng.random_range(0..scene.things.len() as u32) as usize;
    scene.things.swap(0, chosen);
    let thing = scene.things[0];
    (scene, thing, image)
}

fn located_in_chat(draw: &mut Draw) -> Document {
    let (scene, thing, image) = asked_for(draw);
    let name = thing.concept.name();
    let pieces = vec![
        Piece::given(format!("{GROUNDING_SYSTEM_MESSAGE} [USER]: ")),
        image,
        Piece::given(format!("where is the {name}? [ASSISTANT]:<grounding>")),
        Piece::learned(format!("<phrase>the {name}</phrase><object>{}</object>", coordinates(&thing))),
    ];
    document(Task::Grounding, scene, pieces)
}

/// Every thing with its box, in the order of a description.
fn grounded(scene: &Scene) -> String {
    let things = scene.things.iter().map(|thing| {
        format!("<phrase>{}</phrase><object>{}</object>", thing.concept.with_article(), coordinates(thing))
    });
    let things: Vec<String> = things.collect();
    let joint = match scene.arrangement {
        Arrangement::Pair(relation) => relation.name(),
        Arrangement::Single(_) | Arrangement::Group(_) | Arrangement::Corners(_) => "and",
    };
    format!("{}{}", things.join(joint), describe::on_background(scene))
}
