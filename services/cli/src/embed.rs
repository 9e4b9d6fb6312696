//! `emu2 embed`: the visual encoder's embeddings of an image.

use std::fs;

use anyhow::{Context, Result};
use emu2_client::{Client, parts::image};
use emu2_proto::{
    array::{Array, Dtype},
    v1::{self, Capability},
};
use safetensors::tensor::TensorView;

use crate::args::Embed;

pub(crate) async fn embed(args: Embed) -> Result<()> {
    let image = image(&args.image)?;
    let mut client = Client::connect(&args.router).await?;
    let model = client.pick(args.model.as_deref(), Capability::Embed).await?;
    let response = client
        .embed(v1::EmbedRequest { model, image: Some(image), n_query: args.n_query, ..Default::default() })
        .await?;
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
