//! What the tests share: a cluster of the three tiny models, and words to talk to it.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::{OnceLock, mpsc},
    time::Duration,
};

use emu2_nn::golden;
use emu2_proto::{
    stage::{
        language_model_client::LanguageModelClient, visual_decoder_client::VisualDecoderClient,
        visual_encoder_client::VisualEncoderClient,
    },
    v1::{self, emu2_client::Emu2Client, generate_event::Event, generate_request, part::Kind},
};
use emu2_standalone::cluster::{Cluster, ClusterConfig};
use tch::Tensor;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// A cluster that lives as long as the test binary.
pub(crate) struct Shared {
    pub(crate) addr: SocketAddr,
    pub(crate) stages: Vec<emu2_standalone::cluster::StageEndpoint>,
}

/// The three tiny models in one cluster, started once; every test's runtime may talk to it.
pub(crate) fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        let (ready, started) = mpsc::sync_channel(1);
        // A thread of its own: a test's runtime ends with the test.
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut cluster = start(ClusterConfig::local(model_dirs())).await;
                ready.send(Shared { addr: cluster.addr, stages: cluster.stages.clone() }).unwrap();
                cluster.failed().await.expect("the shared cluster keeps running");
            });
        });
        started.recv().expect("the shared cluster starts")
    })
}

/// A ready cluster of the test's own.
pub(crate) async fn start(config: ClusterConfig) -> Cluster {
    let mut cluster = Cluster::start(config).await.unwrap();
    tokio::time::timeout(Duration::from_secs(120), cluster.ready()).await.expect("ready in time").unwrap();
    cluster
}

pub(crate) fn model_dirs() -> Vec<PathBuf> {
    ["emu2-base", "emu2-chat", "emu2-gen"].map(golden::model_dir).to_vec()
}

impl Shared {
    pub(crate) async fn client(&self) -> Emu2Client<Channel> {
        client(self.addr).await
    }

    pub(crate) async fn encoder(&self, model: &str) -> VisualEncoderClient<Channel> {
        VisualEncoderClient::new(self.channel(model, "encoder").await)
    }

    pub(crate) async fn llm(&self, model: &str) -> LanguageModelClient<Channel> {
        LanguageModelClient::new(self.channel(model, "llm").await)
    }

    pub(crate) async fn decoder(&self, model: &str) -> VisualDecoderClient<Channel> {
        VisualDecoderClient::new(self.channel(model, "decoder").await)
    }

    async fn channel(&self, model: &str, stage: &str) -> Channel {
        let member = self.stages.iter().find(|member| member.model == model && member.stage == stage);
        channel(member.unwrap_or_else(|| panic!("{model} has no {stage}")).addr).await
    }
}

pub(crate) async fn channel(addr: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap()
}

/// An admin page: its status line, headers and body.
pub(crate) async fn admin_page(admin: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(crate) async fn client(addr: SocketAddr) -> Emu2Client<Channel> {
    let large = 128 << 20;
    Emu2Client::new(channel(addr).await).max_decoding_message_size(large).max_encoding_message_size(large)
}

/// `img0` or `img1` of the golden set as a PNG of its decoded pixels.
pub(crate) fn golden_png(index: usize) -> Vec<u8> {
    let rgb = golden::file("preprocess.safetensors").tensor(&format!("img{index}.rgb_u8"));
    png(&rgb)
}

/// [height, width_px, 3] of u8 -> PNG
pub(crate) fn png(rgb: &Tensor) -> Vec<u8> {
    let (height, width, _) = rgb.size3().unwrap();
    let pixels = Vec::<u8>::try_from(rgb.contiguous().view(-1)).unwrap();
    rgb_png(width as u32, height as u32, pixels)
}

/// Rows of red, green and blue bytes -> PNG
pub(crate) fn rgb_png(width: u32, height: u32, pixels: Vec<u8>) -> Vec<u8> {
    let image = image::RgbImage::from_raw(width, height, pixels).unwrap();
    let mut png = std::io::Cursor::new(Vec::new());
    image.write_to(&mut png, image::ImageFormat::Png).unwrap();
    png.into_inner()
}

pub(crate) fn text(text: &str) -> v1::Part {
    v1::Part { kind: Some(Kind::Text(text.to_owned())) }
}

pub(crate) fn image(data: impl Into<Vec<u8>>) -> v1::Part {
    v1::Part { kind: Some(Kind::Image(v1::Image { data: data.into().into() })) }
}

pub(crate) fn video(frames: impl IntoIterator<Item = Vec<u8>>) -> v1::Part {
    let frames = frames.into_iter().map(Into::into).collect();
    v1::Part { kind: Some(Kind::Video(v1::Video { frames })) }
}

/// A small image that no other test sends: its pixels are `seed`'s.
pub(crate) fn fresh_png(seed: u8) -> Vec<u8> {
    let (width, height) = (20, 16);
    let pixel =
        |at: u32| [seed, (at % width * 12) as u8, ((at / width) as u8).wrapping_mul(seed.wrapping_add(3))];
    rgb_png(width, height, (0..width * height).flat_map(pixel).collect())
}

pub(crate) fn ask(model: &str, parts: Vec<v1::Part>, output: v1::TextOutput) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: model.to_owned(),
        input: Some(generate_request::Input::Prompt(v1::Prompt { parts })),
        output: Some(generate_request::Output::Text(output)),
        seed: None,
        ..Default::default()
    }
}

pub(crate) fn draw(parts: Vec<v1::Part>, output: v1::ImageOutput) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "emu2-gen".to_owned(),
        input: Some(generate_request::Input::Prompt(v1::Prompt { parts })),
        output: Some(generate_request::Output::Image(output)),
        seed: Some(1),
        ..Default::default()
    }
}

pub(crate) fn greedy(max_new_tokens: u32) -> v1::TextOutput {
    v1::TextOutput { num_beams: Some(1), max_new_tokens: Some(max_new_tokens), ..Default::default() }
}

/// Every event of a request that ends well.
pub(crate) async fn events(
    client: &mut Emu2Client<Channel>,
    request: v1::GenerateRequest,
) -> Result<Vec<Event>, Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.push(event.event.expect("every event says something"));
    }
    Ok(events)
}

pub(crate) async fn answer(
    client: &mut Emu2Client<Channel>,
    request: v1::GenerateRequest,
) -> Result<String, Status> {
    let deltas = events(client, request).await?.into_iter().filter_map(|event| match event {
        Event::TextDelta(delta) => Some(delta.text),
        _ => None,
    });
    Ok(deltas.collect())
}

pub(crate) async fn painted(
    client: &mut Emu2Client<Channel>,
    request: v1::GenerateRequest,
) -> Result<image::RgbImage, Status> {
    let events = events(client, request).await?;
    let png = events.iter().find_map(|event| match event {
        Event::Image(image) => Some(image.png.clone()),
        _ => None,
    });
    Ok(decode(&png.expect("an image event")))
}

pub(crate) fn decode(png: &[u8]) -> image::RgbImage {
    image::load_from_memory_with_format(png, image::ImageFormat::Png).unwrap().into_rgb8()
}

pub(crate) fn finished(events: &[Event]) -> &v1::Finished {
    match events.last() {
        Some(Event::Finished(finished)) => finished,
        other => panic!("the last event must be `finished`, is {other:?}"),
    }
}

/// A service binary beside this test's, built by `cargo build --workspace --bins`.
pub(crate) fn binary(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(|deps| deps.parent()).unwrap().join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace --bins`, or `make test`",
        path.display()
    );
    Command::new(path)
}
