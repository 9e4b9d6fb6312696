//! The sentencepiece file (`tokenizer.model`) and its byte-pair encoding.
//!
//! Only what LLaMA's file uses is accepted: BPE, identity normalisation with a dummy prefix, byte fallback. Anything
//! else is an error at load, since it would give other ids.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
};

use prost::Message;

/// What stands for a space inside pieces.
pub(super) const SPACE: char = '\u{2581}';

/// Why a file is not a tokenizer of LLaMA's kind.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The bytes are not those of a sentencepiece model.
    #[error("not a sentencepiece model")]
    Decode(#[from] prost::DecodeError),
    /// The model uses this, which LLaMA's does not.
    #[error("uses {0}, which LLaMA's tokenizer does not")]
    Unsupported(&'static str),
    /// A piece of the vocabulary breaks a rule.
    #[error("piece {id} {problem}")]
    Piece {
        /// The id of the piece.
        id: usize,
        /// What is wrong with it; it reads on from the piece.
        problem: &'static str,
    },
    /// A piece of this name, which Emu2 needs, is not in the vocabulary.
    #[error("has no piece {0}")]
    Missing(String),
    /// The vocabulary holds a special token of this name that Emu2 appends.
    #[error("already holds the special token {0}")]
    Taken(String),
}

/// One entry of the vocabulary; its id is its position in the file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    score: f32,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    /// A piece that is never split, and never merged with its neighbours.
    UserDefined,
    /// A piece that takes part in merges, but is taken apart again at the end.
    Unused,
    Byte(u8),
}

pub(super) struct Model {
    pieces: Vec<Piece>,
    /// Pieces that text can become; control, unknown and byte pieces are never spelled out.
    index: HashMap<String, u32>,
    byte_ids: [u32; 256],
    /// The user-defined pieces, the longest first.
    user_defined: Vec<String>,
    longest: usize,
}

impl Model {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ModelError> {
        let proto = proto::Model::decode(bytes)?;
        if let Some(what) = proto.unsupported() {
            return Err(ModelError::Unsupported(what));
        }
        let pieces: Vec<_> = proto
            .pieces
            .into_iter()
            .enumerate()
            .map(|(id, piece)| Piece::new(id, piece))
            .collect::<Result<_, _>>()?;
        let mut index = HashMap::with_capacity(pieces.len());
        let mut byte_ids = [None; 256];
        for (id, piece) in (0..).zip(&pieces) {
            let previous = match piece.kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => index.insert(piece.text.clone(), id),
                Kind::Byte(byte) => byte_ids[usize::from(byte)].replace(id),
                Kind::Unknown | Kind::Control => None,
            };
            if previous.is_some() {
                return Err(ModelError::Piece { id: id as usize, problem: "is a duplicate" });
            }
        }
        let mut user_defined: Vec<_> = pieces
            .iter()
            .filter(|piece| piece.kind == Kind::UserDefined)
            .map(|piece| piece.text.clone())
            .collect();
        user_defined.sort_unstable_by_key(|text| std::cmp::Reverse(text.len()));
        let longest = index.keys().map(String::len).max().unwrap_or(1);
        let byte_ids = complete(&byte_ids)?;
        Ok(Self { pieces, index, byte_ids, user_defined, longest })
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn piece(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(id as usize)
    }

    /// Returns the id of the piece of this text and kind: the ones that text never becomes are found only so.
    pub(super) fn find(&self, text: &str, kind: Kind) -> Option<u32> {
        (0..).zip(&self.pieces).find(|(_, piece)| piece.kind == kind && piece.text == text).map(|(id, _)| id)
    }

    pub(super) fn contains(&self, text: &str) -> bool {
        self.index.contains_key(text)
    }

    /// Returns the length of the longest piece in bytes, with three for each space: an id never stands for more of a
    /// text.
    pub(super) fn longest_piece(&self) -> usize {
        self.longest
    }

    /// Appends the ids of `text`, which is not empty, to `ids`.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut normalised = String::with_capacity(text.len() + text.len() / 2 + SPACE.len_utf8());
        normalised.push(SPACE);
        normalised.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let mut merging = Merging::new(self, &normalised);
        merging.run();
        merging.finish(ids);
    }

    /// Returns a piece that text can become.
    fn lookup(&self, text: &str) -> Option<(u32, &Piece)> {
        if text.len() > self.longest {
            return None;
        }
        let id = *self.index.get(text)?;
        Some((id, &self.pieces[id as usize]))
    }
}

impl Piece {
    fn new(id: usize, proto: proto::Piece) -> Result<Self, ModelError> {
        let wrong = |problem| ModelError::Piece { id, problem };
        let text = proto.piece.unwrap_or_default();
        if text.is_empty() {
            return Err(wrong("is empty"));
        }
        let score = proto.score.unwrap_or_default();
        if !score.is_finite() {
            return Err(wrong("has a score that is not finite"));
        }
        let kind = match proto.kind.unwrap_or(proto::NORMAL) {
            proto::NORMAL => Kind::Normal,
            proto::UNKNOWN => Kind::Unknown,
            proto::CONTROL => Kind::Control,
            proto::USER_DEFINED => Kind::UserDefined,
            proto::UNUSED => Kind::Unused,
            proto::BYTE => Kind::Byte(byte(&text).ok_or_else(|| wrong("is of type byte but not <0xHH>"))?),
            _ => return Err(wrong("has an unknown type")),
        };
        // Adding zero makes one zero of two: they tie, as sentencepiece compares scores.
        Ok(Self { text, score: score + 0.0, kind })
    }
}

fn byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn complete(byte_ids: &[Option<u32>; 256]) -> Result<[u32; 256], ModelError> {
    let mut ids = [0; 256];
    for (byte, (id, found)) in ids.iter_mut().zip(byte_ids).enumerate() {
        *id = found.ok_or_else(|| ModelError::Missing(format!("<0x{byte:02X}>")))?;
    }
    Ok(ids)
}

/// A text while neighbouring symbols are merged: first every character is one, at last each is a piece.
struct Merging<'a> {
    model: &'a Model,
    text: &'a str,
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Merge>,
    /// Bytes of the left half of each unused piece that came up, for taking it apart.
    halves: HashMap<&'a str, usize>,
}

struct Symbol {
    start: usize,
    /// 0 once merged into its left neighbour.
    len: usize,
    previous: Option<usize>,
    next: Option<usize>,
    user_defined: bool,
}

/// Two neighbours that together are a piece.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// The length of both when this was noted: if it changed since, one of them has merged elsewhere.
    len: usize,
}

impl<'a> Merging<'a> {
    fn new(model: &'a Model, text: &'a str) -> Self {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(c) = text[start..].chars().next() {
            let whole = model.user_defined.iter().find(|piece| text[start..].starts_with(piece.as_str()));
            let len = whole.map_or(c.len_utf8(), String::len);
            let index = symbols.len();
            let next = (start + len < text.len()).then_some(index + 1);
            symbols.push(Symbol {
                start,
                len,
                previous: index.checked_sub(1),
                next,
                user_defined: whole.is_some(),
            });
            start += len;
        }
        let mut merging = Self { model, text, symbols, agenda: BinaryHeap::new(), halves: HashMap::new() };
        for right in 1..merging.symbols.len() {
            merging.note(right - 1, right);
        }
        merging
    }

    /// Merges the pairs, the best score first, the leftmost on ties.
    fn run(&mut self) {
        while let Some(Merge { left, right, len, .. }) = self.agenda.pop() {
            let (left_len, right_len) = (self.symbols[left].len, self.symbols[right].len);
            if left_len == 0 || right_len == 0 || left_len + right_len != len {
                continue;
            }
            let next = self.symbols[right].next;
            self.symbols[right].len = 0;
            self.symbols[left].len = len;
            self.symbols[left].next = next;
            if let Some(next) = next {
                self.symbols[next].previous = Some(left);
                self.note(left, next);
            }
            if let Some(previous) = self.symbols[left].previous {
                self.note(previous, left);
            }
        }
    }

    /// Puts the pair on the agenda if it is a piece.
    fn note(&mut self, left: usize, right: usize) {
        let (first, second) = (&self.symbols[left], &self.symbols[right]);
        if first.user_defined || second.user_defined {
            return;
        }
        let len = first.len + second.len;
        let text = &self.text[first.start..first.start + len];
        let Some((_, piece)) = self.model.lookup(text) else { return };
        self.agenda.push(Merge { score: piece.score, left, right, len });
        if piece.kind == Kind::Unused {
            self.halves.insert(text, first.len);
        }
    }

    fn finish(self, ids: &mut Vec<u32>) {
        for symbol in self.symbols.iter().filter(|symbol| symbol.len > 0) {
            self.emit(&self.text[symbol.start..symbol.start + symbol.len], ids);
        }
    }

    fn emit(&self, text: &str, ids: &mut Vec<u32>) {
        let Some((id, piece)) = self.model.lookup(text) else {
            ids.extend(text.bytes().map(|byte| self.model.byte_ids[usize::from(byte)]));
            return;
        };
        match self.halves.get(text) {
            Some(&half) if piece.kind == Kind::Unused => {
                self.emit(&text[..half], ids);
                self.emit(&text[half..], ids);
            }
            _ => ids.push(id),
        }
    }
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Merge {}

/// The fields of sentencepiece_model.proto that matter here.
pub(super) mod proto {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
    const BPE: i32 = 2;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Model {
        #[prost(message, repeated, tag = "1")]
        pub(crate) pieces: Vec<Piece>,
        #[prost(message, optional, tag = "2")]
        pub(crate) trainer: Option<Trainer>,
        #[prost(message, optional, tag = "3")]
        pub(crate) normalizer: Option<Normalizer>,
        #[prost(message, optional, tag = "5")]
        pub(crate) denormalizer: Option<Normalizer>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Piece {
        #[prost(string, optional, tag = "1")]
        pub(crate) piece: Option<String>,
        #[prost(float, optional, tag = "2")]
        pub(crate) score: Option<f32>,
        #[prost(int32, optional, tag = "3")]
        pub(crate) kind: Option<i32>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Trainer {
        #[prost(int32, optional, tag = "3")]
        pub(crate) model_type: Option<i32>,
        #[prost(bool, optional, tag = "24")]
        pub(crate) treat_whitespace_as_suffix: Option<bool>,
        #[prost(bool, optional, tag = "35")]
        pub(crate) byte_fallback: Option<bool>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Normalizer {
        #[prost(bytes = "vec", optional, tag = "2")]
        pub(crate) precompiled_charsmap: Option<Vec<u8>>,
        #[prost(bool, optional, tag = "3")]
        pub(crate) add_dummy_prefix: Option<bool>,
        #[prost(bool, optional, tag = "4")]
        pub(crate) remove_extra_whitespaces: Option<bool>,
        #[prost(bool, optional, tag = "5")]
        pub(crate) escape_whitespaces: Option<bool>,
    }

    impl Model {
        /// The first setting that is not LLaMA's. Absent fields have the defaults of sentencepiece_model.proto.
        pub(super) fn unsupported(&self) -> Option<&'static str> {
            let trainer = self.trainer.clone().unwrap_or_default();
            let normalizer = self.normalizer.clone().unwrap_or_default();
            let maps =
                |spec: &Normalizer| spec.precompiled_charsmap.as_ref().is_some_and(|map| !map.is_empty());
            [
                ("a model type that is not BPE", trainer.model_type != Some(BPE)),
                ("no byte fallback", trainer.byte_fallback != Some(true)),
                ("white space as suffix", trainer.treat_whitespace_as_suffix == Some(true)),
                ("a normalisation table", maps(&normalizer)),
                ("a denormalisation table", self.denormalizer.as_ref().is_some_and(maps)),
                ("no dummy prefix", normalizer.add_dummy_prefix == Some(false)),
                ("removal of extra white space", normalizer.remove_extra_whitespaces != Some(false)),
                ("unescaped white space", normalizer.escape_whitespaces == Some(false)),
            ]
            .into_iter()
            .find_map(|(what, found)| found.then_some(what))
        }
    }
}
