//! Against golden-a, against further answers of the pinned libraries (`reference.json`, made by `reference.py`), and
//! against the official decode written out plainly.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use emu2_nn::golden;
use proptest::prelude::*;
use prost::Message;
use serde_json::Value;

use super::{
    model::{SPACE, proto},
    *,
};

const REFERENCE: &str = include_str!("reference.json");

fn tiny_path() -> PathBuf {
    golden::model_dir("emu2-base").join("tokenizer.model")
}

fn load(path: &Path, instruct: bool) -> Tokenizer {
    Tokenizer::parse(&std::fs::read(path).unwrap(), instruct).unwrap()
}

fn tiny(instruct: bool) -> Tokenizer {
    load(&tiny_path(), instruct)
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// `real_base`, `real_chat`, `tiny_base`, `tiny_chat`, less those whose file is not here.
fn tokenizers() -> HashMap<&'static str, Tokenizer> {
    let mut found = HashMap::from([("tiny_base", tiny(false)), ("tiny_chat", tiny(true))]);
    match golden::shared("tokenizer-llama/tokenizer.model") {
        Some(path) => {
            found.insert("real_base", load(&path, false));
            found.insert("real_chat", load(&path, true));
        }
        None => println!("skipped: the cases of LLaMA's own tokenizer, which is not on this machine"),
    }
    found
}

/// As upstream writes placeholders out before it tokenizes.
fn written_out(case: &Value) -> String {
    let run = |token: &str, count: &str| {
        let count = case[count].as_u64().unwrap() as usize;
        format!("{IMG}{}{IMG_END}", token.repeat(count))
    };
    text(&case["template"])
        .replace("[<IMG_PLH>]", &run(IMAGE, "n_query"))
        .replace("[<VID_PLH>]", &run(GIMG, "v_query"))
}

#[test]
fn golden_encodings() {
    let tokenizers = tokenizers();
    let tokens = golden::json("tokens.json");
    let mut checked = 0;
    for case in rows(&tokens["cases"]) {
        let Some(tokenizer) = tokenizers.get(text(&case["tokenizer"])) else { continue };
        let (name, want, written) = (&case["name"], ids(&case["ids"]), written_out(case));
        assert_eq!(tokenizer.encode(&written), want, "{name}: {written:?}");
        assert!(written.len() <= tokenizer.max_text_bytes(want.len()), "{name}");
        if let Some(longer) = case.get("ids_with_BOI_appended") {
            assert_eq!(tokenizer.encode(&format!("{written}{IMG}")), ids(longer), "{name} with [IMG]");
        }
        for (key, skip_special) in [("decode_skip_special", true), ("decode_all", false)] {
            if let Some(decoded) = case.get(key) {
                assert_eq!(tokenizer.decode(&want, skip_special), text(decoded), "{name}: {key}");
            }
        }
        checked += 1;
    }
    assert!(checked >= 82, "{checked} cases");
}

#[test]
fn golden_decodings() {
    let tokenizers = tokenizers();
    for case in rows(&golden::json("tokens.json")["decode_cases"]) {
        let Some(tokenizer) = tokenizers.get(text(&case["tokenizer"])) else { continue };
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids, true), text(&case["decode_skip_special"]), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids, false), text(&case["decode_all"]), "{ids:?}");
    }
}

#[test]
fn golden_batch_is_its_texts() {
    let batch = &golden::json("tokens.json")["batch_left_pad"];
    let tokenizer = &tokenizers()[text(&batch["tokenizer"])];
    let pad = tokenizer.specials["[PAD]"];
    for (given, padded) in rows(&batch["texts"]).iter().zip(rows(&batch["input_ids"])) {
        let want: Vec<_> = ids(padded).into_iter().skip_while(|&id| id == pad).collect();
        assert_eq!(tokenizer.encode(text(given)), want);
    }
}

#[test]
fn golden_generations_decode_to_their_texts() {
    for case in rows(&golden::json("generate.json")["cases"]) {
        let tokenizer = tiny(case["model"] == "chat");
        let texts = case["text"].as_array().map_or(std::slice::from_ref(&case["text"]), Vec::as_slice);
        assert_eq!(texts.len(), rows(&case["ids"]).len());
        for (row, want) in rows(&case["ids"]).iter().zip(texts) {
            assert_eq!(tokenizer.decode(&ids(row), true), text(want), "{} {}", case["prompt"], case["mode"]);
        }
    }
}

#[test]
fn golden_special_ids() {
    let tokens = golden::json("tokens.json");
    for (name, tokenizer) in tokenizers() {
        assert_eq!(tokenizer.vocab_size() as u64, tokens["vocab_size"][name].as_u64().unwrap(), "{name}");
        let want = &tokens["special_ids"][name];
        for (token, id) in want.as_object().unwrap() {
            assert_eq!(u64::from(tokenizer.specials[token]), id.as_u64().unwrap(), "{name}: {token}");
        }
        let by_enum = [
            (Special::Bos, "<s>"),
            (Special::Eos, "</s>"),
            (Special::Img, "[IMG]"),
            (Special::ImgEnd, "[/IMG]"),
            (Special::Image, "<image>"),
            (Special::Gimg, "[gIMG]"),
        ];
        for (special, token) in by_enum {
            assert_eq!(u64::from(tokenizer.special(special)), want[token].as_u64().unwrap(), "{special:?}");
        }
        assert_eq!(tokenizer.instruct(), name.ends_with("chat"));
    }
}

#[test]
fn reference_encodings_and_decodings() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    let tokenizer = tiny(true);
    for case in rows(&reference["encode"]) {
        let (given, want) = (text(&case["text"]), ids(&case["ids"]));
        assert_eq!(tokenizer.encode(given), want, "{given:?}");
    }
    for case in rows(&reference["decode"]) {
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids, true), text(&case["skip"]), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids, false), text(&case["all"]), "{ids:?}");
    }
}

fn tiny_proto() -> proto::Model {
    proto::Model::decode(std::fs::read(tiny_path()).unwrap().as_slice()).unwrap()
}

#[test]
fn user_defined_and_unused_pieces() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    for variant in rows(&reference["kinds"]) {
        let mut changed = tiny_proto();
        for id in ids(&variant["pieces"]) {
            changed.pieces[id as usize].kind = Some(variant["kind"].as_i64().unwrap() as i32);
        }
        let tokenizer = Tokenizer::parse(&changed.encode_to_vec(), false).unwrap();
        for case in rows(&variant["cases"]) {
            let given = text(&case["text"]);
            assert_eq!(
                tokenizer.encode(given)[1..],
                ids(&case["ids"]),
                "kind {}: {given:?}",
                variant["kind"]
            );
        }
    }
}

#[test]
fn unfit_models_are_refused() {
    let refused = |change: fn(&mut proto::Model)| {
        let mut changed = tiny_proto();
        change(&mut changed);
        Tokenizer::parse(&changed.encode_to_vec(), false).unwrap_err()
    };
    assert!(matches!(Tokenizer::parse(b"\xff\xff", false), Err(ModelError::Decode(_))));
    assert!(matches!(Tokenizer::parse(b"", false), Err(ModelError::Unsupported(_))));
    let normalizer = |m: &mut proto::Model| m.normalizer.as_mut().unwrap().remove_extra_whitespaces = None;
    assert!(matches!(refused(normalizer), ModelError::Unsupported("removal of extra white space")));
    assert!(matches!(
        refused(|m| m.trainer.as_mut().unwrap().byte_fallback = None),
        ModelError::Unsupported("no byte fallback")
    ));
    assert!(matches!(
        refused(|m| m.pieces[300].piece = m.pieces[301].piece.clone()),
        ModelError::Piece { id: 301, problem: "is a duplicate" }
    ));
    assert!(matches!(refused(|m| m.pieces[300].piece = None), ModelError::Piece { id: 300, .. }));
    assert!(matches!(refused(|m| m.pieces[300].score = Some(f32::NAN)), ModelError::Piece { id: 300, .. }));
    assert!(matches!(refused(|m| m.pieces[300].kind = Some(9)), ModelError::Piece { id: 300, .. }));
    assert!(matches!(refused(|m| m.pieces[3].kind = None), ModelError::Missing(name) if name == "<0x00>"));
    assert!(matches!(refused(|m| m.pieces[1].kind = None), ModelError::Missing(name) if name == "<s>"));
    assert!(matches!(
        refused(|m| m.pieces[300].piece = Some("[IMG]".to_owned())),
        ModelError::Taken(name) if name == "[IMG]"
    ));
}

#[test]
fn digest_names_the_ids() {
    let base = tiny(false);
    assert_eq!(base.digest(), tiny(false).digest());
    assert_ne!(base.digest(), tiny(true).digest());
    let mut changed = tiny_proto();
    changed.pieces.swap(300, 301);
    assert_ne!(base.digest(), Tokenizer::parse(&changed.encode_to_vec(), false).unwrap().digest());
}

#[test]
fn long_texts_are_quick() {
    let tokenizer = tiny(false);
    let words = "There are two dogs, 🐶 wearing sunglasses. ".repeat(2_500);
    // Nothing to merge, everything to merge, and brackets that open nothing.
    for text in [words, "x".repeat(100_000), " ".repeat(100_000), "<".repeat(100_000)] {
        let start = Instant::now();
        let ids = tokenizer.encode(&text);
        assert!(text.len() <= tokenizer.max_text_bytes(ids.len()));
        let seconds = start.elapsed().as_secs_f64();
        println!("{} bytes, {} ids: {seconds:.3} s", text.len(), ids.len());
        // Far above what it takes and far below what a quadratic merge would.
        assert!(seconds < 5.0, "{seconds} s");
    }
}

#[test]
fn text_comes_as_soon_as_it_is_certain() {
    let tokenizer = Arc::new(tiny(true));
    let given = "é🐶 dog";
    let ids = tokenizer.encode(given);
    let mut stream = Detokenizer::new(Arc::clone(&tokenizer), true);
    let deltas: Vec<_> = ids.iter().map(|&id| stream.push(id)).filter(|delta| !delta.is_empty()).collect();
    assert_eq!(deltas, ["é", "🐶", " do", "g"]);
    assert_eq!(stream.finish(), "");

    // Kept special tokens: the text before `</s>` waits, since a space goes before it.
    let mut stream = Detokenizer::new(tokenizer, false);
    let deltas: Vec<_> = [1, 437, 775, 2].into_iter().map(|id| stream.push(id)).collect();
    assert_eq!(deltas, ["<s>", "", "", " dog</s>"]);
}

#[test]
fn characters_go_on_across_skipped_tokens() {
    let tokenizer = tiny(false);
    let dog: Vec<_> = "🐶".bytes().map(|byte| u32::from(byte) + 3).collect();
    let eos = tokenizer.special(Special::Eos);
    let parted = [&dog[..2], &[eos], &dog[2..]].concat();
    assert_eq!(tokenizer.decode(&parted, true), "🐶");
    assert_eq!(tokenizer.decode(&parted, false), " \u{fffd}\u{fffd}</s>\u{fffd}\u{fffd}");
}

/// The official decode as it is written: filter, split at appended tokens, join with spaces.
fn plain_decode(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let first_appended = tokenizer.model.len() as u32;
    let is_special = |id: u32| id < 3 || id >= first_appended;
    let kept: Vec<_> = ids.iter().copied().filter(|&id| !(skip_special && is_special(id))).collect();
    let mut texts = Vec::new();
    for run in kept.chunk_by(|&a, &b| a < first_appended && b < first_appended) {
        if run[0] >= first_appended {
            texts.push(tokenizer.appended[(run[0] - first_appended) as usize].clone());
            continue;
        }
        let (mut out, mut pieces, mut previous_special) = (String::new(), Vec::new(), false);
        for (i, &id) in run.iter().enumerate() {
            if is_special(id) {
                if !previous_special && i != 0 {
                    out.push(' ');
                }
                out += &plain_pieces(tokenizer, &std::mem::take(&mut pieces));
                out += &tokenizer.model.piece(id).unwrap().text;
            } else {
                pieces.push(id);
            }
            previous_special = is_special(id);
        }
        texts.push(out + &plain_pieces(tokenizer, &pieces));
    }
    texts.join(" ")
}

/// Sentencepiece's decode, on whole runs of bytes.
fn plain_pieces(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let is_byte = |id: u32| (3..259).contains(&id);
    let (mut out, mut start) = (String::new(), true);
    for run in ids.chunk_by(|&a, &b| is_byte(a) && is_byte(b)) {
        if is_byte(run[0]) {
            let mut bytes: &[u8] = &run.iter().map(|id| (id - 3) as u8).collect::<Vec<_>>();
            while !bytes.is_empty() {
                let character = (1..=bytes.len().min(4)).find_map(|n| std::str::from_utf8(&bytes[..n]).ok());
                out += character.unwrap_or("\u{fffd}");
                bytes = &bytes[character.map_or(1, str::len)..];
            }
        } else {
            let text = &tokenizer.model.piece(run[0]).unwrap().text;
            let text = if start { text.strip_prefix(SPACE).unwrap_or(text) } else { text };
            out += &text.replace(SPACE, " ");
        }
        start = false;
    }
    out
}

/// Ids as a wild model would emit them: many bytes, many special tokens.
fn any_ids() -> impl Strategy<Value = Vec<u32>> {
    let size = tiny(true).vocab_size() as u32;
    prop::collection::vec(prop_oneof![0..size, 0..3u32, 3..259u32, Just(759u32), 899..size], 0..24)
}

proptest! {
    #[test]
    fn text_survives(given in any::<String>()) {
        let tokenizer = tiny(true);
        // Where no bracket closes, nothing is special. U+2581 is read as the space that it stands for.
        let given = given.replace(['>', ']'], "").replace('\u{2581}', " ");
        let ids = tokenizer.encode(&given);
        prop_assert!(given.len() <= tokenizer.max_text_bytes(ids.len()));
        prop_assert_eq!(tokenizer.decode(&ids, true), given);
    }

    #[test]
    fn any_text_gives_ids_of_the_vocabulary(given in "([<\\[/>\\]a-cGIMs \\PC]|<s>|</s>|\\[IMG\\]|<unk>){0,40}") {
        let tokenizer = tiny(true);
        let ids = tokenizer.encode(&given);
        prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }

    #[test]
    fn streamed_is_whole_is_official(ids in any_ids(), skip_special: bool) {
        let tokenizer = Arc::new(tiny(true));
        let mut stream = Detokenizer::new(Arc::clone(&tokenizer), skip_special);
        let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
        streamed += &stream.finish();
        prop_assert_eq!(&streamed, &tokenizer.decode(&ids, skip_special));
        prop_assert_eq!(&streamed, &plain_decode(&tokenizer, &ids, skip_special));
    }

    #[test]
    fn any_ids_decode(ids: Vec<u32>, skip_special: bool) {
        tiny(false).decode(&ids, skip_special);
    }
}
