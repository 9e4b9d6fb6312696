//! A document as the model reads it, and what is learned of it.

use serde::Deserialize;

use crate::data::{
    picture::Picture,
    scene::{Bounds, Scene},
};

/// What a document teaches; each has its own weight in a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A picture before or after the text that describes it.
    Caption,
    /// What, how many, where, which colour.
    Question,
    /// Two things and how they lie, told or asked: names must be bound to places.
    Relation,
    /// Several questions about one picture, each with its answer.
    Interview,
    /// Text with boxes of what it names.
    Grounding,
    /// Made-up names bound to things by demonstrations.
    Names,
    /// The same with names in place of pictures: what an episode asks for, before pictures must be read for it.
    NamesInWords,
    /// `[red, cat, 3, bottom left].`, the format shown by demonstrations.
    Tuples,
    /// What stands in a red circle.
    Circle,
    TextToImage,
    /// A thing from a picture, elsewhere.
    Subject,
    /// Boxes and the things to paint in them.
    BoxToImage,
    /// A picture, an instruction, the changed picture.
    Editing,
    /// Frames of one moving thing, and the motion in words.
    Clip,
}

impl Task {
    pub const ALL: [Self; 14] = [
        Self::Caption,
        Self::Question,
        Self::Relation,
        Self::Interview,
        Self::Grounding,
        Self::Names,
        Self::NamesInWords,
        Self::Tuples,
        Self::Circle,
        Self::TextToImage,
        Self::Subject,
        Self::BoxToImage,
        Self::Editing,
        Self::Clip,
    ];

    /// In logs; also names the random numbers that its documents draw.
    pub fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Question => "question",
            Self::Relation => "relation",
            Self::Interview => "interview",
            Self::Grounding => "grounding",
            Self::Names => "names",
            Self::NamesInWords => "names in words",
            Self::Tuples => "tuples",
            Self::Circle => "circle",
            Self::TextToImage => "text to image",
            Self::Subject => "subject",
            Self::BoxToImage => "box to image",
            Self::Editing => "editing",
            Self::Clip => "clip",
        }
    }

    /// Whether every document ends with a picture to paint.
    pub fn paints(self) -> bool {
        matches!(self, Self::TextToImage | Self::Subject | Self::BoxToImage | Self::Editing)
    }
}

/// In order. It begins with `<s>`, which is not among the pieces. The last piece is the answer to those before it.
#[derive(Debug, Clone)]
pub struct Document {
    pub task: Task,
    pub pieces: Vec<Piece>,
    /// What the last piece shows or tells of; of a clip, its first frame.
    pub scene: Scene,
    /// Whether `</s>` follows the last piece; it is learned if that piece is.
    pub ends: bool,
}

#[derive(Debug, Clone)]
pub enum Piece {
    /// Joined with the text before it, as a served prompt joins its parts: a space between two words is written in one
    /// of the two. Special tokens are written out (`<phrase>`, `<patch_index_0003>`). `learn`: cross-entropy falls on
    /// its tokens; such a piece begins with a space, with a special token or after a picture, so that no token
    /// straddles its beginning.
    Text { text: String, learn: bool },
    /// `[IMG]`, one slot of n_query embeddings, `[/IMG]`. `learn`: its embeddings are to be regressed, and
    /// cross-entropy falls on its `[IMG]`.
    Image { picture: Picture, learn: bool },
    /// A phrase and the place of what it names in the picture to paint: `<phrase>…</phrase><object>`, an image of the
    /// outline, `</object>`.
    Box { phrase: String, bounds: Bounds },
    /// `[VIDEO]`, then every frame as `[IMG]`, v_query embeddings, `[/IMG]`.
    Video { frames: Vec<Picture> },
}

impl Piece {
    /// What the model is given.
    pub fn given(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), learn: false }
    }

    /// What the model is to write.
    pub fn learned(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), learn: true }
    }
}
