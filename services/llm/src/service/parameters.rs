//! What a request asks for, checked against this service's limits.

use std::ops::RangeInclusive;

use emu2_proto::{
    stage::{self as stage, LlmPart, LlmPrompt, llm_part::Kind, llm_start},
    v1::{self, ParameterLimit, TextOutput},
};
use emu2_serve::{
    parameters,
    status::{self, Violation},
};
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

/// What this service takes, as it is told to the router, which refuses by it before it asks.
#[derive(Clone, Debug)]
pub(super) struct Limits(Vec<ParameterLimit>);

impl Limits {
    pub(super) fn new(max_new_tokens: u32, max_beams: u32) -> Self {
        let limit = |field, values, default| ParameterLimit::new(field, values, default);
        let stated = vec![
            limit("text.max_new_tokens", 1..=max_new_tokens, Some(max_new_tokens.min(64))),
            // The unseen first id counts, so that the longest output has one more.
            limit("text.min_length", 0..=max_new_tokens.saturating_add(1), Some(1)),
            limit("text.num_beams", 1..=max_beams, Some(max_beams.min(5))),
            ParameterLimit::new("text.length_penalty", LENGTH_PENALTY, Some(-1.0)),
            ParameterLimit::new("text.temperature", TEMPERATURE, Some(1.0)),
            limit("text.top_k", 1..=u32::MAX, None),
            ParameterLimit::new("text.top_p", 0.0..=1.0, None).above_min(),
            ParameterLimit::new("text.repetition_penalty", REPETITION_PENALTY, Some(1.0)),
        ];
        Self(stated)
    }

    pub(super) fn stated(&self) -> &[ParameterLimit] {
        &self.0
    }

    /// The parameters as the engine takes them, or all mistakes at once.
    pub(super) fn check(
        &self,
        asked: &TextOutput,
        seed: u64,
    ) -> Result<(TextOutput, TextParameters), Status> {
        let (text, wrong) = parameters::text(asked, self.stated());
        if !wrong.is_empty() {
            return Err(status::invalid(wrong));
        }
        let parameters = TextParameters {
            max_new_tokens: text.max_new_tokens() as usize,
            min_length: text.min_length() as usize,
            repetition_penalty: text.repetition_penalty(),
            strategy: strategy(&text, seed),
        };
        Ok((text, parameters))
    }
}

fn strategy(text: &TextOutput, seed: u64) -> Strategy {
    if text.do_sample {
        let warpers = Warpers {
            temperature: text.temperature(),
            top_k: text.top_k.map(|k| k as usize),
            top_p: text.top_p,
        };
        return Strategy::Sample { warpers, seed };
    }
    match text.num_beams() {
        1 => Strategy::Greedy,
        beams => Strategy::Beam { num_beams: beams as usize, length_penalty: text.length_penalty().into() },
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
        Some(Kind::Box(v1::Box { left, top, right, bottom, phrase })) => {
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

    fn limits() -> Limits {
        Limits::new(100, 5)
    }

    #[test]
    fn each_strategy_is_read() {
        let strategy = |text| limits().check(&text, 9).unwrap().1.strategy;
        let default = TextOutput::default();
        assert_eq!(strategy(default), Strategy::Beam { num_beams: 5, length_penalty: -1.0 });
        assert_eq!(strategy(TextOutput { num_beams: Some(1), ..default }), Strategy::Greedy);
        let sampled = TextOutput { do_sample: true, top_k: Some(3), ..default };
        let warpers = Warpers { temperature: 1.0, top_k: Some(3), top_p: None };
        assert_eq!(strategy(sampled), Strategy::Sample { warpers, seed: 9 });
    }

    #[test]
    fn defaults_stay_within_a_small_services_limits() {
        let small = Limits::new(16, 2);
        let (text, _) = small.check(&TextOutput::default(), 1).unwrap();
        assert_eq!((text.max_new_tokens, text.num_beams), (Some(16), Some(2)));
    }

    #[test]
    fn every_bad_value_is_named_with_its_limit() {
        let valid = TextOutput { max_new_tokens: Some(10), ..TextOutput::default() };
        let cases = [
            (TextOutput { max_new_tokens: Some(0), ..valid }, "text.max_new_tokens must be 1 to 100, got 0"),
            (
                TextOutput { max_new_tokens: Some(101), ..valid },
                "text.max_new_tokens must be 1 to 100, got 101",
            ),
            (TextOutput { num_beams: Some(6), ..valid }, "text.num_beams must be 1 to 5, got 6"),
            (
                TextOutput { length_penalty: Some(f32::NAN), ..valid },
                "text.length_penalty must be -10 to 10, got NaN",
            ),
            (
                TextOutput { repetition_penalty: Some(0.0), ..valid },
                "text.repetition_penalty must be 0.1 to 10, got 0",
            ),
            (TextOutput { min_length: Some(12), ..valid }, "text.min_length must be 0 to 11, got 12"),
            (
                TextOutput { temperature: Some(f32::INFINITY), ..valid },
                "text.temperature must be 0.001 to 100, got inf",
            ),
            (
                TextOutput { temperature: Some(1e-4), ..valid },
                "text.temperature must be 0.001 to 100, got 0.0001",
            ),
            (TextOutput { top_k: Some(0), ..valid }, "text.top_k must be 1 to 4294967295, got 0"),
            (TextOutput { top_p: Some(1.5), ..valid }, "text.top_p must be above 0 to 1, got 1.5"),
            (TextOutput { top_p: Some(f32::NAN), ..valid }, "text.top_p must be above 0 to 1, got NaN"),
            (
                TextOutput { do_sample: true, num_beams: Some(2), ..valid },
                "text.num_beams must be 1 with do_sample, got 2",
            ),
        ];
        for (text, message) in cases {
            let status = limits().check(&text, 1).unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
        }
        let all = TextOutput { max_new_tokens: Some(0), num_beams: Some(0), ..valid };
        assert!(limits().check(&all, 1).unwrap_err().message().ends_with("(and 1 more)"));
    }

    #[test]
    fn an_empty_part_is_named() {
        let prompt = LlmPrompt { parts: vec![LlmPart { kind: None }] };
        let chat = stage::LlmChat { turns: vec![prompt], system_message: None };
        let status = input(Some(llm_start::Input::Chat(chat))).unwrap_err();
        assert!(status.message().starts_with("chat.turns[0].parts[0] must be"), "{}", status.message());
    }
}
