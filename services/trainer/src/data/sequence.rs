//! A document → token ids, slots for embeddings, where the losses fall; laid out exactly as the llm service lays out a
//! prompt (`emu2_llm::prompt`), which a test holds.

use emu2_llm::tokenizer::{Special, Tokenizer};

use crate::data::{
    document::{Document, Piece},
    image::Image,
    outline,
};

const IMG: &str = "[IMG]";
const IMG_END: &str = "[/IMG]";
const VIDEO: &str = "[VIDEO]";
pub(super) const EOS: &str = "</s>";
/// The first of the special tokens that follow those of the model file.
const FIRST_APPENDED: &str = "[PAD]";

/// How many embeddings the tower gives of an image and of a video frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queries {
    /// The number of embeddings of an image.
    pub n_query: usize,
    /// The number of embeddings of a video frame.
    pub v_query: usize,
}

/// A document as the llm reads it.
#[derive(Debug, Clone, Default)]
pub struct Sequence {
    /// The token id of each position; inside slots the id of `<image>` or `[gIMG]`.
    pub ids: Vec<u32>,
    /// Whether cross-entropy falls on predicting `ids[position]` (from the position before); never inside slots.
    pub learn: Vec<bool>,
    /// The images in order of appearance.
    pub slots: Vec<ImageSlot>,
}

/// The positions [start, start + len) hold one image's embeddings.
#[derive(Debug, Clone)]
pub struct ImageSlot {
    /// The first position of the slot.
    pub start: usize,
    /// The number of positions of the slot.
    pub len: usize,
    /// The image whose embeddings they hold.
    pub image: Image,
    /// Whether the embeddings are to be regressed: hidden state at `start - 1 + i` predicts embedding `i`.
    pub learn: bool,
}

impl Sequence {
    /// Lays out a document.
    ///
    /// # Panics
    /// If a learned text begins inside a token.
    pub fn new(document: &Document, tokenizer: &Tokenizer, queries: Queries) -> Self {
        let mut sequence = Self::default();
        sequence.push(tokenizer.special(Special::Bos), false);
        // Text that no slot interrupts, special tokens written out: they take the white space around them along.
        let mut run = Vec::new();
        let image_slot = (Special::Image, queries.n_query);
        for piece in &document.pieces {
            match piece {
                Piece::Text { text, learn } => {
                    let after_tokens = run.is_empty() && sequence.ids.len() > 1;
                    let text = if after_tokens { text.trim_start() } else { text };
                    run.push((text.to_owned(), *learn));
                }
                Piece::Tokens { numbers, learn } => {
                    sequence.text(tokenizer, &mut run);
                    numbers.iter().for_each(|&number| sequence.push(ordinary(tokenizer, number), *learn));
                }
                Piece::Image { image, learn } => {
                    sequence.slot(tokenizer, &mut run, image_slot, (image, *learn))
                }
                Piece::Video { frames } => {
                    run.push((VIDEO.to_owned(), false));
                    let frame = (Special::Gimg, queries.v_query);
                    for image in frames {
                        sequence.slot(tokenizer, &mut run, frame, (image, false));
                    }
                }
                Piece::Box { phrase, bounds } => {
                    run.push((format!("<phrase>{phrase}</phrase><object>"), false));
                    sequence.slot(tokenizer, &mut run, image_slot, (&outline::image(*bounds), false));
                    run.push(("</object>".to_owned(), false));
                }
            }
        }
        if document.ends {
            let learn = match document.pieces.last() {
                Some(
                    Piece::Text { learn, .. } | Piece::Tokens { learn, .. } | Piece::Image { learn, .. },
                ) => *learn,
                Some(Piece::Box { .. } | Piece::Video { .. }) | None => false,
            };
            run.push((EOS.to_owned(), learn));
        }
        sequence.text(tokenizer, &mut run);
        sequence
    }

    fn push(&mut self, id: u32, learn: bool) {
        self.ids.push(id);
        self.learn.push(learn);
    }

    /// Tokens see the whole run, which is emptied; those of a learned text are the ones that it adds to the text
    /// before it.
    fn text(&mut self, tokenizer: &Tokenizer, run: &mut Vec<(String, bool)>) {
        let mut text = String::new();
        // The first id is `<s>`.
        let mut ids = vec![tokenizer.special(Special::Bos)];
        for alike in run.chunk_by(|one, other| one.1 == other.1) {
            let (before, learn) = (text.len(), alike[0].1);
            text.extend(alike.iter().map(|(piece, _)| piece.as_str()));
            let longer = tokenizer.encode(&text);
            assert!(
                longer.starts_with(&ids),
                "a token straddles {:?} and {:?}",
                &text[..before],
                &text[before..]
            );
            for &id in &longer[ids.len()..] {
                self.push(id, learn);
            }
            ids = longer;
        }
        run.clear();
    }

    /// Writes the run up to here, then the image; what follows begins with `[/IMG]`.
    fn slot(
        &mut self,
        tokenizer: &Tokenizer,
        run: &mut Vec<(String, bool)>,
        (token, len): (Special, usize),
        (image, learn): (&Image, bool),
    ) {
        run.push((IMG.to_owned(), learn));
        self.text(tokenizer, run);
        self.slots.push(ImageSlot { start: self.ids.len(), len, image: image.clone(), learn });
        for _ in 0..len {
            self.push(tokenizer.special(token), false);
        }
        run.push((IMG_END.to_owned(), false));
    }
}

/// Returns the id of an ordinary token by its number, counted down from the last before the appended special ones.
fn ordinary(tokenizer: &Tokenizer, number: u32) -> u32 {
    let appended = tokenizer.special_named(FIRST_APPENDED).expect("every tokenizer has the published tokens");
    appended - 1 - number
}
