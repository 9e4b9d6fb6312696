//! The learned vocabulary, read by the llm service's own tokenizer.

use std::sync::LazyLock;

use super::*;
use crate::data::tests::WORLD;

/// As nano's.
const SIZE: usize = 1_500;

static LEARNED: LazyLock<Vocabulary> = LazyLock::new(|| Vocabulary::learn(&WORLD, SIZE).unwrap());

pub(crate) static TOKENIZER: LazyLock<Published> =
    LazyLock::new(|| Published::parse(&LEARNED.sentencepiece(), true).unwrap());

/// All the text of a document that no image interrupts, joined.
fn texts(task: Task, index: u64) -> Vec<String> {
    let mut texts = vec![String::new()];
    for piece in WORLD.document(Split::Train, task, 1_000_000 + index).pieces {
        match piece {
            Piece::Text { text, .. } => texts.last_mut().unwrap().push_str(&text),
            Piece::Box { phrase, .. } => texts.push(phrase),
            Piece::Tokens { .. } | Piece::Image { .. } | Piece::Video { .. } => texts.push(String::new()),
        }
    }
    texts
}

#[test]
fn every_text_comes_back_without_bytes() {
    let (mut words, mut ids_of_words) = (0, 0);
    for (task, index) in Task::ALL.into_iter().flat_map(|task| (0..200).map(move |index| (task, index))) {
        for text in texts(task, index) {
            let ids = TOKENIZER.encode(&text);
            assert!(ids.iter().all(|id| !(3..259).contains(id)), "{text}");
            if !text.contains(['<', '[']) && counted().any(|counted| counted == task) {
                words += text.split_whitespace().count();
                ids_of_words += ids.len() - 1;
                // A leading space is lost after an image; elsewhere nothing is.
                assert_eq!(TOKENIZER.decode(&ids, true).trim_start(), text.trim_start());
            }
        }
    }
    // Punctuation takes ids of its own.
    let rate = ids_of_words as f64 / words as f64;
    println!("{rate:.2} ids a word");
    assert!(rate < 1.3, "{rate}");
}

#[test]
fn it_has_the_size_asked_for_and_the_published_layout() {
    assert_eq!(TOKENIZER.vocab_size(), SIZE);
    let first = TOKENIZER.special_named("[PAD]").unwrap();
    for (offset, name) in (0..).zip(["[PAD]", "[IMG]", "[/IMG]", "<image>", "[gIMG]"]) {
        assert_eq!(TOKENIZER.special_named(name), Some(first + offset));
    }
    assert_eq!(TOKENIZER.special_named("[ASSISTANT]"), Some(SIZE as u32 - 1));
    let error = Vocabulary::learn(&WORLD, 300).err().unwrap().to_string();
    assert!(error.contains("size is 300"), "{error}");
}

/// Hugging Face's library was seen to give the same ids for texts of every task (0.23, by hand).
#[test]
fn every_piece_can_be_merged_in_the_hugging_face_file() {
    let file = LEARNED.hugging_face(true).unwrap();
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let merges = file["model"]["merges"].as_array().unwrap();
    let mut made: Vec<String> =
        merges.iter().map(|pair| pair[0].as_str().unwrap().to_owned() + pair[1].as_str().unwrap()).collect();
    made.dedup();
    assert_eq!(made, LEARNED.merged);
    assert!(made.iter().all(|piece| vocab.contains_key(piece)));
    let added = file["added_tokens"].as_array().unwrap();
    assert_eq!(vocab.len() + added.len() - 3, SIZE);
    for token in added {
        let name = token["content"].as_str().unwrap();
        assert_eq!(TOKENIZER.special_named(name).map(u64::from), token["id"].as_u64(), "{name}");
    }
}

/// It was learned before some of these documents were written: what counts is that it reads them all whole.
#[test]
fn the_shipped_tokenizer_reads_every_text() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/nano/tokenizer.model");
    let shipped = Published::parse(&std::fs::read(path).unwrap(), true).unwrap();
    assert_eq!(shipped.vocab_size(), SIZE);
    for (task, index) in Task::ALL.into_iter().flat_map(|task| (0..50).map(move |index| (task, index))) {
        for text in texts(task, index) {
            assert!(shipped.encode(&text).iter().all(|id| !(3..259).contains(id)), "{text}");
        }
    }
}
