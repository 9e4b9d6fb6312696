//! What a document is drawn from, and the pieces that documents of several tasks share.

use rand_chacha::ChaCha8Rng;

use crate::data::{
    document::{Document, Piece, Task},
    scene::Scene,
    sequence::EOS,
    world::{Split, World},
};

/// What a document is drawn from.
pub(super) struct Draw<'a> {
    pub(super) world: &'a World,
    pub(super) split: Split,
    pub(super) rng: ChaCha8Rng,
}

impl Draw<'_> {
    pub(super) fn given(&self, scene: &Scene) -> Piece {
        Piece::Image { image: self.world.image(scene), learn: false }
    }

    /// Questions about what is given before them, each with its answer and the end of it.
    pub(super) fn asked(pieces: &mut Vec<Piece>, turns: impl IntoIterator<Item = (String, String)>) {
        for (index, (question, answer)) in turns.into_iter().enumerate() {
            // The last one's end is the document's.
            if index > 0
                && let Some(Piece::Text { text, .. }) = pieces.last_mut()
            {
                text.push_str(EOS);
            }
            pieces.extend([Piece::given(question), Piece::learned(answer)]);
        }
    }

    pub(super) fn painted(&self, scene: &Scene) -> Piece {
        Piece::Image { image: self.world.image(scene), learn: true }
    }
}

pub(super) fn document(task: Task, scene: Scene, pieces: Vec<Piece>) -> Document {
    Document { task, pieces, scene, ends: true }
}
