//! The tokenizer: a sentencepiece model in LLaMA's form, its pieces learned from the documents' texts.

#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, bail};
use emu2_llm::tokenizer::Tokenizer as Published;
use prost::Message;
use serde_json::{Value, json};

use crate::data::{
    concept::Concept,
    document::{Piece, Task},
    tasks::episodes::NAMES,
    world::{Split, World},
};

/// The character that stands for a space inside pieces.
const SPACE: char = '\u{2581}';

/// Documents of each task that words are counted in.
const DOCUMENTS: u64 = 1_000;

/// Characters that answers and prompts may need though no document has them: printable ASCII.
const CHARACTERS: std::ops::RangeInclusive<char> = '!'..='~';

/// The learned pieces of a tokenizer, without the special ones.
pub struct Vocabulary {
    /// Pieces that merge two shorter ones, best first.
    merged: Vec<String>,
    characters: Vec<String>,
}

impl Vocabulary {
    /// Learns a vocabulary by byte-pair encoding: the commonest pair of neighbours becomes a piece, until `size` is
    /// reached: of the whole vocabulary, with bytes and all special tokens (the chat template's too).
    pub fn learn(world: &World, size: usize) -> Result<Self> {
        let words = words(world);
        let characters: BTreeSet<char> =
            CHARACTERS.chain(words.keys().flat_map(|word| word.chars())).collect();
        let characters = characters.into_iter().map(String::from).collect();
        let mut vocabulary = Self { merged: Vec::new(), characters };
        let taken = Published::parse(&vocabulary.sentencepiece(), true)?.vocab_size();
        let room =
            size.checked_sub(taken).with_context(|| format!("size is {size}, must be {taken} at least"))?;
        let mut words: Vec<(Vec<String>, u64)> = words
            .into_iter()
            .map(|(word, count)| (word.chars().map(String::from).collect(), count))
            .collect();
        while vocabulary.merged.len() < room {
            let Some((left, right)) = commonest(&words) else {
                bail!("size is {size}, but these texts give only {}", taken + vocabulary.merged.len());
            };
            merge(&mut words, &left, &right);
            let piece = left + &right;
            // Two ways to one piece: sentencepiece knows pieces, not ways.
            if !vocabulary.merged.contains(&piece) {
                vocabulary.merged.push(piece);
            }
        }
        Ok(vocabulary)
    }

    /// Returns the bytes of a `tokenizer.model`.
    pub fn sentencepiece(&self) -> Vec<u8> {
        let plain = |piece: String, score: f32, kind: i32| proto::Piece { piece, score, kind };
        let mut pieces = vec![
            plain("<unk>".to_owned(), 0.0, proto::UNKNOWN),
            plain("<s>".to_owned(), 0.0, proto::CONTROL),
            plain("</s>".to_owned(), 0.0, proto::CONTROL),
        ];
        pieces.extend((0..=u8::MAX).map(|byte| plain(format!("<0x{byte:02X}>"), 0.0, proto::BYTE)));
        let learned = self.merged.iter().chain(&self.characters);
        // Merges go by score; a character is never the result of one, but has its rank too in LLaMA's file.
        let learned =
            learned.enumerate().map(|(rank, piece)| plain(piece.clone(), -(rank as f32), proto::NORMAL));
        pieces.extend(learned);
        proto::Model {
            pieces,
            trainer: Some(proto::Trainer { model_type: proto::BPE, byte_fallback: true }),
            normalizer: Some(proto::Normalizer {
                add_dummy_prefix: true,
                remove_extra_whitespaces: false,
                escape_whitespaces: true,
            }),
        }
        .encode_to_vec()
    }

    /// Returns a `tokenizer.json` of Hugging Face's `tokenizers`, which gives the same ids. `instruct`: with the chat
    /// template's tokens.
    pub fn hugging_face(&self, instruct: bool) -> Result<Value> {
        let published = Published::parse(&self.sentencepiece(), instruct)?;
        let special = |content: &str, id: u32| {
            // White space around them is dropped, but not around the model file's own.
            let strip = id > 2;
            json!({"id": id, "content": content, "single_word": false, "lstrip": strip, "rstrip": strip,
                   "normalized": false, "special": true})
        };
        let learned = self.merged.iter().chain(&self.characters);
        let bytes = (0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>"));
        let builtin = ["<unk>", "<s>", "</s>"].map(str::to_owned);
        let file: Vec<String> = builtin.into_iter().chain(bytes).chain(learned.cloned()).collect();
        let first = file.len() as u32;
        let added = (0u32..3).map(|id| special(&file[id as usize], id));
        let appended =
            (first..published.vocab_size() as u32).map(|id| special(&published.decode(&[id], false), id));
        let added: Vec<Value> = added.chain(appended).collect();
        let vocab: HashMap<&str, usize> =
            file.iter().enumerate().map(|(id, piece)| (piece.as_str(), id)).collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": self.merges(&vocab)},
        }))
    }

    /// Returns every way to make each piece of two others: sentencepiece takes any.
    fn merges(&self, vocab: &HashMap<&str, usize>) -> Vec<[String; 2]> {
        let ways = |piece: &'_ String| {
            let cuts = piece.char_indices().skip(1).map(|(cut, _)| piece.split_at(cut));
            let known = cuts.filter(|(left, right)| vocab.contains_key(left) && vocab.contains_key(right));
            known.map(|(left, right)| [left.to_owned(), right.to_owned()]).collect::<Vec<_>>()
        };
        self.merged.iter().flat_map(ways).collect()
    }
}

/// Returns the pair of neighbours that comes most often; the first by name where some are as common.
fn commonest(words: &[(Vec<String>, u64)]) -> Option<(String, String)> {
    let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for (pieces, count) in words {
        for pair in pieces.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += count;
        }
    }
    let best = counts.into_iter().max_by(|one, other| one.1.cmp(&other.1).then(other.0.cmp(&one.0)));
    best.map(|((left, right), _)| (left.to_owned(), right.to_owned()))
}

fn merge(words: &mut [(Vec<String>, u64)], left: &str, right: &str) {
    for (pieces, _) in words {
        let mut index = 0;
        while index + 1 < pieces.len() {
            if pieces[index] == left && pieces[index + 1] == right {
                let second = pieces.remove(index + 1);
                pieces[index].push_str(&second);
            }
            index += 1;
        }
    }
}

/// Iterates over the tasks whose words are counted: not those that write the same words, which would only move the
/// counts, and not those that make up words.
fn counted() -> impl Iterator<Item = Task> {
    let others = [
        Task::Relation,
        Task::Interview,
        Task::Repetition,
        Task::KeyValues,
        Task::NamesOfTokens,
        Task::NamesOfSameImages,
        Task::Names,
    ];
    Task::ALL.into_iter().filter(move |task| !others.contains(task))
}

/// Returns words with their leading space, and how often the documents have each.
fn words(world: &World) -> BTreeMap<String, u64> {
    let mut words = BTreeMap::new();
    let mut count = |text: &str| {
        for word in text.split(special).flat_map(str::split_whitespace) {
            *words.entry(format!("{SPACE}{word}")).or_default() += 1;
        }
    };
    for task in counted() {
        for index in 0..DOCUMENTS {
            for piece in world.document(Split::Train, task, index).pieces {
                match piece {
                    Piece::Text { text, .. } => count(&text),
                    Piece::Box { phrase, .. } => count(&phrase),
                    Piece::Tokens { .. } | Piece::Image { .. } | Piece::Video { .. } => {}
                }
            }
        }
    }
    // However rarely the documents drew them.
    NAMES.iter().for_each(|name| count(&format!("this is a {name}.")));
    Concept::all().for_each(|concept| count(&format!("{} {}", concept.name(), concept.plural())));
    words
}

/// Returns whether a character is a bracket of special tokens, which are not learned and part what is around them.
fn special(c: char) -> bool {
    matches!(c, '<' | '>')
}

/// The fields of sentencepiece_model.proto that LLaMA's file needs.
mod proto {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const BYTE: i32 = 6;
    pub(super) const BPE: i32 = 2;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Model {
        #[prost(message, repeated, tag = "1")]
        pub(super) pieces: Vec<Piece>,
        #[prost(message, optional, tag = "2")]
        pub(super) trainer: Option<Trainer>,
        #[prost(message, optional, tag = "3")]
        pub(super) normalizer: Option<Normalizer>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Piece {
        #[prost(string, required, tag = "1")]
        pub(super) piece: String,
        #[prost(float, required, tag = "2")]
        pub(super) score: f32,
        #[prost(int32, required, tag = "3")]
        pub(super) kind: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Trainer {
        #[prost(int32, required, tag = "3")]
        pub(super) model_type: i32,
        #[prost(bool, required, tag = "35")]
        pub(super) byte_fallback: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Normalizer {
        #[prost(bool, required, tag = "3")]
        pub(super) add_dummy_prefix: bool,
        #[prost(bool, required, tag = "4")]
        pub(super) remove_extra_whitespaces: bool,
        #[prost(bool, required, tag = "5")]
        pub(super) escape_whitespaces: bool,
    }
}
