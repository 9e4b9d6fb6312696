//! What a request asks for, checked against this service's limits.

use std::ops::RangeInclusive;

use emu2_proto::stage::{
    self as stage, LlmInfo, LlmPart, LlmPrompt, TextParameters as Message, llm_part::Kind, llm_start,
};
use emu2_serve::status::{self, Violation};
use tonic::Status;

use crate::{
    prompt::{Input, Part},
    search::{Strategy, TextParameters, Warpers},
};

/// The length penalties that are taken: beyond either end, one token more outweighs any probability.
const LENGTH_PENALTY: RangeInclusive<f32> = -10.0..=10.0;
/// The temperatures that are taken: at 0.001 a token that is a tenth behind in its logit is never drawn, as with
/// greedy; at 100 all are about as likely.
const TEMPERATURE: RangeInclusive<f32> = 0.001..=100.0;
/// The repetition penalties that are taken: what was seen is favoured below 1, avoided above, as much either way.
const REPETITION_PENALTY: RangeInclusive<f32> = 0.1..=10.0;

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_new_tokens: u32,
    pub(super) max_beams: u32,
}

impl Limits {
    /// States these limits for the router, which refuses by them before it asks.
    pub(super) fn info(&self) -> LlmInfo {
        LlmInfo {
            max_new_tokens: self.max_new_tokens,
            max_beams: self.max_beams,
            min_length_penalty: *LENGTH_PENALTY.start(),
            max_length_penalty: *LENGTH_PENALTY.end(),
            min_temperature: *TEMPERATURE.start(),
            max_temperature: *TEMPERATURE.end(),
            min_repetition_penalty: *REPETITION_PENALTY.start(),
            max_repetition_penalty: *REPETITION_PENALTY.end(),
            ..LlmInfo::default()
        }
    }

    /// Checks the parameters of a text.
    ///
    /// # Errors
    ///
    /// All mistakes at once.
    pub(super) fn check(&self, text: &Message) -> Result<TextParameters, Status> {
        let mut wrong = Vec::new();
        let mut whole = |field, max: u32, value: u32| {
            if !(1..=max).contains(&value) {
                wrong.push(Violation::out_of_range(field, 1, max, value));
            }
        };
        whole("text.max_new_tokens", self.max_new_tokens, text.max_new_tokens);
        whole("text.num_beams", self.max_beams, text.num_beams);
        // The unseen first id counts, so that the longest output has one more.
        let longest = text.max_new_tokens.saturating_add(1);
        if text.min_length > longest {
            wrong.push(Violation::out_of_range("text.min_length", 0, longest, text.min_length));
        }
        let mut real = |field, range: RangeInclusive<f32>, value: f32| {
            // A NaN is in no range.
            if !range.contains(&value) {
                wrong.push(Violation::out_of_range(field, range.start(), range.end(), value));
            }
        };
        real("text.length_penalty", LENGTH_PENALTY, text.length_penalty);
        real("text.repetition_penalty", REPETITION_PENALTY, text.repetition_penalty);
        if text.do_sample {
            real("text.temperature", TEMPERATURE, text.temperature);
            // 0 is off.
            real("text.top_p", 0.0..=1.0, text.top_p);
            if text.num_beams > 1 {
                wrong.push(Violation::new(
                    "text.num_beams",
                    format!("must be 1 with do_sample, got {}", text.num_beams),
                ));
            }
        }
        if !wrong.is_empty() {
            return Err(status::invalid(wrong));
        }
        Ok(TextParameters {
            max_new_tokens: text.max_new_tokens as usize,
            min_length: text.min_length as usize,
            repetition_penalty: text.repetition_penalty,
            strategy: strategy(text),
        })
    }
}

fn strategy(text: &Message) -> Strategy {
    if text.do_sample {
        let warpers = Warpers {
            temperature: text.temperature,
            top_k: (text.top_k > 0).then_some(text.top_k as usize),
            top_p: (text.top_p > 0.0).then_some(text.top_p),
        };
        return Strategy::Sample { warpers, seed: text.seed };
    }
    match text.num_beams {
        1 => Strategy::Greedy,
        beams => Strategy::Beam { num_beams: beams as usize, length_penalty: text.length_penalty.into() },
    }
}

/// The prompt's input as the template takes it; what it means is checked there.
pub(super) fn input(input: Option<llm_start::Input>) -> Result<Input, Status> {
    match input {
        Some(llm_start::Input::Prompt(prompt)) => Ok(Input::Prompt(parts(prompt, "prompt")?)),
        Some(llm_start::Input::Chat(chat)) => {
            let turns = chat.turns.into_iter().enumerate();
            let turns = turns.map(|(index, turn)| parts(turn, &format!("chat.turns[{index}]")));
            Ok(Input::Chat { turns: turns.collect::<Result<_, _>>()?, system_message: chat.system_message })
        }
        None => Err(Violation::new("input", "must be prompt or chat, got nothing").into()),
    }
}

fn parts(prompt: LlmPrompt, field: &str) -> Result<Vec<Part>, Status> {
    let part = |(index, part): (usize, LlmPart)| match part.kind {
        Some(Kind::Text(text)) => Ok(Part::Text(text)),
        Some(Kind::Image(stage::ImageSlot {})) => Ok(Part::Image),
        Some(Kind::Video(stage::VideoSlots { frames })) => Ok(Part::Video { frames }),
        Some(Kind::Box(stage::LlmBox { left, top, right, bottom, phrase })) => {
            Ok(Part::Box { left, top, right, bottom, phrase })
        }
        None => {
            let field = format!("{field}.parts[{index}]");
            Err(Violation::new(field, "must be text, image, video or box, got nothing").into())
        }
    };
    prompt.parts.into_iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const LIMITS: Limits = Limits { max_new_tokens: 100, max_beams: 5 };

    fn valid() -> Message {
        Message {
            max_new_tokens: 10,
            min_length: 1,
            num_beams: 5,
            length_penalty: -1.0,
            temperature: 1.0,
            repetition_penalty: 1.0,
            ..Message::default()
        }
    }

    #[test]
    fn each_strategy_is_read() {
        let strategy = |text| LIMITS.check(&text).unwrap().strategy;
        assert_eq!(strategy(valid()), Strategy::Beam { num_beams: 5, length_penalty: -1.0 });
        assert_eq!(strategy(Message { num_beams: 1, ..valid() }), Strategy::Greedy);
        let sampled = Message { num_beams: 1, do_sample: true, top_k: 3, seed: 9, ..valid() };
        let warpers = Warpers { temperature: 1.0, top_k: Some(3), top_p: None };
        assert_eq!(strategy(sampled), Strategy::Sample { warpers, seed: 9 });
    }

    #[test]
    fn every_bad_value_is_named_with_its_limit() {
        let sampled = Message { do_sample: true, num_beams: 1, ..valid() };
        let cases = [
            (Message { max_new_tokens: 0, ..valid() }, "text.max_new_tokens must be 1 to 100, got 0"),
            (Message { max_new_tokens: 101, ..valid() }, "text.max_new_tokens must be 1 to 100, got 101"),
            (Message { num_beams: 6, ..valid() }, "text.num_beams must be 1 to 5, got 6"),
            (
                Message { length_penalty: f32::NAN, ..valid() },
                "text.length_penalty must be -10 to 10, got NaN",
            ),
            (
                Message { repetition_penalty: 0.0, ..valid() },
                "text.repetition_penalty must be 0.1 to 10, got 0",
            ),
            (Message { min_length: 12, ..valid() }, "text.min_length must be 0 to 11, got 12"),
            (
                Message { temperature: f32::INFINITY, ..sampled },
                "text.temperature must be 0.001 to 100, got inf",
            ),
            (Message { temperature: 1e-4, ..sampled }, "text.temperature must be 0.001 to 100, got 0.0001"),
            (Message { top_p: 1.5, ..sampled }, "text.top_p must be 0 to 1, got 1.5"),
            (Message { top_p: f32::NAN, ..sampled }, "text.top_p must be 0 to 1, got NaN"),
            (Message { num_beams: 2, ..sampled }, "text.num_beams must be 1 with do_sample, got 2"),
        ];
        for (text, message) in cases {
            let status = LIMITS.check(&text).unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
        }
        let all = Message { max_new_tokens: 0, num_beams: 0, ..valid() };
        assert!(LIMITS.check(&all).unwrap_err().message().ends_with("(and 1 more)"));
    }

    #[test]
    fn an_empty_part_is_named() {
        let prompt = LlmPrompt { parts: vec![LlmPart { kind: None }] };
        let chat = stage::LlmChat { turns: vec![prompt], system_message: None };
        let status = input(Some(llm_start::Input::Chat(chat))).unwrap_err();
        assert!(status.message().starts_with("chat.turns[0].parts[0] must be"), "{}", status.message());
    }
}
