//! Clips of one moving thing.

use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};

use crate::data::{
    document::{Document, Piece, Task},
    image::SIDE,
    scene::{Bounds, Place, Scene},
    tasks::draw::{Draw, document},
};

/// Frames of a clip, as upstream samples.
pub const FRAMES: usize = 8;

/// Pixels from the first frame to the last.
const PATH: std::ops::RangeInclusive<u32> = 20..=32;

/// The direction that a thing moves in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Towards the left edge.
    Left,
    /// Towards the right edge.
    Right,
    /// Towards the upper edge.
    Up,
    /// Towards the lower edge.
    Down,
}

impl Direction {
    /// Every direction.
    pub const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Up, Self::Down];

    /// Returns the direction as documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Which way it moves, what moves, and both in a sentence, in any order: a clip is long, and so asked all of it.
pub(super) fn clip(draw: &mut Draw) -> Document {
    let direction = *Direction::ALL.choose(&mut draw.rng).expect("not empty");
    let (scene, video) = moving(draw, direction);
    let name = scene.things[0].concept.name();
    let mut turns = [
        which_way(direction),
        ("based on the video, what moves? short answer:".to_owned(), format!(" {name}")),
        ("Describe the video in details:".to_owned(), format!(" the {name} moves {}.", direction.name())),
    ];
    turns.shuffle(&mut draw.rng);
    let mut pieces = vec![video];
    Draw::asked(&mut pieces, turns);
    document(Task::Clip, scene, pieces)
}

pub(super) fn direction(draw: &mut Draw) -> Document {
    let direction = *Direction::ALL.choose(&mut draw.rng).expect("not empty");
    let (scene, video) = moving(draw, direction);
    let (question, answer) = which_way(direction);
    document(Task::Clip, scene, vec![video, Piece::given(question), Piece::learned(answer)])
}

fn which_way(direction: Direction) -> (String, String) {
    ("based on the video, which way does it move? short answer:".to_owned(), format!(" {}", direction.name()))
}

fn moving(draw: &mut Draw, direction: Direction) -> (Scene, Piece) {
    let composer = draw.world.composer(draw.split);
    let concept = composer.concept(&mut draw.rng);
    let mut scene = composer.placed(&mut draw.rng, concept, Place::TopLeft);
    let thing = scene.things[0].bounds;
    let (width, height) = (thing.right - thing.left, thing.bottom - thing.top);
    let side = SIDE as u32;
    let path = draw.rng.random_range(PATH);
    let mut start = |room: u32| draw.rng.random_range(0..=room);
    // The corner of the path nearest the image's top left.
    let (left, top) = match direction {
        Direction::Left | Direction::Right => (start(side - width - path), start(side - height)),
        Direction::Up | Direction::Down => (start(side - width), start(side - height - path)),
    };
    let mut frame = |number: usize| {
        let gone = path * number as u32 / (FRAMES as u32 - 1);
        let (across, down) = match direction {
            Direction::Left => (path - gone, 0),
            Direction::Right => (gone, 0),
            Direction::Up => (0, path - gone),
            Direction::Down => (0, gone),
        };
        let (left, top) = (left + across, top + down);
        scene.things[0].bounds = Bounds { left, top, right: left + width, bottom: top + height };
        draw.world.image(&scene)
    };
    // The first last, so that the scene stays as it began.
    let frames: Vec<_> = (0..FRAMES).rev().map(&mut frame).collect();
    let frames = frames.into_iter().rev().collect();
    (scene, Piece::Video { frames })
}
