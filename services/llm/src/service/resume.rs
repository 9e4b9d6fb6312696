//! What another replica has answered already: checked, and put at the prompt's end, where this one goes on.

use emu2_proto::{array::Array, stage::LlmResume};
use emu2_serve::status::Violation;

use crate::{
    load::Loaded,
    prompt::{Prompt, Slot},
    request::{Event, Output, Timings},
};

#[derive(Debug, Default)]
pub(super) struct Resumed {
    /// The ids of a text.
    pub(super) ids: Vec<u32>,
    /// The rows of an image, [rows, embedding_width].
    pub(super) rows: Option<Array>,
}

impl Resumed {
    pub(super) fn read(
        resume: Option<LlmResume>,
        output: &Output,
        loaded: &Loaded,
    ) -> Result<Self, Violation> {
        let Some(LlmResume { token_ids, rows }) = resume else { return Ok(Self::default()) };
        match output {
            Output::Text(_) if rows.is_some() => {
                Err(Violation::new("resume.rows", "must be absent under text, got some"))
            }
            Output::Text(parameters) => {
                let (most, got) = (parameters.max_new_tokens, token_ids.len());
                if got > most {
                    let text = format!("must be at most {most} ids (text.max_new_tokens), got {got}");
                    return Err(Violation::new("resume.token_ids", text));
                }
                let vocabulary = loaded.tokenizer.vocab_size();
                let unknown = token_ids.iter().position(|&id| id as usize >= vocabulary);
                let early = token_ids.iter().rev().skip(1).any(|&id| id == loaded.text_ids.end);
                match unknown {
                    Some(at) => {
                        let text =
                            format!("must be below {vocabulary}, the vocabulary, got {}", token_ids[at]);
                        Err(Violation::new(format!("resume.token_ids[{at}]"), text))
                    }
                    None if early => Err(Violation::new(
                        "resume.token_ids",
                        format!("must have the end of text, {}, only as the last", loaded.text_ids.end),
                    )),
                    None => Ok(Self { ids: token_ids, rows: None }),
                }
            }
            Output::Image { .. } if !token_ids.is_empty() => {
                let text = format!("must be absent under regression, got {}", token_ids.len());
                Err(Violation::new("resume.token_ids", text))
            }
            Output::Image { queries } => {
                let Some(rows) = rows else { return Ok(Self::default()) };
                let got = rows.shape.first().copied().unwrap_or(0) as usize;
                if !(1..=*queries).contains(&got) {
                    return Err(Violation::new(
                        "resume.rows",
                        format!("must be 1 to {queries} rows, got {got}"),
                    ));
                }
                let rows = Array::try_from(Some(rows))
                    .and_then(|rows| rows.expect(loaded.dtype, &[got, loaded.embedding_width]))
                    .map_err(|error| Violation::new("resume.rows", error.to_string()))?;
                Ok(Self { ids: Vec::new(), rows: Some(rows) })
            }
        }
    }

    /// Returns how many tokens or rows have been given.
    pub(super) fn count(&self) -> usize {
        self.ids.len() + self.rows.as_ref().map_or(0, |rows| rows.shape()[0])
    }

    /// The end, where nothing is missing but that it is said.
    pub(super) fn finished(&self, output: &Output, end: u32) -> Option<Event> {
        let (count, ended) = (self.count(), self.ids.last() == Some(&end));
        let (whole, complete, generated_tokens) = match output {
            // Beams tell their ids together.
            Output::Text(parameters) if parameters.rows() > 1 => (count > 0, ended, count),
            Output::Text(parameters) => (ended || count == parameters.max_new_tokens, ended, count),
            Output::Image { queries } => (count == *queries, true, 0),
        };
        let timings = Timings::default();
        whole.then_some(Event::Finished { complete, generated_tokens, timings })
    }

    /// Puts it at the prompt's end; rows become its last slot.
    pub(super) fn extend(&self, prompt: &mut Prompt) {
        prompt.ids.extend(&self.ids);
        if let Some(rows) = &self.rows {
            let (start, len) = (prompt.ids.len(), rows.shape()[0]);
            prompt.slots.push(Slot { start, len });
            // Any id: the rows take its place.
            prompt.ids.resize(start + len, 0);
        }
    }
}
