//! The same weights in another published layout are the same model: digests, answers and images of a running
//! cluster do not tell them apart.

use std::path::PathBuf;

use emu2_nn::golden;
use emu2_proto::v1;
use emu2_standalone::cluster::ClusterConfig;

use crate::support::{answer, ask, client, draw, golden_png, greedy, image, painted, shared, start, text};

/// Hugging Face's copy of Emu2 and the diffusers folder of Emu2-Gen: the official ones where they are, else the same
/// made of the native files.
fn published(folder: &std::path::Path) -> Vec<PathBuf> {
    ["Emu2", "Emu2-Gen"]
        .map(|name| {
            if let Some(official) = golden::shared(&format!("hf/{name}")).filter(|dir| has_tokenizer(dir)) {
                return official;
            }
            let made = folder.join(name);
            std::fs::create_dir(&made).unwrap();
            match name {
                "Emu2" => golden::hugging_face("emu2-base", &made),
                _ => golden::diffusers(&made),
            }
            made
        })
        .to_vec()
}

/// The golden set's Hugging Face copy of Emu2 leaves its tokenizer out.
fn has_tokenizer(dir: &std::path::Path) -> bool {
    dir.join("tokenizer.model").exists() || dir.join("tokenizer/tokenizer.model").exists()
}

#[tokio::test]
async fn published_layouts_serve_the_same_models() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(ClusterConfig::local(published(folder.path()))).await;
    let (mut native, mut other) = (shared().client().await, client(cluster.addr).await);

    let digests = |models: v1::ListModelsResponse| {
        let mut digests: Vec<_> = models
            .models
            .into_iter()
            .filter(|model| model.name != "emu2-chat")
            .map(|model| (model.name, model.encoder_digest, model.llm_digest, model.decoder_digest))
            .collect();
        digests.sort();
        digests
    };
    let models = v1::ListModelsRequest {};
    let want = digests(native.list_models(models).await.unwrap().into_inner());
    assert_eq!(want.len(), 2);
    assert_eq!(digests(other.list_models(models).await.unwrap().into_inner()), want);

    let asked = || {
        let parts = vec![image(golden_png(0)), text("[red, white, 3, bottom left]."), image(golden_png(1))];
        ask("emu2", parts, greedy(24))
    };
    let want = answer(&mut native, asked()).await.unwrap();
    assert!(!want.is_empty());
    assert_eq!(answer(&mut other, asked()).await.unwrap(), want);

    let asked = || {
        let output = v1::ImageOutput { steps: Some(4), ..Default::default() };
        draw(vec![image(golden_png(0)), text("on the beach")], output)
    };
    let (want, got) =
        (painted(&mut native, asked()).await.unwrap(), painted(&mut other, asked()).await.unwrap());
    let worst = want.iter().zip(got.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    // Other tests' requests share the native cluster's batches, which rounds differently.
    assert!(worst <= 1, "a value differs by {worst}");
    cluster.stop().await.unwrap();
}

/// Weights out of a seed go through every stage: what full sizes are measured with.
#[tokio::test]
async fn random_weights_answer_and_paint() {
    let cluster = start(ClusterConfig::local(vec!["random:emu2-tiny,seed=3".into()])).await;
    let mut api = client(cluster.addr).await;
    let model = api.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models.remove(0).name;
    let parts = vec![image(golden_png(0)), text("What is this?")];
    answer(&mut api, ask(&model, parts, greedy(4))).await.unwrap();
    let output = v1::ImageOutput { steps: Some(2), height: Some(64), width: Some(64), ..Default::default() };
    let image =
        painted(&mut api, v1::GenerateRequest { model, ..draw(vec![text("a dog")], output) }).await.unwrap();
    assert_eq!(image.dimensions(), (64, 64));
    cluster.stop().await.unwrap();
}
