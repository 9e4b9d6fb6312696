//! A document as the model reads it, and what is learned of it.

use serde::Deserialize;

use crate::data::{
    image::Image,
    scene::{Bounds, Scene},
};

/// The ordinary tokens that documents use by number: pieces of nano's tokenizer without the bytes, which no text needs.
pub const TOKENS: u32 = 960;

/// What a document teaches; each has its own weight in a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// An image before or after the text that describes it.
    Caption,
    /// What, how many, where, which colour.
    Question,
    /// Two things and how they lie, told or asked: names must be bound to places.
    Relation,
    /// Several questions about one image, each with its answer.
    Interview,
    /// Text with boxes of what it names.
    Grounding,
    /// Random tokens and the same again: the first skill of an episode, to find what came earlier.
    Repetition,
    /// Keys and values, each key again with its value: the second, to find it by what stood before it.
    KeyValues,
    /// Made-up names bound to random tokens: what an episode asks for, before images must be read for it.
    NamesOfTokens,
    /// The same bound to images, each of which comes again.
    NamesOfSameImages,
    /// Made-up names bound to things by demonstrations.
    Names,
    /// `[red, cat, 3, bottom left].`, the format shown by demonstrations.
    Tuples,
    /// What stands in a red circle.
    Circle,
    /// An image to paint from words.
    TextToImage,
    /// A thing from an image, elsewhere.
    Subject,
    /// Boxes and the things to paint in them.
    BoxToImage,
    /// An image, an instruction, the changed image.
    Editing,
    /// Frames of one moving thing, and the motion in words.
    Clip,
}

impl Task {
    /// Every task, in the order of their declaration.
    pub const ALL: [Self; 17] = [
        Self::Caption,
        Self::Question,
        Self::Relation,
        Self::Interview,
        Self::Grounding,
        Self::Repetition,
        Self::KeyValues,
        Self::NamesOfTokens,
        Self::NamesOfSameImages,
        Self::Names,
        Self::Tuples,
        Self::Circle,
        Self::TextToImage,
        Self::Subject,
        Self::BoxToImage,
        Self::Editing,
        Self::Clip,
    ];

    /// Returns the task's name in logs, which also seeds the random numbers of its documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Question => "question",
            Self::Relation => "relation",
            Self::Interview => "interview",
            Self::Grounding => "grounding",
            Self::Repetition => "repetition",
            Self::KeyValues => "key values",
            Self::NamesOfTokens => "names of tokens",
            Self::NamesOfSameImages => "names of same images",
            Self::Names => "names",
            Self::Tuples => "tuples",
            Self::Circle => "circle",
            Self::TextToImage => "text to image",
            Self::Subject => "subject",
            Self::BoxToImage => "box to image",
            Self::Editing => "editing",
            Self::Clip => "clip",
        }
    }

    /// Returns whether every document of the task ends with an image to paint.
    pub fn paints(self) -> bool {
        matches!(self, Self::TextToImage | Self::Subject | Self::BoxToImage | Self::Editing)
    }
}

/// A document of interleaved text and images. It begins with `<s>`, which is not among the pieces; the last piece is
/// the answer to those before it.
#[derive(Debug, Clone)]
pub struct Document {
    /// The task that the document is of.
    pub task: Task,
    /// What the model reads, in order.
    pub pieces: Vec<Piece>,
    /// The scene that the last piece shows or describes; of a clip, its first frame; of tokens, an empty one.
    pub scene: Scene,
    /// Whether `</s>` follows the last piece; it is learned if that piece is.
    pub ends: bool,
}

/// One part of a document.
#[derive(Debug, Clone)]
pub enum Piece {
    /// Text, joined with the text before it as a served prompt joins its parts: a space between two words is written in
    /// one of the two. Special tokens are written out (`<phrase>`, `<patch_index_0003>`).
    Text {
        /// The text itself.
        text: String,
        /// Whether cross-entropy falls on its tokens. Such a piece begins with a space, with a special token or after
        /// an image, so that no token straddles its beginning.
        learn: bool,
    },
    /// Tokens that mean nothing together. White space after them is dropped, as it is after special tokens.
    Tokens {
        /// Each token's number among the ordinary ones, from the last of the tokenizer's model file down; below
        /// [`TOKENS`].
        numbers: Vec<u32>,
        /// Whether cross-entropy falls on them.
        learn: bool,
    },
    /// An image: `[IMG]`, one slot of n_query embeddings, `[/IMG]`.
    Image {
        /// The pixels.
        image: Image,
        /// Whether its embeddings are to be regressed, and cross-entropy falls on its `[IMG]`.
        learn: bool,
    },
    /// A phrase and the place of what it names in the image to paint: `<phrase>…</phrase><object>`, an image of the
    /// outline, `</object>`.
    Box {
        /// What is to be painted there.
        phrase: String,
        /// Where it is to be painted.
        bounds: Bounds,
    },
    /// A video: `[VIDEO]`, then every frame as `[IMG]`, v_query embeddings, `[/IMG]`.
    Video {
        /// The frames in their order.
        frames: Vec<Image>,
    },
}

impl Piece {
    /// Returns a text that the model is given.
    pub fn given(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), learn: false }
    }

    /// Returns a text that the model is to write.
    pub fn learned(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), learn: true }
    }
}
