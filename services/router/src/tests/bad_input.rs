//! Bad requests over the wire: the right code, the field by name, nothing sent to a stage, and service as before.

use emu2_proto::v1::{
    EmbedRequest, GenerateRequest, Image, ImageOutput, Part, TextOutput, Video, generate_request::Output,
    part::Kind,
};
use tonic::Code;
use tonic_types::StatusExt;

use super::sandbox::{Sandbox, ask, image, paint, refusal, text};

fn with_text(output: TextOutput) -> GenerateRequest {
    GenerateRequest { output: Some(Output::Text(output)), ..ask(vec![text("a")]) }
}

fn with_image(output: ImageOutput) -> GenerateRequest {
    GenerateRequest { output: Some(Output::Image(output)), ..paint(vec![text("a")], 1.0) }
}

#[tokio::test]
async fn every_mistake_is_refused_by_field() {
    let sandbox = Sandbox::start().await;
    let no_frames = Part { kind: Some(Kind::Video(Video { frames: vec![] })) };
    let cases = [
        (ask(vec![]), "prompt.parts"),
        (ask(vec![image("1"); 500]), "prompt.parts.image"),
        (ask(vec![text("a"); 601]), "prompt.parts"),
        (ask(vec![image("")]), "prompt.parts[0].image"),
        (ask(vec![no_frames]), "prompt.parts[0].video.frames"),
        (ask(vec![Part { kind: None }]), "prompt.parts[0]"),
        (GenerateRequest { input: None, ..ask(vec![]) }, "input"),
        (GenerateRequest { output: None, ..ask(vec![text("a")]) }, "output"),
        (GenerateRequest { model: "emu2".into(), ..paint(vec![text("a")], 1.0) }, "image"),
        (with_text(TextOutput { max_new_tokens: Some(101), ..Default::default() }), "text.max_new_tokens"),
        (with_text(TextOutput { temperature: Some(f32::NAN), ..Default::default() }), "text.temperature"),
        (with_image(ImageOutput { steps: Some(0), ..Default::default() }), "image.steps"),
        (with_image(ImageOutput { steps: Some(10_000), ..Default::default() }), "image.steps"),
        (
            with_image(ImageOutput { guidance_scale: Some(f32::NAN), ..Default::default() }),
            "image.guidance_scale",
        ),
        (with_image(ImageOutput { height: Some(63), ..Default::default() }), "image.height"),
    ];
    for (request, field) in cases {
        let refused = sandbox.events(request).await.unwrap_err();
        assert_eq!(refusal(&refused), (Code::InvalidArgument, vec![field.to_owned()]), "{refused:?}");
        assert!(refused.message().starts_with(field), "{}", refused.message());
    }
    assert_eq!((sandbox.encoder.calls(), sandbox.llm.calls(), sandbox.decoder.calls()), (0, 0, 0));
    sandbox.events(ask(vec![text("still here?")])).await.unwrap();
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let sandbox = Sandbox::start().await;
    let unknown = GenerateRequest { model: "emu3".into(), ..ask(vec![text("a")]) };
    let refused = sandbox.events(unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let resource = refused.get_details_resource_info().unwrap();
    assert_eq!((resource.resource_type.as_str(), resource.resource_name.as_str()), ("model", "emu3"));
    let embed = EmbedRequest {
        model: "emu3".into(),
        image: Some(Image { data: "1".into() }),
        n_query: None,
        ..Default::default()
    };
    assert_eq!(sandbox.client().embed(embed).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_bad_embed_request_is_refused_by_field() {
    let sandbox = Sandbox::start().await;
    let embed = EmbedRequest { model: "emu2".into(), image: None, n_query: Some(17), ..Default::default() };
    let refused = sandbox.client().embed(embed).await.unwrap_err();
    assert_eq!(refusal(&refused), (Code::InvalidArgument, vec!["image".to_owned(), "n_query".to_owned()]));
}

#[tokio::test]
async fn a_message_over_the_limit_says_the_limit() {
    let sandbox = Sandbox::with(|config| config.server.max_message_bytes = 4096).await;
    let refused = sandbox.events(ask(vec![image(vec![0; 5000])])).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("4096"), "{}", refused.message());
}
