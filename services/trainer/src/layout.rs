//! Sequences side by side, as numbers that name rows: what is read where, and what is predicted from where.
//!
//! Rows of a batch are counted through: row i of sequence s stands at s × tokens + i. Sequences are padded at their
//! ends, which no row before them sees.

use anyhow::{Result, ensure};

use crate::data::{Image, Sequence};

/// The token id that fills the ends: it is never looked at.
const PADDING: i64 = 0;

/// The positions of one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The number of sequences.
    pub sequences: usize,
    /// The number of positions of each sequence, with padding.
    pub tokens: usize,
    /// The token ids: [(sequences tokens)]
    pub ids: Vec<i64>,
    /// The row of each embedding of each image, image by image.
    pub slots: Vec<i64>,
    /// Rows from which a token is predicted, and that token.
    pub text: Predictions,
    /// Rows from which an embedding is predicted, and which: a place in `slots`.
    pub images: Predictions,
}

/// What is predicted from which rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Predictions {
    /// The rows whose hidden states predict.
    pub rows: Vec<i64>,
    /// What each of them predicts: a token id, or a place in [`Layout::slots`].
    pub targets: Vec<i64>,
}

impl Predictions {
    fn push(&mut self, row: usize, target: i64) {
        self.rows.push(row as i64);
        self.targets.push(target);
    }

    /// Returns whether nothing is predicted.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl Layout {
    /// Returns the numbers of the images to paint, among all images. `queries`: embeddings of an image.
    pub fn painted(&self, queries: i64) -> Vec<i64> {
        let mut images: Vec<i64> = self.images.targets.iter().map(|place| place / queries).collect();
        images.dedup();
        images
    }

    /// Lays sequences side by side; returns their images too, in the order of [`Self::slots`].
    ///
    /// # Errors
    /// When a slot has not `queries` positions.
    pub fn new(sequences: &[Sequence], queries: usize) -> Result<(Self, Vec<Image>)> {
        let tokens = sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or_default();
        let mut layout = Self { sequences: sequences.len(), tokens, ..Self::default() };
        let mut images = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let first = index * tokens;
            let ids = sequence.ids.iter().map(|&id| i64::from(id));
            layout.ids.extend(ids.chain(std::iter::repeat(PADDING)).take(tokens));
            for position in (1..sequence.ids.len()).filter(|&position| sequence.learn[position]) {
                layout.text.push(first + position - 1, i64::from(sequence.ids[position]));
            }
            for slot in &sequence.slots {
                ensure!(
                    slot.len == queries,
                    "images must have {queries} embeddings each, one has {}",
                    slot.len
                );
                for position in slot.start..slot.start + slot.len {
                    if slot.learn {
                        layout.images.push(first + position - 1, layout.slots.len() as i64);
                    }
                    layout.slots.push((first + position) as i64);
                }
                images.push(slot.image.clone());
            }
        }
        Ok((layout, images))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageSlot;

    #[test]
    fn rows_are_counted_through_and_ends_are_padded() {
        let image = Image::new(vec![7; Image::BYTES]);
        let slot = |start, learn| ImageSlot { start, len: 2, image: image.clone(), learn };
        let long = Sequence {
            ids: vec![1, 8, 9, 9, 10, 5],
            learn: vec![false, true, false, false, false, true],
            slots: vec![slot(2, true)],
        };
        let short = Sequence {
            ids: vec![1, 9, 9, 2],
            learn: vec![false, false, false, true],
            slots: vec![slot(1, false)],
        };
        let (layout, images) = Layout::new(&[long.clone(), short], 2).unwrap();
        assert_eq!((layout.sequences, layout.tokens, images.len()), (2, 6, 2));
        assert_eq!(layout.ids, [1, 8, 9, 9, 10, 5, 1, 9, 9, 2, 0, 0]);
        assert_eq!(layout.slots, [2, 3, 7, 8]);
        assert_eq!(layout.text, Predictions { rows: vec![0, 4, 8], targets: vec![8, 5, 2] });
        assert_eq!(layout.images, Predictions { rows: vec![1, 2], targets: vec![0, 1] });
        assert_eq!(layout.painted(2), [0]);
        let error = Layout::new(&[long], 3).unwrap_err().to_string();
        assert!(error.contains("3 embeddings each, one has 2"), "{error}");
    }
}
