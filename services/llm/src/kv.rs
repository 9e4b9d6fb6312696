//! Keys and values of one sequence: a tree of entries, appended to and never moved.
//!
//! Each layer keeps one buffer [heads, capacity, head_width] for keys and one for values, allocated once. A prompt, a
//! greedy text or an image being regressed is a line of entries. A beam search appends one entry per beam at every
//! step, whichever beams survive, and what each beam descends from stands in a small mask:
//!
//! ```text
//! entries   p0 p1 p2 | a0 b0 | a1 b1      a1 and b1 both continue b0; a0 is a dead branch
//! beam a    .  .  .  | x  .  | .  x       . is seen, x is not
//! beam b    .  .  .  | x  .  | x  .
//! ```
//!
//! So beams share their prompt and everything else they have in common, reordering beams reorders rows of the mask
//! and no keys or values, and all rows of a sequence attend in one matrix product. It costs no more memory than
//! private tails: beams × steps entries after the prompt.

use tch::{Device, Kind, Tensor};

/// What a sequence adds to its cache in a step.
#[derive(Clone, Copy, Debug)]
pub enum Append<'a> {
    /// This many successive positions: a chunk of a prompt, or one more token.
    Sequential(i64),
    /// One position for each of these rows; row i continues row `parents[i]` of the step before.
    Beams(&'a [i64]),
}

impl Append<'_> {
    /// Returns how many rows are added.
    pub(crate) fn rows(&self) -> i64 {
        match self {
            Self::Sequential(rows) => *rows,
            Self::Beams(parents) => parents.len() as i64,
        }
    }
}

/// Which entries, up to and with its own, each new row sees.
#[derive(Debug)]
pub(crate) enum AttentionMask {
    /// The new rows are the only entries: row i sees 0..=i.
    Causal,
    /// The one new row sees every entry.
    All,
    /// A mask that is added to scores, [rows, entries]: 0 where a row sees an entry, -inf where not.
    Mask(Tensor),
}

impl AttentionMask {
    /// Copies the mask to a device.
    pub(crate) fn to_device(&self, device: Device) -> Self {
        match self {
            Self::Causal => Self::Causal,
            Self::All => Self::All,
            Self::Mask(mask) => Self::Mask(mask.to_device(device)),
        }
    }
}

/// The new rows of one sequence in a step.
#[derive(Debug)]
pub(crate) struct Appended {
    /// How many entries lie before these rows.
    pub(crate) start: i64,
    /// How many rows are new.
    pub(crate) rows: i64,
    /// The position in the text of each row, which decides its rotation.
    pub(crate) positions: Vec<i64>,
    /// What each row sees.
    pub(crate) mask: AttentionMask,
}

/// Keys and values of one layer, each [heads, capacity, head_width].
#[derive(Debug)]
pub(crate) struct LayerKv {
    keys: Tensor,
    values: Tensor,
}

impl LayerKv {
    /// Allocates the keys and values of `capacity` entries.
    pub(crate) fn new(heads: i64, capacity: i64, head_width: i64, kind: Kind, device: Device) -> Self {
        let buffer = || Tensor::empty([heads, capacity, head_width], (kind, device));
        Self { keys: buffer(), values: buffer() }
    }

    /// Writes k and v, [heads, rows, head_width], after `start` entries; returns the keys and values of all entries so
    /// far, each [1, heads, entries, head_width].
    pub(crate) fn append(&self, start: i64, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let (_, rows, _) = k.size3().expect("k has three dimensions");
        let write = |buffer: &Tensor, new: &Tensor| {
            buffer.narrow(1, start, rows).copy_(new);
            buffer.narrow(1, 0, start + rows).unsqueeze(0)
        };
        (write(&self.keys, k), write(&self.values, v))
    }
}

/// Keys and values of one sequence in all layers.
#[derive(Debug)]
pub struct KvCache {
    /// The keys and values of each layer.
    pub(crate) layers: Vec<LayerKv>,
    capacity: i64,
    entries: i64,
    /// The position of the next row in the text; less than `entries` once there are beams.
    position: i64,
    /// What the rows of the last step saw, [rows, entries]; none while the entries are one line.
    seen: Option<Tensor>,
}

impl KvCache {
    /// Makes an empty cache of these layers, of which each has room for `capacity` entries.
    pub(crate) fn new(layers: Vec<LayerKv>, capacity: i64) -> Self {
        Self { layers, capacity, entries: 0, position: 0, seen: None }
    }

    /// Makes room for a step's rows, which every layer then writes.
    ///
    /// # Panics
    ///
    /// The rows are beyond the capacity, which whoever made the cache computed from all it will ever hold.
    pub(crate) fn append(&mut self, append: Append<'_>, kind: Kind, device: Device) -> Appended {
        let (start, rows) = (self.entries, append.rows());
        assert!(start + rows <= self.capacity, "{start} + {rows} entries do not fit {}", self.capacity);
        let (positions, mask) = match append {
            Append::Sequential(rows) => {
                debug_assert!(self.seen.is_none(), "beams do not become a line again");
                ((self.position..self.position + rows).collect(), line(start, rows, kind, device))
            }
            Append::Beams(parents) => {
                let seen = self.branch(parents, kind, device);
                self.seen = Some(seen.shallow_clone());
                (vec![self.position; parents.len()], AttentionMask::Mask(seen))
            }
        };
        self.entries += rows;
        self.position = positions[positions.len() - 1] + 1;
        Appended { start, rows, positions, mask }
    }

    /// Returns what each new row sees: what its parent saw, and itself.
    fn branch(&self, parents: &[i64], kind: Kind, device: Device) -> Tensor {
        let parents = Tensor::from_slice(parents).to_device(device);
        let rows = parents.size1().expect("parents are one list");
        let of_parents = match &self.seen {
            Some(seen) => seen.index_select(0, &parents),
            None => Tensor::zeros([rows, self.entries], (kind, device)),
        };
        let others = Tensor::eye(rows, (Kind::Bool, device)).logical_not();
        let own = Tensor::zeros([rows, rows], (kind, device)).masked_fill(&others, f64::NEG_INFINITY);
        Tensor::cat(&[of_parents, own], 1)
    }
}

/// Returns the mask of successive rows, of which each sees everything before it.
fn line(start: i64, rows: i64, kind: Kind, device: Device) -> AttentionMask {
    match (start, rows) {
        (_, 1) => AttentionMask::All,
        (0, _) => AttentionMask::Causal,
        _ => {
            let hidden = Tensor::full([rows, start + rows], f64::NEG_INFINITY, (kind, device));
            AttentionMask::Mask(hidden.triu(start + 1))
        }
    }
}
