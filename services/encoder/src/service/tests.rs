//! The service over a real loopback server, with golden-a's tiny model.

use std::time::Duration;

use emu2_nn::{
    array,
    golden::{self, assert_close, forward_tolerance},
};
use emu2_proto::{
    array::Array,
    stage::{MeanColour, visual_encoder_client::VisualEncoderClient},
};
use emu2_serve::{
    client,
    server::{Listeners, ServerConfig},
    shutdown::Shutdown,
};
use tch::{Device, Kind, Tensor};
use tokio::task::JoinHandle;
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt;

use super::*;
use crate::{
    preprocess::{decode::Rgb, outline},
    tests::fixtures,
};

const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    client: VisualEncoderClient<Channel>,
    shutdown: Shutdown,
    served: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(config: Config) -> Self {
        let config = Config {
            model_dir: golden::model_dir("emu2-base"),
            cores: 1,
            server: ServerConfig { admin: None, ..ServerConfig::on_port(0) },
            ..config
        };
        let listeners = Listeners::bind(&config.server).await.unwrap();
        let endpoint = client::endpoint(format!("http://{}", listeners.grpc_addr())).unwrap();
        let shutdown = Shutdown::new();
        let served = tokio::spawn(crate::run(config, listeners, shutdown.clone()));
        let mut client = VisualEncoderClient::new(endpoint.connect_lazy());
        let ready = async {
            while client.info(EncoderInfoRequest {}).await.is_err() {
                assert!(!served.is_finished());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("the service becomes ready");
        Self { client, shutdown, served }
    }

    async fn encode(&self, request: EncodeRequest) -> Result<EncodeResponse, Status> {
        let mut client = self.client.clone();
        let mut answers = client.encode(futures::stream::iter([request])).await?.into_inner();
        let answer = answers.message().await?.expect("one answer");
        assert_eq!(answers.message().await?, None, "and no other");
        Ok(answer)
    }

    /// The answers of calls at the same time, in the order of the requests.
    async fn encode_all(&self, requests: Vec<EncodeRequest>) -> Result<Vec<EncodeResponse>, Status> {
        futures::future::try_join_all(requests.into_iter().map(|request| self.encode(request))).await
    }

    async fn assert_healthy(&self) {
        self.encode(mean_colour(4)).await.unwrap();
    }

    async fn stop(self) {
        self.shutdown.begin();
        tokio::time::timeout(PATIENCE, self.served).await.unwrap().unwrap().unwrap();
    }
}

fn image(encoded: Vec<u8>, n_query: u32) -> EncodeRequest {
    EncodeRequest { source: Some(Source::Image(encoded.into())), n_query }
}

fn mean_colour(n_query: u32) -> EncodeRequest {
    EncodeRequest { source: Some(Source::MeanColour(MeanColour {})), n_query }
}

/// The golden images as PNG.
fn golden_png(name: &str) -> Vec<u8> {
    let rgb = golden::file("preprocess.safetensors").tensor(&format!("{name}.rgb_u8"));
    let (height, width, _) = rgb.size3().unwrap();
    let data = rgb.contiguous().view(-1).try_into().unwrap();
    fixtures::png(&Rgb { width: width as usize, height: height as usize, data })
}

fn embeddings(answer: &EncodeResponse) -> Tensor {
    array::to_tensor(&Array::try_from(answer.embeddings.clone()).unwrap(), Device::Cpu, Kind::Float)
}

#[tokio::test(flavor = "multi_thread")]
async fn images_become_upstreams_embeddings() {
    let running = Running::start(Config::default()).await;
    let info = running.client.clone().info(EncoderInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.width, info.image_size, info.grid_side), (64, 56, 4));
    assert_eq!((info.preprocessing_version, info.max_image_pixels), (PREPROCESSING_VERSION, 1 << 26));
    let (first, second) = (golden_png("img0"), golden_png("img1"));
    let requests = vec![image(first.clone(), 4), image(second, 16), image(first, 1), mean_colour(1)];
    let answers = running.encode_all(requests).await.unwrap();
    let golden = golden::file("vision.safetensors");
    for (answer, name, index) in [(0, "nq4", 0), (1, "nq16", 1), (2, "nq1", 0)] {
        let want = golden.tensor(&format!("encode_image.{name}")).get(index);
        assert_close(name, &embeddings(&answers[answer]), &want, forward_tolerance(&want));
    }
    assert_eq!(embeddings(&answers[3]).size(), [1, 64]);
    for answer in &answers {
        assert_eq!(answer.weights_digest, info.weights_digest);
        assert!(answer.encode_ms > 0.0);
    }
    assert!(answers[0].preprocess_ms > 0.0 && answers[3].preprocess_ms == 0.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_the_callers_fault_and_the_service_goes_on() {
    let running = Running::start(Config::default()).await;
    let files = [
        ("text.txt", "PNG, JPEG, WebP"),
        ("empty.bin", "0 bytes"),
        ("truncated.jpg", "truncated"),
        ("truncated.png", "truncated"),
        ("animated.gif", "send frames as video"),
        ("animated.png", "send frames as video"),
        ("animated.webp", "send frames as video"),
        ("huge_header.png", "at most 67108864 pixels, got 60000 x 60000"),
    ];
    for (file, words) in files {
        let status = running.encode(image(fixtures::file(file), 4)).await.unwrap_err();
        assert_refused(&status, "image", words);
        running.assert_healthy().await;
    }
    let status = running.encode(EncodeRequest { source: None, n_query: 4 }).await.unwrap_err();
    assert_refused(&status, "source", "nothing");
    // Pooling for 8 would give 16.
    for n_query in [0, 8, 17, u32::MAX] {
        let status = running.encode(mean_colour(n_query)).await.unwrap_err();
        assert_refused(&status, "n_query", &format!("can leave (1, 4, 16), got {n_query}"));
    }
    running.assert_healthy().await;
    running.stop().await;
}

fn assert_refused(status: &Status, field: &str, words: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let violation = &status.get_details_bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, field, "{status:?}");
    assert!(violation.description.contains(words), "{words} not in {}", violation.description);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_accepted_format_is_encoded() {
    let running = Running::start(Config::default()).await;
    let files = ["rgb8.png", "rgb420.jpg", "lossy.webp", "bgr24.bmp", "plain.gif", "cmyk.jpg", "grey16.png"];
    let requests = files.iter().map(|file| image(fixtures::file(file), 4)).collect();
    running.encode_all(requests).await.unwrap();
    running.stop().await;
}

/// A region is encoded as the drawing of it that a client might send.
#[tokio::test(flavor = "multi_thread")]
async fn a_box_is_encoded_as_its_drawing() {
    let running = Running::start(Config::default()).await;
    let region = v1::Box { left: 0.25, top: 0.5, right: 0.75, bottom: 1.0, phrase: "a dog".into() };
    let drawn = image(fixtures::png(&outline::outline(&region)), 4);
    let asked = EncodeRequest { source: Some(Source::Box(region.clone())), n_query: 4 };
    let answers = running.encode_all(vec![drawn, asked]).await.unwrap();
    assert_eq!(embeddings(&answers[0]), embeddings(&answers[1]));
    let turned = v1::Box { left: 0.75, right: 0.25, ..region };
    let turned = EncodeRequest { source: Some(Source::Box(turned)), n_query: 4 };
    let refused = running.encode(turned).await.unwrap_err();
    assert_refused(&refused, "box.left", "0 <= left < right <= 1, got 0.75 and 0.25");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_more_than_there_are_places_is_refused_and_the_others_are_encoded() {
    let config = Config { max_images: 3, max_batch_images: 2, ..Config::default() };
    let running = Running::start(config).await;
    let answers = futures::future::join_all((0..50).map(|_| running.encode(mean_colour(4)))).await;
    let (encoded, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!(encoded.len() >= 3, "{} were encoded", encoded.len());
    for refusal in refused {
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.code(), Code::ResourceExhausted);
        assert!(refusal.message().contains("all 3 places for images are taken"), "{refusal}");
    }
    running.assert_healthy().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_and_a_dropped_stream_end_the_call() {
    let running = Running::start(Config::default()).await;
    let mut client = running.client.clone();
    let mut request = Request::new(futures::stream::pending::<EncodeRequest>());
    request.set_timeout(Duration::from_millis(100));
    let ended = async {
        let mut answers = client.encode(request).await?.into_inner();
        answers.message().await
    };
    let status = tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");

    // A call ends for the server when its caller drops both directions; it must not hold the end of the service up.
    let (requests, queued) = futures::channel::mpsc::channel::<EncodeRequest>(1);
    let answers = client.encode(queued).await.unwrap().into_inner();
    drop((answers, requests));
    running.assert_healthy().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_ends_the_service_with_the_reason() {
    let server = ServerConfig { admin: None, ..ServerConfig::on_port(0) };
    let config = Config { model_dir: "/nonexistent/model".into(), server, ..Config::default() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, crate::run(config, listeners, Shutdown::new())).await.unwrap();
    let error = format!("{:#}", ended.unwrap_err());
    assert!(error.contains("/nonexistent/model"), "{error}");
}

/// A checkpoint of a few large tensors and no others, sparse on the disk.
fn write_incomplete_model(folder: &std::path::Path) {
    const TENSORS: usize = 8;
    const BYTES: usize = 8192 * 1024 * 4;
    let entry = |index: usize| {
        let range = [index * BYTES, (index + 1) * BYTES];
        let entry = serde_json::json!({ "dtype": "F32", "shape": [8192, 1024], "data_offsets": range });
        (format!("visual.blocks.{index}.mlp.fc1.weight"), entry)
    };
    let header = serde_json::Value::Object((0..TENSORS).map(entry).collect()).to_string();
    let path = folder.join("model.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len((8 + header.len() + TENSORS * BYTES) as u64).unwrap();
    let vision = serde_json::json!({ "width": 1024, "head_width": 64, "mlp_ratio": 8.0, "layers": TENSORS });
    std::fs::write(folder.join("config.json"), serde_json::json!({ "vision": vision }).to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_while_it_loads_hears_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    write_incomplete_model(folder.path());
    let server = ServerConfig { admin: None, ..ServerConfig::on_port(0) };
    let config = Config { model_dir: folder.path().to_owned(), server, ..Config::default() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let endpoint = client::endpoint(format!("http://{}", listeners.grpc_addr())).unwrap();
    let mut client = VisualEncoderClient::new(endpoint.connect_lazy());
    let served = tokio::spawn(crate::run(config, listeners, Shutdown::new()));
    let mut heard = Vec::new();
    while !served.is_finished() {
        let status = client.info(EncoderInfoRequest {}).await.unwrap_err();
        let percent = status.message().strip_prefix("not ready: loading ");
        heard.extend(percent.and_then(|percent| percent.strip_suffix(" %")?.parse::<u8>().ok()));
    }
    assert!(heard.iter().any(|percent| (1..100).contains(percent)), "{heard:?}");
    assert!(heard.is_sorted(), "{heard:?}");
    let error = format!("{:#}", served.await.unwrap().unwrap_err());
    assert!(error.contains("`cls_token` is missing"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    // A terabyte of nothing, refused by its header alone.
    let entry =
        serde_json::json!({ "dtype": "F32", "shape": [1_u64 << 38], "data_offsets": [0, 1_u64 << 40] });
    let header = serde_json::json!({ "visual.cls_token": entry }).to_string();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + (1 << 40)).unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    let server = ServerConfig { admin: None, ..ServerConfig::on_port(0) };
    let config = Config { model_dir: folder.path().to_owned(), server, ..Config::default() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, crate::run(config, listeners, Shutdown::new())).await.unwrap();
    let error = format!("{:#}", ended.unwrap_err());
    assert!(error.contains("1099.5 GB are needed on cpu, where "), "{error}");
}
