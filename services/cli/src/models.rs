//! `emu2 models`: the models that a cluster serves, and its limits.

use anyhow::Result;
use emu2_client::{Client, RouterArgs};
use emu2_proto::v1::Capability;

pub(crate) async fn models(router: RouterArgs) -> Result<()> {
    let mut client = Client::connect(&router).await?;
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
            println!("  images      {} × {} unless asked", model.default_height, model.default_width);
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
                "  limits      {} MiB a message, {} parts, {} images of {} megapixels, {} new tokens, {} beams",
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
