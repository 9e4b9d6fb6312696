//! Text to ids and back, as upstream's tokenizer does it: the slow LlamaTokenizer (legacy) of transformers 4.31.0
//! with Emu2's special tokens appended (github.com/baaivision/Emu at 13c395e, Emu2/emu/lm.py).
//!
//! Text is split on all special tokens, white space on both sides of each is dropped (but not around `<unk>`), and
//! every piece between is encoded on its own, so that each gets its own leading space. Newer releases of
//! transformers give other ids for the same text.

mod decode;
mod model;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, fmt};

pub use decode::Detokenizer;
pub use model::ModelError;
use model::{Kind, Model, Piece};

pub(crate) const IMG: &str = "[IMG]";
pub(crate) const IMG_END: &str = "[/IMG]";
pub(crate) const IMAGE: &str = "<image>";
pub(crate) const GIMG: &str = "[gIMG]";
pub(crate) const VIDEO: &str = "[VIDEO]";
pub(crate) const GROUNDING: &str = "<grounding>";
pub(crate) const PHRASE: &str = "<phrase>";
pub(crate) const PHRASE_END: &str = "</phrase>";
pub(crate) const OBJECT: &str = "<object>";
pub(crate) const OBJECT_END: &str = "</object>";
pub(crate) const USER: &str = "[USER]";
pub(crate) const ASSISTANT: &str = "[ASSISTANT]";
pub(crate) const EOS: &str = "</s>";
const BOS: &str = "<s>";
const UNK: &str = "<unk>";
const PAD: &str = "[PAD]";

/// The special tokens in the order of their ids, right after the sentencepiece vocabulary. Then come the patch indices,
/// then in instruction-tuned models the two of the chat template.
const APPENDED: [&str; 15] = [
    PAD,
    IMG,
    IMG_END,
    IMAGE,
    GIMG,
    "[/gIMG]",
    "[EOC]",
    VIDEO,
    GROUNDING,
    PHRASE,
    PHRASE_END,
    OBJECT,
    OBJECT_END,
    "</delimiter_of_multi_objects/>",
    "<REC>",
];

/// How many patch indices upstream appends, though coordinates only reach 224.
const PATCH_INDICES: usize = 257;

/// The special tokens that code refers to by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// `<s>`: a text begins.
    Bos,
    /// `</s>`: a text ends.
    Eos,
    /// `[IMG]`: an image begins.
    Img,
    /// `[/IMG]`: an image ends.
    ImgEnd,
    /// `<image>`: stands for one embedding of an image.
    Image,
    /// `[gIMG]`: stands for one embedding of a video frame.
    Gimg,
}

/// The tokenizer of a model: a sentencepiece vocabulary and Emu2's special tokens.
pub struct Tokenizer {
    model: Model,
    /// The ids of special tokens by name: those of the model file that count as special (`<unk>`, `<s>`, `</s>`) and
    /// the appended ones.
    specials: HashMap<String, u32>,
    appended: Vec<String>,
    longest_special: usize,
    bos: u32,
    unk: u32,
    instruct: bool,
    digest: String,
}

/// What an id stands for.
enum Meaning<'a> {
    Piece(&'a Piece),
    /// A special token of the model file.
    Builtin(&'a str),
    /// A special token after the model file's vocabulary.
    Appended(&'a str),
    Nothing,
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.model`. `instruct`: whether the chat template's tokens exist.
    ///
    /// # Errors
    ///
    /// The bytes are no sentencepiece model, or one that LLaMA's tokenizer could not be.
    pub fn parse(bytes: &[u8], instruct: bool) -> Result<Self, ModelError> {
        let model = Model::parse(bytes)?;
        let builtin =
            |name: &str, kind| model.find(name, kind).ok_or_else(|| ModelError::Missing(name.to_owned()));
        let (unk, bos, eos) =
            (builtin(UNK, Kind::Unknown)?, builtin(BOS, Kind::Control)?, builtin(EOS, Kind::Control)?);
        let appended = appended(instruct);
        if let Some(name) = appended.iter().find(|name| model.contains(name)) {
            return Err(ModelError::Taken(name.clone()));
        }
        let builtins = [(UNK, unk), (BOS, bos), (EOS, eos)].map(|(name, id)| (name.to_owned(), id));
        let first = u32::try_from(model.len()).expect("its ids were numbered in 32 bits");
        let specials: HashMap<_, _> =
            builtins.into_iter().chain(appended.iter().cloned().zip(first..)).collect();
        let longest_special = specials.keys().map(String::len).max().unwrap_or_default();
        let digest = digest(bytes, &appended);
        Ok(Self { model, specials, appended, longest_special, bos, unk, instruct, digest })
    }

    /// Returns the id of a special token by its name, such as `[IMG]`; none if there is no such token.
    pub fn special_named(&self, name: &str) -> Option<u32> {
        self.specials.get(name).copied()
    }

    /// Encodes a text to ids, the beginning-of-text id first; no end-of-text id is added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![self.bos];
        for section in self.sections(text) {
            match section {
                Section::Special(id) => ids.push(id),
                Section::Text(text) => self.model.encode(text, &mut ids),
            }
        }
        ids
    }

    /// Returns the most bytes of text that fit `positions`: so many of the longest token. (White space beside special
    /// tokens is dropped and takes none; a text of more bytes could fit by that alone, which nobody means.)
    pub fn max_text_bytes(&self, positions: usize) -> usize {
        positions.saturating_mul(self.model.longest_piece().max(self.longest_special))
    }

    /// Returns how many rows the embedding table has: the model file's pieces and the appended special tokens.
    pub fn vocab_size(&self) -> usize {
        self.model.len() + self.appended.len()
    }

    /// Returns the id of a special token.
    pub fn special(&self, special: Special) -> u32 {
        let name = match special {
            Special::Bos => BOS,
            Special::Eos => EOS,
            Special::Img => IMG,
            Special::ImgEnd => IMG_END,
            Special::Image => IMAGE,
            Special::Gimg => GIMG,
        };
        self.specials[name]
    }

    /// Whether the chat template's tokens exist.
    pub fn instruct(&self) -> bool {
        self.instruct
    }

    /// Returns the blake3 digest of the model file and the appended special tokens, 64 hexadecimal digits: equal
    /// digests give equal ids.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    fn meaning(&self, id: u32) -> Meaning<'_> {
        let Some(piece) = self.model.piece(id) else {
            let name = (id as usize).checked_sub(self.model.len()).and_then(|index| self.appended.get(index));
            return name.map_or(Meaning::Nothing, |name| Meaning::Appended(name));
        };
        let builtin =
            matches!(piece.kind, Kind::Unknown | Kind::Control) && self.specials.contains_key(&piece.text);
        if builtin { Meaning::Builtin(&piece.text) } else { Meaning::Piece(piece) }
    }

    fn sections<'a>(&'a self, text: &'a str) -> Sections<'a> {
        Sections { tokenizer: self, rest: text, found: None, trim_start: false }
    }

    /// Finds the first special token in `text`: where it begins, where it ends, its id. Every one opens with a bracket,
    /// ends with the closing one and has neither inside, so candidates never overlap.
    fn find_special(&self, text: &str) -> Option<(usize, usize, u32)> {
        let bytes = text.as_bytes();
        let opens = bytes.iter().enumerate().filter(|(_, byte)| matches!(byte, b'<' | b'['));
        opens.into_iter().find_map(|(start, &open)| {
            let close = if open == b'<' { b'>' } else { b']' };
            let window = &bytes[start..bytes.len().min(start + self.longest_special)];
            let end = start + 1 + window.iter().position(|&byte| byte == close)?;
            self.specials.get(&text[start..end]).map(|&id| (start, end, id))
        })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

/// A text taken apart at its special tokens, lazily: a huge text is passed over without being stored again.
struct Sections<'a> {
    tokenizer: &'a Tokenizer,
    rest: &'a str,
    /// The special token whose text before it was just given.
    found: Option<u32>,
    trim_start: bool,
}

enum Section<'a> {
    Special(u32),
    /// A text between special tokens, never empty.
    Text(&'a str),
}

impl<'a> Iterator for Sections<'a> {
    type Item = Section<'a>;

    fn next(&mut self) -> Option<Section<'a>> {
        if let Some(id) = self.found.take() {
            return Some(Section::Special(id));
        }
        if self.rest.is_empty() {
            return None;
        }
        let special = self.tokenizer.find_special(self.rest);
        // `<unk>` keeps the white space around it: upstream gives all others anew as plain strings, and plain
        // strings take it along.
        let trims = |id| id != self.tokenizer.unk;
        let (start, end) = special.map_or((self.rest.len(), self.rest.len()), |(start, end, _)| (start, end));
        let mut text = &self.rest[..start];
        if self.trim_start {
            text = text.trim_start_matches(is_space);
        }
        self.rest = &self.rest[end..];
        self.found = special.map(|(_, _, id)| id);
        self.trim_start = self.found.is_some_and(trims);
        if self.trim_start {
            text = text.trim_end_matches(is_space);
        }
        if text.is_empty() { self.next() } else { Some(Section::Text(text)) }
    }
}

/// Whether Python takes a character for white space, which `str.strip` takes away: Unicode's, and four separators
/// besides.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

fn appended(instruct: bool) -> Vec<String> {
    let patches = (0..PATCH_INDICES).map(patch_index);
    let chat = [USER, ASSISTANT].into_iter().filter(|_| instruct);
    APPENDED.into_iter().map(str::to_owned).chain(patches).chain(chat.map(str::to_owned)).collect()
}

/// Returns the token of one coordinate.
pub(crate) fn patch_index(index: usize) -> String {
    format!("<patch_index_{index:04}>")
}

fn digest(bytes: &[u8], appended: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in std::iter::once(bytes).chain(appended.iter().map(|name| name.as_bytes())) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex().to_string()
}
