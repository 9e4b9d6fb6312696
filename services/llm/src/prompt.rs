//! Parts of an interleaved prompt to the positions the language model reads: token ids, and where among them the
//! embeddings of images and frames go.
//!
//! The rules are upstream's (github.com/baaivision/Emu at 13c395e: Emu2/emu/chat.py `_prepare_inputs` and
//! `_prepare_chat_inputs`, emu.py `generate` and `generate_image`, diffusion.py `_prepare_and_encode_inputs`, and for
//! boxes the README and demo/frontend/libs/meta.py). One difference: upstream recognises its placeholder strings
//! (`[<IMG_PLH>]`, a lone `[VIDEO]` or `[/VIDEO]` that turns what follows into frames or back) inside text; here
//! images and videos are parts of their own, and text is text.

#[cfg(test)]
mod tests;

use crate::tokenizer::{
    ASSISTANT, EOS, GIMG, GROUNDING, IMAGE, IMG, IMG_END, OBJECT, OBJECT_END, PHRASE, PHRASE_END, Special,
    Tokenizer, USER, VIDEO, is_space, patch_index,
};

/// The version of the rules of this file in cache keys: to be raised whenever equal parts give other positions.
pub const TEMPLATE_VERSION: u32 = 1;

/// The system message of a chat that does not bring its own.
pub const SYSTEM_MESSAGE: &str =
    "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses.";
/// The system message of a chat that asks for boxes and does not bring its own.
pub const GROUNDING_SYSTEM_MESSAGE: &str =
    "You are a helpful assistant, dedicated to provide concise and efficient answers.";

/// How many positions a box in text takes: four coordinates between two marks.
const REGION_POSITIONS: usize = 6;

/// Coordinates in text reach from 0 to this (upstream's README), though there are 257 patch index tokens.
const COORDINATE_MAX: f64 = 224.0;

/// A part of an interleaved prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// A text, as it stands.
    Text(String),
    /// An image: one slot of `n_query` embeddings.
    Image,
    /// A video: one slot of `v_query` embeddings for each frame.
    Video {
        /// How many frames, at least 1.
        frames: u32,
    },
    /// A named region in fractions of the image. Under regression it takes one slot of `n_query` embeddings, of the
    /// region drawn as an image; under text output it is written as coordinates.
    Box {
        /// The left edge, 0 to below `right`.
        left: f32,
        /// The top edge, 0 to below `bottom`.
        top: f32,
        /// The right edge, at most 1.
        right: f32,
        /// The bottom edge, at most 1.
        bottom: f32,
        /// What is in the region; empty for an unnamed one.
        phrase: String,
    },
}

/// What a prompt is laid out from.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Parts in order, without a template.
    Prompt(Vec<Part>),
    /// Turns of user and assistant, the first and the last of the user.
    Chat {
        /// The parts of each turn, an odd number of turns.
        turns: Vec<Vec<Part>>,
        /// The system message in place of upstream's.
        system_message: Option<String>,
    },
}

/// What is to follow the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A text.
    Text {
        /// Whether to ask for boxes; read with a chat only, as upstream.
        grounding: bool,
        /// The most tokens of the text.
        max_new_tokens: usize,
    },
    /// The embeddings of one image: the prompt ends in `[IMG]`.
    Regression,
}

/// What the model takes for each image, and at most in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptConfig {
    /// How many embeddings an image has, at least 1.
    pub n_query: usize,
    /// How many embeddings a video frame has, at least 1.
    pub v_query: usize,
    /// The most positions that prompt and output take together.
    pub max_positions: usize,
}

/// A prompt as the positions that the language model reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// One id for each position; inside slots that of `<image>` or `[gIMG]`.
    pub ids: Vec<u32>,
    /// The places of embeddings, in order of appearance.
    pub slots: Vec<Slot>,
}

/// The positions [start, start + len) that hold one image's embeddings in place of token embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The first of these positions.
    pub start: usize,
    /// How many embeddings the slot takes.
    pub len: usize,
}

/// Why a prompt cannot be laid out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PromptError {
    /// A part breaks a rule.
    #[error("{field}: {problem}")]
    Invalid {
        /// The path of the field from the request, such as `chat.turns[1].parts[0].text`.
        field: String,
        /// The rule.
        problem: Problem,
    },
    /// The text is longer than any that could fit the positions.
    #[error("{field} holds {bytes} bytes of text, more than {limit}")]
    TooManyBytes {
        /// The field that holds the texts, `prompt` or `chat`.
        field: &'static str,
        /// The bytes of all texts.
        bytes: usize,
        /// The most bytes that could fit.
        limit: usize,
    },
    /// Prompt and output together take more positions than the model has.
    #[error("the prompt takes {prompt} positions and the output {requested}, together more than {limit}")]
    TooLong {
        /// The positions of the prompt: exact, but a lower bound of so many frames or boxes that they are not even
        /// laid out.
        prompt: usize,
        /// The positions of the output.
        requested: usize,
        /// The positions that the model has.
        limit: usize,
    },
}

/// The rule that a part of a prompt breaks; the message reads on from the name of its field.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// There are no parts.
    #[error("has no parts, needs at least 1")]
    NoParts,
    /// A chat has an even number of turns, which it holds.
    #[error("has {0} turns, needs an odd number: user and assistant in turn, first and last the user")]
    EvenTurns(usize),
    /// The model was not tuned to chat.
    #[error("this model has no chat template, send a prompt")]
    NoChat,
    /// An image is asked for as the answer to a chat.
    #[error("an image is generated from a prompt, not from a chat")]
    ChatRegression,
    /// A text contains this placeholder of embeddings.
    #[error("contains {0}, which stands for embeddings and cannot be written")]
    Reserved(&'static str),
    /// A video has no frames.
    #[error("has 0 frames, needs at least 1")]
    NoFrames,
    /// Two opposite edges of a box do not lie within the image, one before the other.
    #[error("{low_edge} is {low} and {high_edge} is {high}, must be 0 <= {low_edge} < {high_edge} <= 1")]
    Edges {
        /// The name of the left or the top edge.
        low_edge: &'static str,
        /// Where it is, in fractions of the image.
        low: f32,
        /// The name of the opposite edge.
        high_edge: &'static str,
        /// Where that is, in fractions of the image.
        high: f32,
    },
}

/// Lays out a prompt. The work is bounded by `config.max_positions`: more text than could fit them is refused unread.
///
/// # Errors
///
/// The first rule that the input breaks, or that prompt and output do not fit the model's positions.
pub fn build(
    tokenizer: &Tokenizer,
    config: &PromptConfig,
    input: &Input,
    output: &Output,
) -> Result<Prompt, PromptError> {
    check_bytes(input, tokenizer.max_text_bytes(config.max_positions))?;
    let mut layout =
        Layout { config, output, text: String::new(), slots: Vec::new(), positions: 0, regions: 0 };
    match input {
        Input::Prompt(parts) => layout.prompt(parts)?,
        Input::Chat { .. } if !tokenizer.instruct() => return Err(invalid("chat", Problem::NoChat)),
        Input::Chat { turns, system_message } => layout.chat(turns, system_message.as_deref())?,
    }
    layout.expand(tokenizer)
}

/// The prompt as text, each slot written as a single `<image>` or `[gIMG]`: special tokens are never merged with
/// what is around them, so repeating their ids afterwards gives what upstream gets from writing them out.
struct Layout<'a> {
    config: &'a PromptConfig,
    output: &'a Output,
    text: String,
    /// The length of each slot.
    slots: Vec<usize>,
    /// How many positions the slots take beyond the ids of `text`.
    positions: usize,
    /// How many boxes are written as coordinates.
    regions: usize,
}

impl Layout<'_> {
    fn prompt(&mut self, parts: &[Part]) -> Result<(), PromptError> {
        let regression = *self.output == Output::Regression;
        // No parts at all is the negative of image generation.
        if parts.is_empty() && !regression {
            return Err(invalid("prompt.parts", Problem::NoParts));
        }
        self.parts(parts, "prompt")?;
        if regression {
            // As upstream's demo does, and its README by hand.
            let boxes = parts.iter().any(|part| matches!(part, Part::Box { .. }));
            if boxes && !self.text.trim_start_matches(is_space).starts_with(GROUNDING) {
                self.text.insert_str(0, GROUNDING);
            }
            self.text.push_str(IMG);
        }
        Ok(())
    }

    fn chat(&mut self, turns: &[Vec<Part>], system_message: Option<&str>) -> Result<(), PromptError> {
        let Output::Text { grounding, .. } = *self.output else {
            return Err(invalid("chat", Problem::ChatRegression));
        };
        if turns.len().is_multiple_of(2) {
            return Err(invalid("chat.turns", Problem::EvenTurns(turns.len())));
        }
        let default = if grounding { GROUNDING_SYSTEM_MESSAGE } else { SYSTEM_MESSAGE };
        self.written(system_message.unwrap_or(default), || "chat.system_message".to_owned())?;
        for (index, parts) in turns.iter().enumerate() {
            let turn = format!("chat.turns[{index}]");
            if parts.is_empty() {
                return Err(invalid(format!("{turn}.parts"), Problem::NoParts));
            }
            self.text.push_str(&match index {
                0 => format!(" {USER}: "),
                _ if index % 2 == 1 => format!(" {ASSISTANT}: "),
                _ => format!("{EOS}{USER}: "),
            });
            self.parts(parts, &turn)?;
        }
        self.text.push_str(&format!(" {ASSISTANT}:"));
        if grounding {
            self.text.push_str(GROUNDING);
        }
        Ok(())
    }

    fn parts(&mut self, parts: &[Part], parent: &str) -> Result<(), PromptError> {
        for (index, part) in parts.iter().enumerate() {
            let field = |name: &str| format!("{parent}.parts[{index}].{name}");
            match part {
                Part::Text(text) => self.written(text, || field("text"))?,
                Part::Image => self.place(1, IMAGE, self.config.n_query)?,
                Part::Video { frames: 0 } => return Err(invalid(field("video.frames"), Problem::NoFrames)),
                Part::Video { frames } => {
                    self.text.push_str(VIDEO);
                    self.place(*frames as usize, GIMG, self.config.v_query)?;
                }
                Part::Box { left, top, right, bottom, phrase } => {
                    check_edges(("left", *left), ("right", *right))
                        .map_err(|problem| invalid(field("box"), problem))?;
                    check_edges(("top", *top), ("bottom", *bottom))
                        .map_err(|problem| invalid(field("box"), problem))?;
                    self.phrase(phrase, || field("box.phrase"))?;
                    self.region([*left, *top, *right, *bottom])?;
                }
            }
        }
        Ok(())
    }

    /// Writes text from outside. It may hold special tokens, as upstream, but not those that stand for embeddings, nor
    /// complete one that the text part before it began.
    fn written(&mut self, text: &str, field: impl Fn() -> String) -> Result<(), PromptError> {
        let joint = self.text.floor_char_boundary((self.text.len() + 1).saturating_sub(IMAGE.len()));
        self.text.push_str(text);
        match [IMAGE, GIMG].into_iter().find(|token| self.text[joint..].contains(token)) {
            Some(token) => Err(invalid(field(), Problem::Reserved(token))),
            None => Ok(()),
        }
    }

    /// An unnamed region has no phrase at all, as in upstream's demo.
    fn phrase(&mut self, phrase: &str, field: impl Fn() -> String) -> Result<(), PromptError> {
        if phrase.is_empty() {
            return Ok(());
        }
        self.text.push_str(PHRASE);
        self.written(phrase, field)?;
        self.text.push_str(PHRASE_END);
        Ok(())
    }

    /// `edges`: left, top, right, bottom, which is also the order of the coordinates in text.
    fn region(&mut self, edges: [f32; 4]) -> Result<(), PromptError> {
        self.text.push_str(OBJECT);
        match self.output {
            Output::Regression => self.place(1, IMAGE, self.config.n_query)?,
            Output::Text { .. } => {
                // As below: refused before they are written.
                self.regions += 1;
                self.check_length(self.regions * REGION_POSITIONS)?;
                let coordinate = |edge: f32| (f64::from(edge) * COORDINATE_MAX).round() as usize;
                self.text.extend(edges.map(|edge| patch_index(coordinate(edge))));
            }
        }
        self.text.push_str(OBJECT_END);
        Ok(())
    }

    fn place(&mut self, count: usize, token: &str, queries: usize) -> Result<(), PromptError> {
        self.positions = self.positions.saturating_add(count.saturating_mul(queries - 1));
        // More slots than positions are refused before they are written: a frame count is only a number.
        if self.slots.len().saturating_add(count) > self.config.max_positions {
            let ids = (self.slots.len().saturating_add(count)).saturating_mul(3);
            self.check_length(self.positions.saturating_add(ids))?;
        }
        for _ in 0..count {
            self.text.extend([IMG, token, IMG_END]);
            self.slots.push(queries);
        }
        Ok(())
    }

    fn requested(&self) -> usize {
        match *self.output {
            Output::Text { max_new_tokens, .. } => max_new_tokens,
            Output::Regression => self.config.n_query,
        }
    }

    fn check_length(&self, prompt: usize) -> Result<(), PromptError> {
        let (requested, limit) = (self.requested(), self.config.max_positions);
        if prompt.saturating_add(requested) > limit {
            return Err(PromptError::TooLong { prompt, requested, limit });
        }
        Ok(())
    }

    fn expand(self, tokenizer: &Tokenizer) -> Result<Prompt, PromptError> {
        let written = tokenizer.encode(&self.text);
        let positions = written.len() + self.positions;
        self.check_length(positions)?;
        let placeholders = [Special::Image, Special::Gimg].map(|special| tokenizer.special(special));
        let mut lengths = self.slots.into_iter();
        let mut prompt =
            Prompt { ids: Vec::with_capacity(positions), slots: Vec::with_capacity(lengths.len()) };
        for id in written {
            let mut len = 1;
            if placeholders.contains(&id) {
                len = lengths.next().expect("text from outside holds no placeholder");
                prompt.slots.push(Slot { start: prompt.ids.len(), len });
            }
            prompt.ids.extend(std::iter::repeat_n(id, len));
        }
        Ok(prompt)
    }
}

/// Checks the length of texts, phrases and the system message, all together.
fn check_bytes(input: &Input, limit: usize) -> Result<(), PromptError> {
    let part = |part: &Part| match part {
        Part::Text(text) => text.len(),
        Part::Box { phrase, .. } => phrase.len(),
        Part::Image | Part::Video { .. } => 0,
    };
    let parts = |parts: &[Part]| parts.iter().map(part).sum::<usize>();
    let (field, bytes) = match input {
        Input::Prompt(prompt) => ("prompt", parts(prompt)),
        Input::Chat { turns, system_message } => {
            let system = system_message.as_ref().map_or(0, String::len);
            ("chat", system + turns.iter().map(|turn| parts(turn)).sum::<usize>())
        }
    };
    if bytes > limit { Err(PromptError::TooManyBytes { field, bytes, limit }) } else { Ok(()) }
}

fn check_edges(
    (low_edge, low): (&'static str, f32),
    (high_edge, high): (&'static str, f32),
) -> Result<(), Problem> {
    // A NaN fails every comparison.
    if 0.0 <= low && low < high && high <= 1.0 {
        return Ok(());
    }
    Err(Problem::Edges { low_edge, low, high_edge, high })
}

fn invalid(field: impl Into<String>, problem: Problem) -> PromptError {
    PromptError::Invalid { field: field.into(), problem }
}
