//! `emu2 embed` and `emu2 models`: what a cluster sees, and what it can do.

use std::fs;

use anyhow::{Context, Result};
use emu2_proto::{
    array::{Array, Dtype},
    v1::{self, Capability, part::Kind},
};
use safetensors::tensor::TensorView;

use crate::{
    args::{Embed, Server},
    client::Client,
    parts,
};

pub async fn embed(args: Embed) -> Result<()> {
    let Some(Kind::Image(image)) = parts::image(&args.image)?.kind else { unreachable!("an image part") };
    let mut client = Client::connect(&args.server).await?;
    let model = client.pick(args.model.as_deref(), Capability::Embed).await?;
    let response =
        client.embed(v1::EmbedRequest { model, image: Some(image), n_query: args.n_query }).await?;
    let embeddings = Array::try_from(response.embeddings)?;
    let (mut least, mut most) = (f32::INFINITY, f32::NEG_INFINITY);
    for value in embeddings.values() {
        (least, most) = (least.min(value), most.max(value));
    }
    let dtype = embeddings.dtype().name();
    println!("embeddings {:?} {dtype}, {least:.4} to {most:.4}", embeddings.shape());
    println!("weights    {}", response.weights_digest);
    println!("cached     {}", response.cached);
    if let Some(path) = args.output {
        let dtype = match embeddings.dtype() {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        };
        let view = TensorView::new(dtype, embeddings.shape().to_vec(), embeddings.data())?;
        let file = safetensors::serialize([("embeddings", view)], None)?;
        fs::write(&path, file).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

pub async fn models(server: Server) -> Result<()> {
    let mut client = Client::connect(&server).await?;
    for model in client.models().await? {
        let can: Vec<_> = model.capabilities().map(capability_name).collect();
        let ready = if model.ready { "ready" } else { "not ready" };
        println!("{} ({ready}): {}", model.name, can.join(", "));
        println!(
            "  embeddings  {} an image, {} a frame, {} wide",
            model.n_query, model.v_query, model.embedding_width
        );
        println!("  positions   {}", model.max_positions);
        if model.default_height > 0 {
            println!("  paints      {} × {} unless asked", model.default_height, model.default_width);
        }
        for (stage, digest) in [
            ("encoder", &model.encoder_digest),
            ("llm", &model.llm_digest),
            ("decoder", &model.decoder_digest),
        ] {
            if !digest.is_empty() {
                println!("  {stage:<10}  {digest}");
            }
        }
        if let Some(limits) = model.limits {
            println!(
                "  limits      {} MiB a message, {} parts, {} pictures of {} megapixels, {} new tokens, {} beams",
                limits.max_message_bytes >> 20,
                limits.max_parts,
                limits.max_images,
                limits.max_image_pixels / 1_000_000,
                limits.max_new_tokens,
                limits.max_beams
            );
            if model.default_height > 0 {
                println!("              {} steps, sides of {}", limits.max_steps, limits.max_image_side);
            }
        }
    }
    Ok(())
}

fn capability_name(capability: Capability) -> &'static str {
    match capability {
        Capability::Unspecified => "something newer",
        Capability::Embed => "embed",
        Capability::Text => "text",
        Capability::Chat => "chat",
        Capability::Image => "image",
    }
}
