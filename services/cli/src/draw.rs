//! `emu2 draw`: generates an image.

use anyhow::Result;
use emu2_client::{Client, follow, parts::image_part};
use emu2_proto::v1::{
    self, Capability,
    generate_request::{Input, Output},
};

use crate::{
    args::{Draw, ImageArgs},
    parts::{for_drawing, from_words},
};

pub(crate) async fn draw(args: Draw) -> Result<()> {
    let words = from_words(&args.parts)?;
    let images = args.images.iter().map(|path| image_part(path)).collect::<Result<_>>()?;
    let prompt = v1::Prompt { parts: for_drawing(words, images, &args.boxes)? };
    let mut client = Client::connect(&args.target.router).await?;
    let model = client.pick(args.target.model.as_deref(), Capability::Image).await?;
    let request = v1::GenerateRequest {
        model,
        input: Some(Input::Prompt(prompt)),
        output: Some(Output::Image(image_output(&args.image))),
        seed: args.target.seed,
        ..Default::default()
    };
    let answer = follow(client.generate(request).await?, false).await?;
    answer.save_image(&args.output)?;
    eprintln!("{} seed {}, {}", args.output.display(), answer.finished.seed, answer.timings());
    Ok(())
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
