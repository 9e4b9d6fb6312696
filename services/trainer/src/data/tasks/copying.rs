//! What came earlier, to be found again: random tokens, so that nothing else tells what comes next.
//!
//! An episode of names asks for a look-up in one token of hundreds, and a model that has learned to write any of the
//! names has no slope to follow from there. Here every token of a repetition asks for it.

use rand::{Rng, seq::SliceRandom, seq::index};
use rand_chacha::ChaCha8Rng;

use crate::data::{
    document::{Document, Piece, TOKENS, Task},
    scene::Scene,
    tasks::draw::Draw,
};

/// Returns `count` different tokens.
pub(super) fn tokens(rng: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
    index::sample(rng, TOKENS as usize, count).into_iter().map(|number| number as u32).collect()
}

/// `a b c` → `a b c a b c`: 3 to 12 tokens, two or three times.
pub(super) fn repetition(draw: &mut Draw) -> Document {
    let count = draw.rng.random_range(3..=12u32) as usize;
    let numbers = tokens(&mut draw.rng, count);
    let again = numbers.repeat(draw.rng.random_range(1..=2u32) as usize);
    endless(
        Task::Repetition,
        vec![Piece::Tokens { numbers, learn: false }, Piece::Tokens { numbers: again, learn: true }],
    )
}

/// Times that each key comes with its value.
const ROUNDS: usize = 3;

/// `a 1 b 2 c 3 b` → `2`, ` a` → `1`, …: 2 to 6 keys, each round in another order.
pub(super) fn key_values(draw: &mut Draw) -> Document {
    let count = draw.rng.random_range(2..=6u32) as usize;
    let numbers = tokens(&mut draw.rng, 2 * count);
    let mut pairs: Vec<_> = numbers.chunks(2).collect();
    let mut pieces = Vec::new();
    for round in 0..ROUNDS {
        pairs.shuffle(&mut draw.rng);
        for pair in &pairs {
            let token = |number, learn| Piece::Tokens { numbers: vec![number], learn };
            pieces.extend([token(pair[0], false), token(pair[1], round > 0)]);
        }
    }
    endless(Task::KeyValues, pieces)
}

/// Nothing tells where such a document ends.
fn endless(task: Task, pieces: Vec<Piece>) -> Document {
    Document { task, pieces, scene: Scene::empty(), ends: false }
}
