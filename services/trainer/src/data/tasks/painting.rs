//! Images to paint. What they show is determined by what is given: see [`Composer::tidy`].

use rand::{Rng, seq::IndexedRandom};

use crate::data::{
    atlas::Style,
    compose::Composer,
    describe,
    document::{Document, Piece, Task},
    held_out,
    scene::{Arrangement, Place, Scene},
    tasks::draw::{Draw, document},
    world::Split,
};

/// Share of images that are told by nothing: what guidance is measured from.
const UNTOLD: f64 = 0.05;

pub(super) fn text_to_image(draw: &mut Draw) -> Document {
    let scene = draw.world.painter(draw.split).any(&mut draw.rng);
    if draw.rng.random_bool(UNTOLD) {
        let pieces = vec![draw.painted(&scene)];
        return document(Task::TextToImage, scene, pieces);
    }
    told(draw, scene)
}

/// `a cat left of a dog on a red background` → its image.
pub(super) fn told(draw: &Draw, scene: Scene) -> Document {
    let pieces = vec![Piece::given(describe::whole(&scene)), draw.painted(&scene)];
    document(Task::TextToImage, scene, pieces)
}

/// `[img] the same in the center on a blue background` → the same drawing there.
pub(super) fn subject(draw: &mut Draw) -> Document {
    let given = draw.world.composer(draw.split).single(&mut draw.rng);
    let style = given.things[0].style;
    let place = *Place::ALL.choose(&mut draw.rng).expect("not empty");
    let painter = Composer { styles: only(style), ..draw.world.painter(draw.split) };
    let scene = painter.placed(&mut draw.rng, given.things[0].concept, place);
    let text = format!(" the same {} {}", describe::at(place), describe::on_background(&scene));
    let pieces = vec![draw.given(&given), Piece::given(text), draw.painted(&scene)];
    document(Task::Subject, scene, pieces)
}

/// `<grounding>an image on a red background:`, then for each thing its box, and with some also its drawing.
pub(super) fn box_to_image(draw: &mut Draw) -> Document {
    let with_drawings = draw.rng.random_bool(0.4);
    let things = draw.rng.random_range(1..=2u32);
    boxed(draw, things, with_drawings)
}

pub(super) fn boxed(draw: &mut Draw, things: u32, with_drawings: bool) -> Document {
    // Boxes say where things are and how large, so these need not be tidy.
    let composer = draw.world.composer(draw.split);
    let style = if with_drawings { composer.style(&mut draw.rng) } else { composer.styles[0] };
    let composer = Composer { styles: only(style), ..composer };
    let scene = match things {
        1 => composer.single(&mut draw.rng),
        _ => composer.pair(&mut draw.rng),
    };
    let mut pieces = vec![Piece::given(format!("<grounding>a picture {}:", describe::on_background(&scene)))];
    for thing in &scene.things {
        pieces.push(Piece::Box { phrase: thing.concept.with_article(), bounds: thing.bounds });
        if with_drawings {
            let painter = Composer { tidy: true, ..composer };
            let alone = painter.placed(&mut draw.rng, thing.concept, Place::Center);
            pieces.push(draw.given(&alone));
        }
    }
    pieces.push(draw.painted(&scene));
    document(Task::BoxToImage, scene, pieces)
}

/// An image, what to change, and the image after.
pub(super) fn editing(draw: &mut Draw) -> Document {
    loop {
        let before = draw.world.composer(draw.split).any(&mut draw.rng);
        let edit = match draw.rng.random_range(0..3u32) {
            0 => recoloured(draw, &before),
            1 => replaced(draw, &before),
            _ => removed(draw, &before),
        };
        let Some((text, after)) = edit else { continue };
        if draw.split == Split::Train && held_out::scene(&after) {
            continue;
        }
        let pieces = vec![draw.given(&before), Piece::given(text), draw.painted(&after)];
        return document(Task::Editing, after, pieces);
    }
}

fn recoloured(draw: &mut Draw, before: &Scene) -> Option<(String, Scene)> {
    let composer = draw.world.composer(draw.split);
    let background = composer.background(&mut draw.rng, &before.things, &[before.background])?;
    let text = format!(" make the background {}", background.name());
    Some((text, Scene { background, ..before.clone() }))
}

/// The first thing by another, where it is one of its kind.
fn replaced(draw: &mut Draw, before: &Scene) -> Option<(String, Scene)> {
    if matches!(before.arrangement, Arrangement::Group(_)) {
        return None;
    }
    let old = before.things[0];
    let composer = draw.world.composer(draw.split);
    let concept = composer.concept(&mut draw.rng);
    let legible = draw.world.drawings().legible(concept, old.style, before.background);
    if before.things.iter().any(|thing| thing.concept == concept) || !legible {
        return None;
    }
    let mut after = before.clone();
    after.things[0] = composer.instead(old, concept);
    let text = format!(" replace the {} with {}", old.concept.name(), concept.with_article());
    Some((text, after))
}

/// One of two.
fn removed(draw: &mut Draw, before: &Scene) -> Option<(String, Scene)> {
    let Arrangement::Pair(_) = before.arrangement else { return None };
    let gone = draw.rng.random_range(0..2u32) as usize;
    let text = format!(" remove the {}", before.things[gone].concept.name());
    let mut after = before.clone();
    after.things.remove(gone);
    after.arrangement = Arrangement::Group(None);
    Some((text, after))
}

fn only(style: Style) -> &'static [Style] {
    match style {
        Style::Noto => &[Style::Noto],
        Style::Fluent => &[Style::Fluent],
        Style::Twemoji => &[Style::Twemoji],
    }
}
