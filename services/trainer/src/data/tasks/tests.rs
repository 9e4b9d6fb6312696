//! Documents against the prompts that the llm service lays out, and against what they promise.

use std::collections::{HashMap, HashSet};

use emu2_llm::prompt::{Input, Output, Part, PromptConfig, build};
use emu2_llm::tokenizer::Special;

use super::*;
use crate::data::{Piece, Queries, Sequence, held_out, tests::WORLD, vocabulary::tests::TOKENIZER};

const QUERIES: Queries = Queries { n_query: 4, v_query: 2 };
const CONFIG: PromptConfig = PromptConfig { n_query: 4, v_query: 2, max_positions: 2_048 };

fn each(split: Split, count: u64) -> impl Iterator<Item = (Document, String)> {
    Task::ALL.into_iter().flat_map(move |task| {
        (0..count).map(move |index| {
            let document = WORLD.document(split, task, index);
            let shown = format!("{task:?} {index}: {:?}", document.pieces);
            (document, shown)
        })
    })
}

/// A prompt's parts for the pieces before the answer, as a client sends them.
fn parts(document: &Document) -> Vec<Part> {
    let (_, given) = document.pieces.split_last().unwrap();
    let part = |piece: &Piece| match piece {
        Piece::Text { text, .. } => Part::Text(text.clone()),
        Piece::Tokens { .. } => panic!("{document:?}"),
        Piece::Image { .. } => Part::Image,
        Piece::Video { frames } => Part::Video { frames: frames.len() as u32 },
        Piece::Box { phrase, bounds } => {
            let [left, top, right, bottom] = bounds.fractions();
            Part::Box { left, top, right, bottom, phrase: phrase.clone() }
        }
    };
    given.iter().map(part).collect()
}

#[test]
fn documents_begin_as_served_prompts_do() {
    for (document, shown) in each(Split::Test, 60) {
        // No client sends tokens.
        if document.pieces.iter().any(|piece| matches!(piece, Piece::Tokens { .. })) {
            continue;
        }
        let sequence = Sequence::new(&document, &TOKENIZER, QUERIES);
        let (output, extra) = match document.pieces.last().unwrap() {
            Piece::Image { .. } => (Output::Regression, 0),
            _ => (Output::Text { grounding: false, max_new_tokens: 1 }, 1),
        };
        let parts = parts(&document);
        if parts.is_empty() && extra == 1 {
            continue;
        }
        let prompt = build(&TOKENIZER, &CONFIG, &Input::Prompt(parts), &output).unwrap();
        assert_eq!(sequence.ids[..prompt.ids.len()], prompt.ids, "{shown}");
        let slots = sequence.slots.iter().map(|slot| (slot.start, slot.len));
        let served = prompt.slots.iter().map(|slot| (slot.start, slot.len));
        assert!(served.eq(slots.take(prompt.slots.len())), "{shown}");
        // The first thing that is not given is learned.
        let answer = prompt.ids.len();
        assert!(sequence.learn[answer] || sequence.slots.last().unwrap().learn, "{shown}");
    }
}

#[test]
fn chats_are_the_chat_template() {
    let mut checked = 0;
    for (document, shown) in each(Split::Train, 60) {
        let [Piece::Text { text: opening, .. }, Piece::Image { .. }, Piece::Text { text, .. }, _] =
            document.pieces.as_slice()
        else {
            continue;
        };
        let Some((question, rest)) = text.split_once(" [ASSISTANT]:") else { continue };
        assert!(opening.ends_with(" [USER]: "), "{shown}");
        let turns = vec![vec![Part::Image, Part::Text(question.to_owned())]];
        let input = Input::Chat { turns, system_message: None };
        let output = Output::Text { grounding: rest == "<grounding>", max_new_tokens: 1 };
        let prompt = build(&TOKENIZER, &CONFIG, &input, &output).unwrap();
        let sequence = Sequence::new(&document, &TOKENIZER, QUERIES);
        assert_eq!(sequence.ids[..prompt.ids.len()], prompt.ids, "{shown}");
        checked += 1;
    }
    assert!(checked > 10, "{checked} chats");
}

#[test]
fn every_document_learns_and_ends_and_fits() {
    for (document, shown) in each(Split::Train, 200) {
        let sequence = Sequence::new(&document, &TOKENIZER, Queries { n_query: 16, v_query: 16 });
        assert!(sequence.ids.len() <= 1_024, "{} positions: {shown}", sequence.ids.len());
        assert_eq!(sequence.ids.len(), sequence.learn.len());
        assert_eq!(sequence.ids.last() == Some(&TOKENIZER.special(Special::Eos)), document.ends, "{shown}");
        assert_eq!(sequence.learn.last(), Some(&true), "{shown}");
        for slot in &sequence.slots {
            assert!(!sequence.learn[slot.start..slot.start + slot.len].contains(&true));
            assert_eq!(sequence.ids[slot.start - 1], TOKENIZER.special(Special::Img));
        }
        assert!(document.pieces.iter().any(|piece| {
            matches!(
                piece,
                Piece::Text { learn: true, .. }
                    | Piece::Tokens { learn: true, .. }
                    | Piece::Image { learn: true, .. }
            )
        }));
    }
}

#[test]
fn training_documents_show_nothing_held_out() {
    for (document, shown) in each(Split::Train, 1_000) {
        assert!(!held_out::scene(&document.scene), "{shown}");
    }
}

#[test]
fn documents_are_the_same_anywhere() {
    for ((one, shown), (other, _)) in each(Split::Test, 5).zip(each(Split::Test, 5)) {
        let ids = |document: &Document| Sequence::new(document, &TOKENIZER, QUERIES).ids;
        assert_eq!(ids(&one), ids(&other), "{shown}");
        assert_eq!(one.scene, other.scene);
    }
}

/// Equal words, equal images: else a regression learns their mean.
#[test]
fn words_determine_the_image_to_paint() {
    let mut images = HashMap::new();
    let mut again = 0;
    for index in 0..20_000 {
        let scene = WORLD.painter(Split::Train).any(&mut WORLD.random(Split::Train, "painted", index));
        let told = crate::data::describe::whole(&scene);
        let things = scene.things.clone();
        if let Some(before) = images.insert(told.clone(), things.clone()) {
            assert_eq!(before, things, "{told}");
            again += 1;
        }
    }
    assert!(again > 50, "{again} told twice");
}

#[test]
fn pairs_are_told_in_reading_order_and_painted_from_either_thing() {
    let turned = |text: &str| [" right of ", " below "].iter().any(|way| text.contains(way));
    let mut painted = 0;
    for index in 0..400 {
        let caption = WORLD.document(Split::Train, Task::Caption, index);
        match caption.pieces.last().unwrap() {
            Piece::Text { text, .. } => assert!(!turned(text), "caption {index}: {text}"),
            _ => painted += usize::from(turned(&format!("{:?}", caption.pieces[0]))),
        }
    }
    assert!(painted > 0);
}

/// Every answer but the last is followed by its end; the questions are those that are asked alone.
#[test]
fn an_interview_is_of_questions_and_answers() {
    let sequence = |document| Sequence::new(&document, &TOKENIZER, QUERIES);
    let end = TOKENIZER.special_named("</s>").unwrap_or(2);
    for task in [Task::Interview, Task::Clip] {
        for index in 0..100 {
            let document = WORLD.document(Split::Train, task, index);
            let texts =
                document.pieces.iter().filter(|piece| matches!(piece, Piece::Text { learn: true, .. }));
            let answers = texts.count();
            assert!((1..=8).contains(&answers), "{document:?}");
            let sequence = sequence(document);
            let ends: Vec<_> = (0..sequence.ids.len()).filter(|&at| sequence.ids[at] == end).collect();
            assert_eq!(ends.len(), answers, "{task:?} {index}");
            assert!(ends.iter().all(|&at| sequence.learn[at]), "{task:?} {index}");
        }
    }
}

#[test]
fn names_are_shown_as_often_as_asked() {
    for shots in [0, 1, 2, 4, 8] {
        let document = WORLD.case(Split::Test, Ability::Names { shots }, 3);
        let mut counts = HashMap::new();
        let (answer, shown) = document.pieces.split_last().unwrap();
        for piece in shown.iter().skip(2).step_by(3) {
            let Piece::Text { text, .. } = piece else { panic!("{piece:?}") };
            *counts.entry(text.clone()).or_insert(0) += 1;
        }
        let Piece::Text { text, learn: true } = answer else { panic!("{answer:?}") };
        if shots > 0 {
            assert_eq!((counts.len(), counts.get(text)), (4, Some(&shots)));
        }
        assert!(counts.values().all(|&count| count == shots));
    }
}

/// All but the first time, and nothing else; no token tells where the document ends.
#[test]
fn repeated_tokens_are_learned() {
    let mut times = HashSet::new();
    for index in 0..100 {
        let document = WORLD.document(Split::Train, Task::Repetition, index);
        let Sequence { ids, learn, .. } = Sequence::new(&document, &TOKENIZER, QUERIES);
        let first = learn.iter().position(|&learn| learn).unwrap() - 1;
        assert!((3..=12).contains(&first), "{document:?}");
        assert!(learn[first + 1..].iter().all(|&learn| learn));
        assert!((first + 1..ids.len()).all(|at| ids[at] == ids[at - first]), "{ids:?}");
        assert_eq!(ids[1..=first].iter().collect::<HashSet<_>>().len(), first, "{ids:?}");
        times.insert((ids.len() - 1) / first);
    }
    assert_eq!(times, HashSet::from([2, 3]));
}

/// From its second time on, each after its key.
#[test]
fn values_are_learned_once_they_are_known() {
    let mut others = HashSet::new();
    for index in 0..100 {
        let document = WORLD.document(Split::Train, Task::KeyValues, index);
        let Sequence { ids, learn, .. } = Sequence::new(&document, &TOKENIZER, QUERIES);
        let mut values = HashMap::new();
        for (pair, learn) in ids[1..].chunks(2).zip(learn[1..].chunks(2)) {
            let before = values.insert(pair[0], pair[1]);
            assert_eq!(learn, [false, before.is_some()], "{document:?}");
            assert!(before.is_none_or(|before| before == pair[1]), "{document:?}");
        }
        assert_eq!(ids.len() - 1, 2 * 3 * values.len());
        others.insert(values.len());
    }
    assert_eq!(others, (2..=6).collect());
}

/// From its second time on, with its end, and the question's with the end of the document.
#[test]
fn names_are_learned_once_they_are_known() {
    for (task, index) in NAMES_OF.into_iter().flat_map(|task| (0..100).map(move |index| (task, index))) {
        let document = WORLD.document(Split::Train, task, index);
        let mut known = HashSet::new();
        let names = document.pieces.iter().filter(|piece| !is_shown(piece));
        for piece in names {
            let Piece::Text { text, learn } = piece else { panic!("{document:?}") };
            assert_eq!(*learn, !known.insert(text), "{document:?}");
        }
        let sequence = Sequence::new(&document, &TOKENIZER, QUERIES);
        let learned = (0..sequence.ids.len()).filter(|&at| sequence.learn[at]).map(|at| sequence.ids[at]);
        let learned = TOKENIZER.decode(&learned.collect::<Vec<_>>(), false);
        let texts = document.pieces.iter().filter_map(|piece| match piece {
            Piece::Text { text, learn: true } => Some(text.trim()),
            _ => None,
        });
        let without_spaces = |text: String| text.replace(' ', "");
        assert_eq!(without_spaces(learned), without_spaces(texts.collect::<String>() + "</s>"));
    }
}

/// Equal keys, equal names; of `names`, no image comes again.
#[test]
fn only_the_same_images_and_tokens_come_again() {
    for (task, index) in NAMES_OF.into_iter().flat_map(|task| (0..40).map(move |index| (task, index))) {
        let document = WORLD.document(Split::Train, task, index);
        let keys = document.pieces.iter().filter_map(|piece| match piece {
            Piece::Image { image, .. } => Some(image.rgb().to_vec()),
            Piece::Tokens { numbers, .. } => Some(format!("{numbers:?}").into_bytes()),
            _ => None,
        });
        let names = document.pieces.iter().filter(|piece| !is_shown(piece)).map(text);
        let pairs: Vec<_> = keys.zip(names).collect();
        let (keys, names): (HashSet<_>, HashSet<_>) = pairs.iter().cloned().unzip();
        let different: HashSet<_> = pairs.iter().collect();
        match task {
            Task::Names => assert_eq!(keys.len(), pairs.len(), "{document:?}"),
            _ => assert_eq!((keys.len(), names.len()), (different.len(), different.len()), "{document:?}"),
        }
    }
}

const NAMES_OF: [Task; 3] = [Task::Names, Task::NamesOfSameImages, Task::NamesOfTokens];

/// Returns whether a piece of an episode stands before a name.
fn is_shown(piece: &Piece) -> bool {
    !matches!(piece, Piece::Text { text, .. } if text.ends_with('.'))
}

/// In half of the episodes.
#[test]
fn names_are_often_new() {
    let is_new = |index: &u64| {
        let document = WORLD.document(Split::Train, Task::Names, *index);
        let name = text(document.pieces.last().unwrap());
        !episodes::NAMES.contains(&name.trim())
    };
    let new = (0..100).filter(is_new).count();
    assert!((35..=65).contains(&new), "{new}");
}

/// Without its full stop.
fn text(piece: &Piece) -> String {
    let Piece::Text { text, .. } = piece else { panic!("{piece:?}") };
    text.trim_end_matches('.').to_owned()
}

/// A batch of 32 needs little padding then.
#[test]
fn episodes_in_a_row_are_equally_long() {
    for task in NAMES_OF {
        // Half of the documents of tokens have words between key and name.
        let names = |index| {
            let document = WORLD.document(Split::Train, task, index);
            document.pieces.iter().filter(|piece| !is_shown(piece)).count()
        };
        let mut lengths = HashSet::new();
        for first in (0..320).step_by(32) {
            let length = names(first);
            assert!((first..first + 32).all(|index| names(index) == length), "{task:?} from {first}");
            lengths.insert(length);
        }
        assert!(lengths.len() > 3, "{task:?}: {lengths:?}");
    }
}

#[test]
fn cases_ask_for_what_they_are_called() {
    for (ability, index) in Ability::all().flat_map(|ability| (0..20).map(move |index| (ability, index))) {
        for split in [Split::Test, Split::Unseen] {
            let document = WORLD.case(split, ability, index);
            let shown = format!("{ability:?} {index}: {document:?}");
            match document.pieces.last().unwrap() {
                Piece::Image { learn, .. } => assert!(*learn && ability.answers_with_image(), "{shown}"),
                Piece::Text { learn, .. } => assert!(*learn && !ability.answers_with_image(), "{shown}"),
                _ => panic!("{shown}"),
            }
            if split == Split::Test && document.scene.things.len() > 1 {
                assert!(held_out::composition(&document.scene), "{shown}");
            }
        }
    }
}
