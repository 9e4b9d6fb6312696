//! From what a client sent to what the stages are asked: every mistake told at once, every default filled in.
//!
//! Nothing here waits or remembers, and no image is opened. Numbers of positions are the llm's to check: they need
//! the tokenizer.

mod checks;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use emu2_proto::{
    pooling,
    stage::{DecodeStart, ImageSlot, LlmChat, LlmPart, LlmPrompt, VideoSlots, llm_part, llm_start},
    v1::{
        self, EmbedRequest, GenerateRequest, ImageOutput, TextOutput,
        generate_request::{Input, Output},
        part,
    },
};
use emu2_serve::{parameters, status::Violation};

use self::checks::Checks;
use crate::{config::LimitsConfig, field_hasher::FieldHasher, model::Profile};

/// A request that was found right.
#[derive(Debug, PartialEq)]
pub(crate) struct Generation {
    pub(crate) task: Task,
    /// What goes into the prompt's slots, in order.
    pub(crate) images: Vec<PromptImage>,
    pub(crate) seed: u64,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Task {
    /// Text from the llm.
    Write { input: llm_start::Input, parameters: TextOutput },
    /// An image from embeddings that the llm regresses.
    Paint { input: llm_start::Input, start: DecodeStart },
    /// An image from the embeddings of the only image.
    Autoencode { start: DecodeStart },
}

impl Task {
    /// What the decoder is asked, if it is.
    pub(crate) fn start(&self) -> Option<&DecodeStart> {
        match self {
            Self::Write { .. } => None,
            Self::Paint { start, .. } | Self::Autoencode { start } => Some(start),
        }
    }

    /// The task's name in metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Write { .. } => "text",
            Self::Paint { .. } => "image",
            Self::Autoencode { .. } => "autoencode",
        }
    }
}

impl Generation {
    /// Equal for prompts that begin alike, in their first image and their first text: a hint for finding a replica
    /// that has read such a beginning before, not an identity. Read are a few thousand bytes at most.
    pub(crate) fn beginning(&self) -> u64 {
        const READ: usize = 4096;
        let mut hasher = FieldHasher::default();
        if let Some(PromptImage { subject: Subject::Image(data), .. }) = self.images.first() {
            hasher.push(&(data.len() as u64).to_le_bytes());
            hasher.push(&data[..data.len().min(READ)]);
        }
        let parts = match &self.task {
            Task::Write { input, .. } | Task::Paint { input, .. } => match input {
                llm_start::Input::Prompt(prompt) => prompt.parts.as_slice(),
                llm_start::Input::Chat(chat) => {
                    hasher.push(chat.system_message.as_deref().unwrap_or_default().as_bytes());
                    chat.turns.first().map_or(&[][..], |turn| &turn.parts)
                }
            },
            Task::Autoencode { .. } => &[],
        };
        let texts = parts.iter().filter_map(|part| match &part.kind {
            Some(llm_part::Kind::Text(text)) => Some(text.as_bytes()),
            _ => None,
        });
        let text = texts.into_iter().next().unwrap_or_default();
        hasher.push(&text[..text.len().min(READ)]);
        hasher.hint()
    }
}

/// Something that becomes embeddings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PromptImage {
    pub(crate) subject: Subject,
    /// Embeddings wanted of it.
    pub(crate) n_query: u32,
    /// Where the request holds it, for complaints about it.
    pub(crate) field: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Subject {
    /// An encoded image, as the client sent it.
    Image(Bytes),
    /// A region, which the encoder draws.
    Box(v1::Box),
}

/// Checks a request against the router's limits and what the model can do.
pub(crate) fn check(
    request: GenerateRequest,
    limits: &LimitsConfig,
    profile: &Profile,
) -> Result<Generation, Vec<Violation>> {
    let seed = request.seed.unwrap_or_else(rand::random);
    let mut checker = Checker {
        profile,
        checks: Checks::default(),
        images: Vec::new(),
        paints: false,
        parts: 0,
        text_bytes: 0,
    };
    checker.paints = matches!(request.output, Some(Output::Image(_)));
    let autoencodes = checker.paints && is_one_image(request.input.as_ref());
    let input = checker.input(request.input);
    checker.counts(limits, input.as_ref());
    let task = match (request.output, input) {
        (Some(Output::Text(text)), input) => {
            let parameters = checker.text(&text);
            input.map(|input| Task::Write { input, parameters })
        }
        (Some(Output::Image(image)), input) => {
            let start = DecodeStart { seed, queries: profile.llm.n_query, ..checker.image(&image) };
            input.map(
                |input| if autoencodes { Task::Autoencode { start } } else { Task::Paint { input, start } },
            )
        }
        (None, _) => {
            checker.checks.wrong("output", "must be one of text and image, got neither");
            None
        }
    };
    let Checker { checks, images, .. } = checker;
    match (task, checks.violations()) {
        (Some(task), violations) if violations.is_empty() => Ok(Generation { task, images, seed }),
        (_, violations) => Err(violations),
    }
}

/// Checks an `Embed` request.
pub(crate) fn check_embed(request: EmbedRequest, profile: &Profile) -> Result<PromptImage, Vec<Violation>> {
    let mut checks = Checks::default();
    let data = request.image.unwrap_or_default().data;
    checks.image("image", &data);
    let n_query = request.n_query.unwrap_or(profile.llm.n_query);
    if let Some(problem) = pooling::problem(profile.encoder.grid_side, n_query) {
        checks.wrong("n_query", problem);
    }
    match checks.violations() {
        violations if violations.is_empty() => {
            Ok(PromptImage { subject: Subject::Image(data), n_query, field: "image".into() })
        }
        violations => Err(violations),
    }
}

fn is_one_image(input: Option<&Input>) -> bool {
    let Some(Input::Prompt(prompt)) = input else { return false };
    matches!(prompt.parts.as_slice(), [v1::Part { kind: Some(part::Kind::Image(_)) }])
}

struct Checker<'a> {
    profile: &'a Profile,
    checks: Checks,
    images: Vec<PromptImage>,
    /// Boxes are drawn for a painter and written for a reader.
    paints: bool,
    parts: usize,
    text_bytes: usize,
}

impl Checker<'_> {
    fn input(&mut self, input: Option<Input>) -> Option<llm_start::Input> {
        match input {
            Some(Input::Prompt(prompt)) => {
                Some(llm_start::Input::Prompt(self.prompt("prompt", prompt.parts)))
            }
            Some(Input::Chat(chat)) => Some(llm_start::Input::Chat(self.chat(chat))),
            None => {
                self.checks.wrong("input", "must be one of prompt and chat, got neither");
                None
            }
        }
    }

    fn chat(&mut self, chat: v1::Chat) -> LlmChat {
        if !self.profile.llm.instruct {
            self.checks.wrong("chat", "needs a model with a chat template, this one has none: send a prompt");
        }
        if self.paints {
            self.checks.wrong("chat", "cannot be painted from: send a prompt");
        }
        if chat.turns.len().is_multiple_of(2) {
            let got = chat.turns.len();
            self.checks
                .wrong("chat.turns", format!("must be odd in number, the user first and last, got {got}"));
        }
        let mut turns = Vec::with_capacity(chat.turns.len());
        for (index, turn) in chat.turns.into_iter().enumerate() {
            let field = format!("chat.turns[{index}]");
            let expected = if index % 2 == 0 { v1::Role::User } else { v1::Role::Assistant };
            if turn.role() != expected {
                let (expected, got) = (expected.as_str_name(), turn.role().as_str_name());
                self.checks.wrong(format!("{field}.role"), format!("must be {expected}, got {got}"));
            }
            turns.push(self.prompt(&field, turn.parts));
        }
        self.text_bytes += chat.system_message.as_ref().map_or(0, String::len);
        LlmChat { turns, system_message: chat.system_message }
    }

    fn prompt(&mut self, field: &str, parts: Vec<v1::Part>) -> LlmPrompt {
        if parts.is_empty() {
            self.checks.wrong(format!("{field}.parts"), "must hold at least 1 part, got 0");
        }
        self.parts += parts.len();
        let parts = parts.into_iter().enumerate();
        let parts = parts.filter_map(|(index, part)| self.part(format!("{field}.parts[{index}]"), part));
        LlmPrompt { parts: parts.collect() }
    }

    /// One part, and what it puts into slots.
    fn part(&mut self, field: String, part: v1::Part) -> Option<LlmPart> {
        let kind = match part.kind {
            Some(part::Kind::Text(text)) => {
                self.text_bytes += text.len();
                llm_part::Kind::Text(text)
            }
            Some(part::Kind::Image(image)) => {
                self.prompt_image(format!("{field}.image"), image.data, self.profile.llm.n_query);
                llm_part::Kind::Image(ImageSlot {})
            }
            Some(part::Kind::Video(video)) => llm_part::Kind::Video(self.video(&field, video)),
            Some(part::Kind::Box(region)) => llm_part::Kind::Box(self.region(field, region)),
            None => {
                self.checks.wrong(field, "must be one of text, image, video and box, got none");
                return None;
            }
        };
        Some(LlmPart { kind: Some(kind) })
    }

    fn video(&mut self, field: &str, video: v1::Video) -> VideoSlots {
        let frames = u32::try_from(video.frames.len()).unwrap_or(u32::MAX);
        if frames == 0 {
            self.checks.wrong(format!("{field}.video.frames"), "must hold at least 1 frame, got 0");
        }
        for (index, frame) in video.frames.into_iter().enumerate() {
            self.prompt_image(format!("{field}.video.frames[{index}]"), frame, self.profile.llm.v_query);
        }
        VideoSlots { frames }
    }

    fn region(&mut self, field: String, region: v1::Box) -> v1::Box {
        self.checks.extend(parameters::region(&format!("{field}.box"), &region));
        self.text_bytes += region.phrase.len();
        if self.paints {
            let n_query = self.profile.llm.n_query;
            self.images.push(PromptImage {
                subject: Subject::Box(region.clone()),
                n_query,
                field: format!("{field}.box"),
            });
        }
        region
    }

    fn prompt_image(&mut self, field: String, data: Bytes, n_query: u32) {
        self.checks.image(&field, &data);
        self.images.push(PromptImage { subject: Subject::Image(data), n_query, field });
    }

    fn counts(&mut self, limits: &LimitsConfig, input: Option<&llm_start::Input>) {
        let (parts, images, texts) = match input {
            Some(llm_start::Input::Chat(_)) => ("chat.turns.parts", "chat.turns.parts.image", "chat"),
            _ => ("prompt.parts", "prompt.parts.image", "prompt"),
        };
        self.checks.at_most(parts, "limits.max_parts", limits.max_parts, self.parts);
        self.checks.at_most(images, "limits.max_images", limits.max_images, self.images.len());
        let max_text_bytes = self.profile.llm.max_text_bytes;
        if self.text_bytes as u64 > max_text_bytes {
            let got = self.text_bytes;
            let rule =
                format!("must hold at most {max_text_bytes} bytes of text (max_text_bytes), got {got}");
            self.checks.wrong(texts, rule);
        }
    }

    fn text(&mut self, asked: &TextOutput) -> TextOutput {
        let llm = &self.profile.llm;
        if asked.grounding && !llm.instruct {
            self.checks.wrong("text.grounding", "needs a model with a chat template, this one has none");
        }
        let (text, violations) = parameters::text(asked, &llm.parameter_limits);
        self.checks.extend(violations);
        text
    }

    fn image(&mut self, asked: &ImageOutput) -> DecodeStart {
        let Some(decoder) = &self.profile.decoder else {
            self.checks.wrong("image", "needs a model with an image decoder, this one has none");
            return DecodeStart::default();
        };
        let (image, violations) = parameters::image(asked, &decoder.parameter_limits);
        self.checks.extend(violations);
        DecodeStart { image: Some(image), ..DecodeStart::default() }
    }
}
