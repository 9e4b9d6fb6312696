//! What the llm regressed for a whole prompt. It is deterministic there: the same prompt gives the same embeddings
//! whatever the seed, so that another picture of it needs the decoder alone. Guidance's negative is that of the empty
//! prompt.
//!
//! A prompt is looked up only if the cache holds all its pictures. One that has to be encoded makes the prompt new in
//! any case, and the llm had better begin on what comes before it.

use emu2_proto::{
    stage::{LlmAccepted, LlmInfo, LlmPart, LlmPrompt, llm_part, llm_start::Input},
    v1,
};

use crate::{
    cache::{Found, Key, Kind, Recipe},
    embeddings::Embeddings,
    field_hasher::FieldHasher,
};

/// A prompt as the llm gets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentPrompt<'a> {
    pub(crate) input: &'a Input,
    /// Of all its slots, in order, as they are sent.
    pub(crate) embeddings: &'a [v1::Tensor],
}

impl Embeddings {
    /// What the llm regressed for this prompt before.
    pub(crate) async fn regressed(&self, prompt: SentPrompt<'_>) -> Option<Found> {
        let llm = &self.profile.llm;
        let found = self.cache.peek(self.prompt_key(llm, llm.dtype(), prompt)).await;
        self.cache
            .count(Kind::Regressed, found.as_ref().map_or_else(|outcome| *outcome, |found| found.outcome));
        found.ok()
    }

    /// Keeps what the llm has now regressed, all of it, under the names that came with it.
    pub(crate) fn keep_regressed(
        &self,
        accepted: &LlmAccepted,
        prompt: SentPrompt<'_>,
        regressed: v1::Tensor,
    ) {
        self.cache.put(self.key_of_regressed(accepted, prompt, regressed.dtype()), regressed);
    }

    /// By what the llm that regressed it called itself.
    pub(crate) fn key_of_regressed(
        &self,
        accepted: &LlmAccepted,
        prompt: SentPrompt<'_>,
        dtype: v1::Dtype,
    ) -> Key {
        let LlmAccepted { weights_digest, tokenizer_digest, template_version, .. } = accepted.clone();
        let llm =
            LlmInfo { weights_digest, tokenizer_digest, template_version, ..(*self.profile.llm).clone() };
        self.prompt_key(&llm, dtype, prompt)
    }

    pub(crate) fn prompt_key(&self, llm: &LlmInfo, dtype: v1::Dtype, prompt: SentPrompt<'_>) -> Key {
        let recipe = Recipe {
            kind: Kind::Regressed,
            weights_digest: &llm.weights_digest,
            preprocessing_version: llm.template_version,
            n_query: llm.n_query,
            dtype,
            tenant: self.tenant.name(),
            content: &content(&llm.tokenizer_digest, prompt),
        };
        recipe.key()
    }
}

/// Everything of a prompt that its embeddings depend on, in order: text, values of boxes, digests of slots.
fn content(tokenizer_digest: &str, prompt: SentPrompt<'_>) -> [u8; blake3::OUT_LEN] {
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

    use emu2_proto::stage::{ImageSlot, LlmBox, LlmChat, VideoSlots, llm_part::Kind as Part};

    use super::*;

    fn tensor(dtype: v1::Dtype, shape: &[u32], data: &'static [u8]) -> v1::Tensor {
        v1::Tensor { dtype: dtype.into(), shape: shape.to_vec(), data: data.into() }
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn region(left: f32, phrase: &str) -> Part {
        Part::Box(LlmBox { left, top: 0.0, right: 1.0, bottom: 1.0, phrase: phrase.into() })
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
