//! A prompt as the llm gets it, and what of it the embeddings that the llm regresses depend on.

use emu2_proto::{
    stage::{LlmPart, LlmPrompt, llm_part, llm_start::Input},
    v1,
};

use crate::field_hasher::FieldHasher;

/// A prompt as the llm gets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentPrompt<'a> {
    pub(crate) input: &'a Input,
    /// Embeddings of all its slots, in order, as they are sent.
    pub(crate) embeddings: &'a [v1::Tensor],
}

/// Everything of a prompt that its embeddings depend on, in order: text, values of boxes, digests of slots.
pub(super) fn content(tokenizer_digest: &str, prompt: SentPrompt<'_>) -> [u8; blake3::OUT_LEN] {
    let mut fields = FieldHasher::default();
    fields.push(tokenizer_digest.as_bytes());
    let mut slots = prompt.embeddings.iter();
    match prompt.input {
        Input::Prompt(prompt) => {
            fields.push(b"prompt");
            parts(prompt, &mut slots, &mut fields);
        }
        Input::Chat(chat) => {
            fields.push(b"chat");
            // No message is another thing than an empty one.
            match &chat.system_message {
                Some(message) => {
                    fields.push(b"system");
                    fields.push(message.as_bytes());
                }
                None => fields.push(b"no system"),
            }
            for turn in &chat.turns {
                fields.push(b"turn");
                parts(turn, &mut slots, &mut fields);
            }
        }
    }
    fields.hash()
}

fn parts<'a>(prompt: &LlmPrompt, slots: &mut impl Iterator<Item = &'a v1::Tensor>, fields: &mut FieldHasher) {
    for LlmPart { kind } in &prompt.parts {
        let taken = match kind {
            Some(llm_part::Kind::Text(text)) => {
                fields.push(b"text");
                fields.push(text.as_bytes());
                0
            }
            Some(llm_part::Kind::Image(_)) => {
                fields.push(b"image");
                1
            }
            Some(llm_part::Kind::Video(video)) => {
                fields.push(b"video");
                fields.push(&video.frames.to_le_bytes());
                video.frames as usize
            }
            Some(llm_part::Kind::Box(region)) => {
                fields.push(b"box");
                for side in [region.left, region.top, region.right, region.bottom] {
                    fields.push(&side.to_le_bytes());
                }
                fields.push(region.phrase.as_bytes());
                1
            }
            None => {
                fields.push(b"nothing");
                0
            }
        };
        slots.take(taken).for_each(|embeddings| fields.push(&digest(embeddings)));
    }
}

fn digest(embeddings: &v1::Tensor) -> [u8; blake3::OUT_LEN] {
    let mut fields = FieldHasher::default();
    fields.push(&embeddings.dtype.to_le_bytes());
    embeddings.shape.iter().for_each(|side| fields.push(&side.to_le_bytes()));
    fields.push(&embeddings.data);
    fields.hash()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use emu2_proto::stage::{ImageSlot, LlmChat, VideoSlots, llm_part::Kind as Part};

    use super::*;

    fn tensor(dtype: v1::Dtype, shape: &[u32], data: &'static [u8]) -> v1::Tensor {
        v1::Tensor { dtype: dtype.into(), shape: shape.to_vec(), data: data.into() }
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn region(left: f32, phrase: &str) -> Part {
        Part::Box(v1::Box { left, top: 0.0, right: 1.0, bottom: 1.0, phrase: phrase.into() })
    }

    fn prompt(parts: &[Part]) -> LlmPrompt {
        let parts = parts.iter().map(|part| LlmPart { kind: Some(part.clone()) });
        LlmPrompt { parts: parts.collect() }
    }

    fn plain(parts: &[Part]) -> Input {
        Input::Prompt(prompt(parts))
    }

    fn chat(system_message: Option<&str>, turns: &[&[Part]]) -> Input {
        let turns = turns.iter().map(|turn| prompt(turn)).collect();
        Input::Chat(LlmChat { turns, system_message: system_message.map(Into::into) })
    }

    #[test]
    fn whatever_the_llm_sees_differently_is_another_prompt() {
        let image = || Part::Image(ImageSlot {});
        let video = |frames| Part::Video(VideoSlots { frames });
        let [cat, dog] = [b"cats", b"dogs"].map(|data| tensor(v1::Dtype::F32, &[1, 1], data));
        let (cat, dog, both, turned) =
            (&[cat.clone()][..], &[dog.clone()][..], &[cat.clone(), dog.clone()][..], &[dog, cat][..]);
        let prompts: [(Input, &[v1::Tensor]); 21] = [
            (plain(&[]), &[]),
            (plain(&[text("")]), &[]),
            (plain(&[text("a cat")]), &[]),
            (plain(&[text("a"), text(" cat")]), &[]),
            (plain(&[text("a ca"), text("t")]), &[]),
            (plain(&[image()]), cat),
            (plain(&[image()]), dog),
            (plain(&[image(), image()]), both),
            (plain(&[image(), image()]), turned),
            (plain(&[video(2)]), both),
            (plain(&[video(1), image()]), both),
            (plain(&[image(), text("a cat")]), cat),
            (plain(&[text("a cat"), image()]), cat),
            (plain(&[region(0.0, "a cat")]), cat),
            (plain(&[region(0.5, "a cat")]), cat),
            (plain(&[region(0.5, "a dog")]), cat),
            (chat(None, &[&[text("a cat")]]), &[]),
            (chat(Some(""), &[&[text("a cat")]]), &[]),
            (chat(Some("be brief"), &[&[text("a cat")]]), &[]),
            (chat(None, &[&[text("a")], &[text("cat")]]), &[]),
            (chat(None, &[&[text("a"), text("cat")], &[]]), &[]),
        ];
        let mut contents: HashSet<_> = prompts
            .iter()
            .map(|(input, embeddings)| content("t1", SentPrompt { input, embeddings }))
            .collect();
        contents.insert(content("t2", SentPrompt { input: &prompts[0].0, embeddings: &[] }));
        assert_eq!(contents.len(), prompts.len() + 1);
    }

    #[test]
    fn embeddings_are_their_dtype_their_shape_and_their_bytes() {
        let tensors = [
            tensor(v1::Dtype::F32, &[1, 2], b"12345678"),
            tensor(v1::Dtype::F32, &[2, 1], b"12345678"),
            tensor(v1::Dtype::F32, &[2], b"12345678"),
            tensor(v1::Dtype::Bf16, &[1, 2], b"12345678"),
            tensor(v1::Dtype::F32, &[1, 2], b"12345679"),
        ];
        let different: HashSet<_> = tensors.iter().map(digest).collect();
        assert_eq!(different.len(), tensors.len());
        assert!(different.contains(&digest(&tensors[0])));
    }
}
