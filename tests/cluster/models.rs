//! Several models in one cluster: what they share, and what each refuses.

use std::path::Path;

use emu2_nn::golden;
use emu2_proto::v1::{self, Capability, generate_request::Input};
use emu2_standalone::{
    cluster::{Cluster, ClusterConfig, StageEndpoint},
    plan::ModelSource,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::support::{
    answer, ask, client, draw, events, finished, fresh_png, greedy, image, painted, start, text, video,
};

type Client = v1::emu2_client::Emu2Client<Channel>;

/// Emu2-Gen; the chat model with Emu2-Gen's visual encoder, as published models have it; and the base model with
/// its own.
fn three_models(folder: &Path) -> ClusterConfig {
    golden::with_visual_of("emu2-chat", "emu2-gen", folder);
    let dirs = [golden::model_dir("emu2-gen"), folder.to_owned(), golden::model_dir("emu2-base")];
    ClusterConfig::local(dirs.to_vec())
}

async fn embed(client: &mut Client, model: &str, png: &[u8]) -> v1::EmbedResponse {
    let image = Some(v1::Image { data: png.to_vec().into() });
    let request = v1::EmbedRequest { model: model.to_owned(), image, n_query: None, ..Default::default() };
    client.embed(request).await.unwrap().into_inner()
}

fn addr(stages: &[StageEndpoint], model: &str, stage: &str) -> std::net::SocketAddr {
    stages.iter().find(|member| member.model == model && member.stage == stage).unwrap().addr
}

#[tokio::test]
async fn models_with_the_same_visual_weights_share_an_encoder_and_what_it_made() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(three_models(folder.path())).await;
    let mut client = client(cluster.addr).await;
    let encoder = |model| addr(&cluster.stages, model, "encoder");
    assert_eq!(encoder("emu2-chat"), encoder("emu2-gen"));
    assert_ne!(encoder("emu2"), encoder("emu2-gen"));
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let row = |name: &str| {
        let model = models.iter().find(|model| model.name == name).unwrap();
        (model.n_query, model.v_query, model.encoder_digest.clone(), model.capabilities().collect::<Vec<_>>())
    };
    let (gen_row, chat, base) = (row("emu2-gen"), row("emu2-chat"), row("emu2"));
    assert_eq!((chat.2 == gen_row.2, base.2 == gen_row.2), (true, false));
    assert_eq!((gen_row.0, gen_row.1), (16, 16));
    assert_eq!((chat.0, chat.1), (16, 4));
    assert_eq!((base.0, base.1), (4, 4));
    assert_eq!(gen_row.3, [Capability::Embed, Capability::Text, Capability::Image]);
    assert_eq!(chat.3, [Capability::Embed, Capability::Text, Capability::Chat]);
    assert_eq!(base.3, [Capability::Embed, Capability::Text]);

    // What was encoded for one is not encoded again for the other, whichever call asks.
    let png = fresh_png(90);
    let first = embed(&mut client, "emu2-gen", &png).await;
    let second = embed(&mut client, "emu2-chat", &png).await;
    assert_eq!((first.cached, second.cached), (false, true));
    assert_eq!(first.embeddings, second.embeddings);
    let other = embed(&mut client, "emu2", &png).await;
    assert!(!other.cached && other.weights_digest != first.weights_digest);
    let request = ask("emu2-chat", vec![image(png.clone()), text("What is this?")], greedy(1));
    let usage = finished(&events(&mut client, request).await.unwrap()).usage.unwrap();
    assert_eq!((usage.images, usage.cached_images), (1, 1));
    // A frame takes fewer embeddings of the same image: another value of the same encoder.
    let request = ask("emu2-chat", vec![video([png]), text("What is this?")], greedy(1));
    let usage = finished(&events(&mut client, request).await.unwrap()).usage.unwrap();
    assert_eq!((usage.images, usage.cached_images), (1, 0));
    let output = v1::ImageOutput { steps: Some(2), ..Default::default() };
    assert_eq!(painted(&mut client, draw(vec![text("a dog")], output)).await.unwrap().dimensions(), (64, 64));
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn names_of_one_folder_share_every_stage() {
    let source = |name: &str| ModelSource {
        name: Some(name.to_owned()),
        ..ModelSource::new(golden::model_dir("emu2-gen"), &["cpu".to_owned()])
    };
    let models = vec![source("one"), source("other")];
    let cluster = start(ClusterConfig { models, ..ClusterConfig::local(vec![]) }).await;
    for stage in ["encoder", "llm", "decoder"] {
        assert_eq!(addr(&cluster.stages, "one", stage), addr(&cluster.stages, "other", stage));
    }
    let mut client = client(cluster.addr).await;
    for model in ["one", "other"] {
        answer(&mut client, ask(model, vec![text("hello")], greedy(1))).await.unwrap();
    }
    cluster.stop().await.unwrap();
}

fn refused(status: &Status) -> (Code, String) {
    let violations = status.get_details_bad_request().unwrap().field_violations;
    let said: Vec<_> = violations.iter().map(|it| format!("{} {}", it.field, it.description)).collect();
    (status.code(), said.join("; "))
}

#[tokio::test]
async fn what_a_model_cannot_do_is_refused_with_the_reason() {
    let mut client = crate::support::shared().client().await;
    let paint = |model: &str| v1::GenerateRequest {
        model: model.to_owned(),
        ..draw(vec![text("a dog")], v1::ImageOutput::default())
    };
    let chat = |model: &str| {
        let turns = vec![v1::Turn { role: v1::Role::User.into(), parts: vec![text("hello")] }];
        let chat = v1::Chat { turns, system_message: None };
        v1::GenerateRequest { input: Some(Input::Chat(chat)), ..ask(model, vec![], greedy(1)) }
    };
    let grounding = v1::TextOutput { grounding: true, ..greedy(1) };
    let no_decoder = "image needs a model with an image decoder, this one has none";
    let no_template = "chat needs a model with a chat template, this one has none: send a prompt";
    for (request, reason) in [
        (paint("emu2"), no_decoder),
        (paint("emu2-chat"), no_decoder),
        (chat("emu2"), no_template),
        (chat("emu2-gen"), no_template),
        (
            ask("emu2-gen", vec![text("x")], grounding),
            "text.grounding needs a model with a chat template, this one has none",
        ),
    ] {
        let status = answer(&mut client, request).await.unwrap_err();
        assert_eq!(refused(&status), (Code::InvalidArgument, reason.to_owned()));
    }
    // Pooling for 8 would give 16.
    let image = Some(v1::Image { data: fresh_png(91).into() });
    let embed = v1::EmbedRequest { model: "emu2".to_owned(), image, n_query: Some(8), ..Default::default() };
    let status = client.embed(embed).await.unwrap_err();
    let reason = "n_query must be what pooling 4 x 4 patches can leave (1, 4, 16), got 8";
    assert_eq!(refused(&status), (Code::InvalidArgument, reason.to_owned()));
}

#[tokio::test]
async fn a_cluster_that_cannot_be_is_refused_before_it_starts() {
    let (base, drawing) = (golden::model_dir("emu2-base"), golden::model_dir("emu2-gen"));
    let parts = tempfile::tempdir().unwrap();
    golden::diffusers(parts.path());
    std::fs::remove_dir_all(parts.path().join("multimodal_encoder")).unwrap();
    let on = |dir: &Path, devices: &[&str]| {
        let devices: Vec<_> = devices.iter().map(|&device| device.to_owned()).collect();
        ModelSource::new(dir.to_owned(), &devices)
    };
    let named = |dir: &Path, name: &str| ModelSource { name: Some(name.to_owned()), ..on(dir, &["cpu"]) };
    for (models, problem) in [
        (vec![on(&base, &["cpu"]), on(&base, &["cpu"])], "two models are called `emu2` ("),
        (vec![named(&base, "x"), named(&drawing, "x")], "two models are called `x` ("),
        (vec![on(parts.path(), &["cpu"])], "holds no visual encoder: a cluster serves folders with"),
        (vec![on(&base, &["gpu"])], "device must be `cpu` or `cuda:N`, got `gpu`"),
        (vec![on(&base, &[])], "no device is named"),
        (vec![on(Path::new("/nonexistent"), &["cpu"])], "/nonexistent"),
        (vec![named(&base, "")], "a name is empty"),
        (vec![], "models must name at least one model"),
    ] {
        let config = ClusterConfig { models, ..ClusterConfig::local(vec![]) };
        let error = format!("{:#}", Cluster::start(config).await.unwrap_err());
        assert!(error.contains(problem), "{problem} not in {error}");
    }
}
