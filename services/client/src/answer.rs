//! Follows the events of a request to its answer: text as it comes, progress bars for long work.

use std::{
    fs,
    io::{IsTerminal, Write},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use emu2_proto::v1::{self, generate_event::Event};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tonic::Streaming;

use crate::{client::explain, image::ChunkedPng};

/// The answer to a finished request.
#[derive(Debug, Default)]
pub struct Answer {
    /// The generated text; empty where an image was asked for.
    pub text: String,
    /// The generated image; none where text was asked for.
    pub image: Option<v1::ImageResult>,
    /// The request's last event: reason, usage, timings, seed.
    pub finished: v1::Finished,
}

impl Answer {
    /// Writes the generated image to a PNG file, and makes the folder that the file lies in.
    ///
    /// # Errors
    ///
    /// The answer has no image, or the file cannot be written.
    pub fn save_image(&self, path: &Path) -> Result<()> {
        let image = self.image.as_ref().context("the answer has no image")?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::write(path, &image.png).with_context(|| path.display().to_string())
    }

    /// Words in one line how long the request took, and where that time went.
    pub fn timings(&self) -> String {
        timings(&self.finished)
    }
}

/// Follows a request to its end, with progress on standard error; returns its answer. With `echo`, text is printed on
/// standard output as it comes.
///
/// # Errors
///
/// The request failed, or its stream ended before the answer was finished.
pub async fn follow(mut events: Streaming<v1::GenerateEvent>, echo: bool) -> Result<Answer> {
    let mut answer = Answer::default();
    let (mut progress, mut png) = (Progress::new(), ChunkedPng::default());
    while let Some(event) = events.message().await.map_err(explain)? {
        match event.event {
            Some(Event::TextDelta(delta)) => {
                progress.clear();
                if echo {
                    print!("{}", delta.text);
                    std::io::stdout().flush().context("standard output")?;
                }
                answer.text += &delta.text;
            }
            Some(Event::EmbeddingProgress(at)) => progress.advance("embeddings", at.done, at.total),
            Some(Event::DenoiseProgress(at)) => progress.advance("denoising", at.step, at.steps),
            Some(Event::ImageChunk(chunk)) => png.push(&chunk)?,
            Some(Event::Image(image)) => answer.image = Some(png.finish(image)),
            Some(Event::Finished(finished)) => {
                progress.clear();
                answer.finished = finished;
                return Ok(answer);
            }
            // A newer router may say more than this client knows.
            Some(Event::Accepted(_)) | None => {}
        }
    }
    bail!("the stream ended before the answer was finished")
}

fn timings(finished: &v1::Finished) -> String {
    let timings = finished.timings.unwrap_or_default();
    let stages = [
        ("encode", timings.encode_ms),
        ("llm queue", timings.llm_queue_ms),
        ("prefill", timings.prefill_ms),
        ("generate", timings.generate_ms),
        ("decoder queue", timings.decoder_queue_ms),
        ("denoise", timings.denoise_ms),
        ("vae", timings.vae_ms),
    ];
    let spent = stages.iter().filter(|(_, ms)| *ms >= 0.05).map(|(stage, ms)| format!("{stage} {ms:.1} ms"));
    let spent: Vec<_> = spent.collect();
    format!("{:.0} ms ({})", timings.total_ms, spent.join(", "))
}

/// The progress bar of the stage that is running; where standard error is no terminal, a line for every tenth.
struct Progress {
    stage: &'static str,
    bar: ProgressBar,
    tenths: u32,
}

impl Progress {
    fn new() -> Self {
        Self { stage: "", bar: ProgressBar::hidden(), tenths: 0 }
    }

    fn advance(&mut self, stage: &'static str, done: u32, total: u32) {
        if self.stage != stage {
            self.clear();
            *self = Self { stage, bar: bar(stage, total), tenths: 0 };
        }
        self.bar.set_position(done.into());
        let tenths = done * 10 / total.max(1);
        if self.bar.is_hidden() && tenths > self.tenths {
            eprintln!("{stage} {done}/{total}");
        }
        self.tenths = tenths;
    }

    fn clear(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn bar(stage: &'static str, total: u32) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total.into()), target).with_prefix(stage);
    let style = ProgressStyle::with_template("{prefix:>12} {bar:40} {pos}/{len} {per_sec} eta {eta}");
    bar.set_style(style.expect("the template is well formed"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
