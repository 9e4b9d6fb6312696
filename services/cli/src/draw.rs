//! `emu2 draw`: paints a picture.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use emu2_client::Client;
use emu2_proto::v1::{
    self, Capability,
    generate_request::{Input, Output},
};

use crate::{
    args::{Draw, ImageArgs},
    parts,
    show::{Answer, follow, timings},
};

pub async fn draw(args: Draw) -> Result<()> {
    let words = parts::from_words(&args.parts)?;
    let images = args.images.iter().map(|path| parts::image(path)).collect::<Result<_>>()?;
    let prompt = v1::Prompt { parts: parts::for_drawing(words, images, &args.boxes)? };
    let mut client = Client::connect(&args.target.server).await?;
    let model = client.pick(args.target.model.as_deref(), Capability::Image).await?;
    let request = v1::GenerateRequest {
        model,
        input: Some(Input::Prompt(prompt)),
        output: Some(Output::Image(image_output(&args.image))),
        seed: args.target.seed,
        ..Default::default()
    };
    let answer = follow(client.generate(request).await?, false).await?;
    save(&answer, &args.output)?;
    eprintln!("{} seed {}, {}", args.output.display(), answer.finished.seed, timings(&answer.finished));
    Ok(())
}

/// Writes the painted picture.
pub fn save(answer: &Answer, path: &Path) -> Result<()> {
    let image = answer.image.as_ref().context("the answer holds no picture")?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::write(path, &image.png).with_context(|| path.display().to_string())
}

fn image_output(args: &ImageArgs) -> v1::ImageOutput {
    v1::ImageOutput {
        height: args.height,
        width: args.width,
        steps: args.steps,
        guidance_scale: args.guidance,
        ..Default::default()
    }
}
