//! A document → token ids, slots for embeddings, where the losses fall; laid out exactly as the llm service lays out a
//! prompt (`emu2_llm::prompt`), which a test holds.

use emu2_llm::tokenizer::{Special, Tokenizer};

use super::{Document, Picture, Piece};

/// Embeddings of an image, and of a video frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queries {
    pub n_query: usize,
    pub v_query: usize,
}

#[derive(Debug, Clone, Default)]
pub struct Sequence {
    /// One a position; inside slots the id of `<image>` or `[gIMG]`.
    pub ids: Vec<u32>,
    /// Whether cross-entropy falls on predicting `ids[position]` (from the position before); never inside slots.
    pub learn: Vec<bool>,
    /// In order of appearance.
    pub slots: Vec<PictureSlot>,
}

/// The positions [start, start + len) hold one picture's embeddings.
#[derive(Debug, Clone)]
pub struct PictureSlot {
    pub start: usize,
    pub len: usize,
    pub picture: Picture,
    /// Whether the embeddings are to be regressed: hidden state at `start - 1 + i` predicts embedding `i`.
    pub learn: bool,
}

impl Sequence {
    /// # Panics
    /// If a learned text begins inside a token.
    pub fn new(document: &Document, tokenizer: &Tokenizer, queries: Queries) -> Self {
        let mut sequence = Self::default();
        sequence.push(tokenizer.special(Special::Bos), false);
        let mut pieces = document.pieces.iter().peekable();
        while let Some(piece) = pieces.next() {
            match piece {
                Piece::Image { picture, learn } => {
                    sequence.slot(tokenizer, Special::Image, queries.n_query, picture, *learn);
                }
                Piece::Video { frames } => {
                    let video = tokenizer.special_named("[VIDEO]").expect("appended to every vocabulary");
                    sequence.push(video, false);
                    for frame in frames {
                        sequence.slot(tokenizer, Special::Gimg, queries.v_query, frame, false);
                    }
                }
                Piece::Text { text, learn } => {
                    let mut run = vec![(text.as_str(), *learn)];
                    while let Some(Piece::Text { text, learn }) =
                        pieces.next_if(|piece| matches!(piece, Piece::Text { .. }))
                    {
                        run.push((text, *learn));
                    }
                    sequence.text(tokenizer, &run);
                }
            }
        }
        if document.ends {
            let learn = match document.pieces.last() {
                Some(Piece::Text { learn, .. } | Piece::Image { learn, .. }) => *learn,
                Some(Piece::Video { .. }) | None => false,
            };
            sequence.push(tokenizer.special(Special::Eos), learn);
        }
        sequence
    }

    fn push(&mut self, id: u32, learn: bool) {
        self.ids.push(id);
        self.learn.push(learn);
    }

    /// Tokens see the whole run; a piece's tokens are those that its text adds to the text before it.
    fn text(&mut self, tokenizer: &Tokenizer, run: &[(&str, bool)]) {
        let mut text = String::new();
        // The first id is `<s>`.
        let mut done = 1;
        let mut ids = Vec::new();
        for (piece, learn) in run {
            text.push_str(piece);
            let longer = tokenizer.encode(&text);
            assert!(
                ids.get(..done).is_none_or(|before| longer.starts_with(before)),
                "a token straddles the beginning of {piece:?}"
            );
            for &id in &longer[done..] {
                self.push(id, *learn);
            }
            done = longer.len();
            ids = longer;
        }
    }

    fn slot(&mut self, tokenizer: &Tokenizer, token: Special, len: usize, picture: &Picture, learn: bool) {
        self.push(tokenizer.special(Special::Img), learn);
        self.slots.push(PictureSlot { start: self.ids.len(), len, picture: picture.clone(), learn });
        for _ in 0..len {
            self.push(tokenizer.special(token), false);
        }
        self.push(tokenizer.special(Special::ImgEnd), false);
    }
}
