//! Scenes in words.

use crate::data::scene::{Arrangement, Bounds, Place, Scene};

/// Coordinates in text reach from 0 to this.
const COORDINATE_MAX: f32 = 224.0;

/// Returns `a cat at the top left on a red background`: things, where they are if that can be said, and the background.
pub fn whole(scene: &Scene) -> String {
    let place = match &scene.arrangement {
        Arrangement::Single(place) | Arrangement::Group(Some(place)) => format!(" {}", at(*place)),
        Arrangement::Group(None) | Arrangement::Pair(_) | Arrangement::Corners(_) => String::new(),
    };
    format!("{}{place} {}", things(scene), on_background(scene))
}

/// Returns `a cat`, `3 cats`, `a cat left of a dog`, `a cat, a dog and a fox`.
pub fn things(scene: &Scene) -> String {
    let counted: Vec<String> = scene
        .counts()
        .into_iter()
        .map(|(concept, count)| match count {
            1 => concept.with_article(),
            _ => format!("{count} {}", concept.plural()),
        })
        .collect();
    match (&scene.arrangement, counted.as_slice()) {
        (Arrangement::Pair(relation), [first, second]) => format!("{first} {} {second}", relation.name()),
        (_, [before @ .., last]) if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => counted.concat(),
    }
}

/// Returns `on a red background`.
pub fn on_background(scene: &Scene) -> String {
    format!("on a {} background", scene.background.name())
}

/// Returns `at the top left`, `in the center`.
pub fn at(place: Place) -> String {
    match place {
        Place::Center => "in the center".to_owned(),
        _ => format!("at the {}", place.name()),
    }
}

/// Returns `[red, cat, 3, bottom left].` of things that are in one place.
pub fn tuple(scene: &Scene) -> String {
    let thing = scene.things[0].concept.name();
    let place = match &scene.arrangement {
        Arrangement::Single(place) | Arrangement::Group(Some(place)) => place.name(),
        Arrangement::Group(None) | Arrangement::Pair(_) | Arrangement::Corners(_) => "everywhere",
    };
    format!("[{}, {thing}, {}, {place}].", scene.background.name(), scene.things.len())
}

/// Returns `<patch_index_0007>` four times, for left, top, right and bottom, as a served prompt writes a box.
pub fn coordinates(bounds: Bounds) -> String {
    let coordinate = |edge: f32| format!("<patch_index_{:04}>", (edge * COORDINATE_MAX).round() as u32);
    bounds.fractions().map(coordinate).concat()
}
