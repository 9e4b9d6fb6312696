use std::{net::SocketAddr, time::Instant};

use emu2_nn::golden;
use emu2_proto::{
    array::Array,
    stage::{
        DecodeStart, RegressedEmbeddings, decode_request::Message, visual_decoder_client::VisualDecoderClient,
    },
};
use emu2_serve::{
    client::endpoint,
    parameters,
    server::{Listeners, ServerConfig},
    shutdown::Shutdown,
};
use tokio::task::JoinHandle;
use tokio_stream::{Stream, StreamExt, iter, pending};
use tonic::{Code, transport::Channel};

use super::*;
use crate::denoise::tests::{assert_levels, bytes, golden_request, request};

/// The service on a free port, with the tiny golden model.
struct Running {
    client: VisualDecoderClient<Channel>,
    address: SocketAddr,
    shutdown: Shutdown,
    ended: JoinHandle<anyhow::Result<()>>,
}

async fn run(max_requests: usize) -> Running {
    let server = ServerConfig { max_requests, ..ServerConfig::on_port(0) };
    let model_dir = golden::model_dir("emu2-gen");
    let config = Config { server, model_dir, input_wait_ms_max: 2_000, cores: 1, ..Config::default() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let (address, shutdown) = (listeners.grpc_addr(), Shutdown::new());
    let ended = tokio::spawn(crate::run(config, listeners, shutdown.clone()));
    let channel = endpoint(format!("http://{address}")).unwrap().connect_lazy();
    let client = VisualDecoderClient::new(channel).max_decoding_message_size(64 << 20);
    let running = Running { client, address, shutdown, ended };
    while running.client.clone().info(DecoderInfoRequest {}).await.is_err() {
        assert!(!running.ended.is_finished(), "the service has ended");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running
}

impl Running {
    /// All events of a call, or the error that ended it.
    async fn decode(
        &self,
        messages: impl Stream<Item = DecodeRequest> + Send + 'static,
    ) -> Result<Vec<decode_event::Event>, Status> {
        let events = self.client.clone().decode(messages).await?.into_inner();
        events.map(|event| event.map(|event| event.event.unwrap())).collect().await
    }

    async fn stop(self) {
        self.shutdown.begin();
        self.ended.await.unwrap().unwrap();
    }
}

fn start_of(request: &DenoiseRequest) -> DecodeStart {
    let image = v1::ImageOutput {
        height: Some(request.height as u32),
        width: Some(request.width as u32),
        steps: Some(request.steps as u32),
        guidance_scale: Some(request.guidance_scale),
        original_height: Some(request.conditions.original_height),
        original_width: Some(request.conditions.original_width),
        crop_top: Some(request.conditions.crop_top),
        crop_left: Some(request.conditions.crop_left),
    };
    DecodeStart {
        image: Some(image),
        seed: request.seed,
        queries: request.positive.shape()[0] as u32,
        initial_latents: request.initial_latents.clone().map(Into::into),
    }
}

/// Rows of `array` as messages of at most `rows`.
fn chunks(array: &Array, rows: usize) -> Vec<RegressedEmbeddings> {
    let width = array.shape()[1];
    let row_bytes = width * array.dtype().size();
    let all: Vec<_> = (0..array.shape()[0]).collect();
    let chunk = |rows: &[usize]| {
        let data = array.data().slice(rows[0] * row_bytes..(rows[rows.len() - 1] + 1) * row_bytes);
        let embeddings = Array::new(array.dtype(), vec![rows.len(), width], data).unwrap();
        RegressedEmbeddings { start: rows[0] as u32, embeddings: Some(embeddings.into()) }
    };
    all.chunks(rows).map(chunk).collect()
}

fn messages(request: &DenoiseRequest) -> Vec<DecodeRequest> {
    let positive = chunks(&request.positive, 5).into_iter().map(Message::Positive);
    let negative = request.negative.iter().flat_map(|negative| chunks(negative, 16)).map(Message::Negative);
    let all = [Message::Start(start_of(request))].into_iter().chain(negative).chain(positive);
    all.map(|message| DecodeRequest { message: Some(message) }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_over_the_wire_are_the_official_ones() {
    let (golden, service) = (golden::file("pipeline.safetensors"), run(8).await);
    let info = service.client.clone().info(DecoderInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.width, info.scale_factor), (64, 8));
    let limit = |field| parameters::limit(&info.parameter_limits, field).unwrap();
    assert_eq!((limit("image.height").default(), limit("image.steps").max), (64.0, 250.0));
    for run in ["text_4", "inter_4_rect", "inter_20", "noguidance_4"] {
        let request = golden_request(&golden, run);
        let mut events = service.decode(iter(messages(&request))).await.unwrap();
        let Some(decode_event::Event::Finished(finished)) = events.pop() else { panic!("{run}") };
        assert_eq!(finished.weights_digest, info.weights_digest);
        assert!(finished.denoise_ms > 0.0 && finished.vae_ms > 0.0);
        let Some(decode_event::Event::Image(image)) = events.pop() else { panic!("{run}") };
        let pixels =
            image::load_from_memory_with_format(&image.png, image::ImageFormat::Png).unwrap().into_rgb8();
        assert_eq!((image.height, image.width), (pixels.height(), pixels.width()));
        assert_eq!((image.height as usize, image.width as usize), (request.height, request.width));
        assert_levels(run, pixels.as_raw(), &bytes(&golden.tensor(&format!("{run}.image_u8"))));
        let expected: Vec<_> = (1..=request.steps).map(|step| progress(step, request.steps)).collect();
        assert_eq!(events, expected, "{run}");
    }
    service.stop().await;
}

/// What is done to good messages, the code, and what the message must say.
type BadInput = (&'static str, fn(&mut Vec<DecodeRequest>), &'static [&'static str]);

fn start(messages: &mut [DecodeRequest]) -> &mut DecodeStart {
    let Some(Message::Start(start)) = &mut messages[0].message else { panic!("start comes first") };
    start
}

fn asked(messages: &mut [DecodeRequest]) -> &mut v1::ImageOutput {
    start(messages).image.as_mut().unwrap()
}

fn tensor(messages: &mut [DecodeRequest]) -> &mut v1::Tensor {
    let Some(Message::Negative(chunk)) = &mut messages[1].message else { panic!("negative comes second") };
    chunk.embeddings.as_mut().unwrap()
}

const BAD_INPUTS: &[BadInput] = &[
    ("no steps", |m| asked(m).steps = Some(0), &["image.steps", "1 to 250", "got 0"]),
    ("too many steps", |m| asked(m).steps = Some(10_000), &["image.steps", "250", "10000"]),
    (
        "guidance is no number",
        |m| asked(m).guidance_scale = Some(f32::NAN),
        &["image.guidance_scale", "100", "NaN"],
    ),
    (
        "guidance is negative",
        |m| asked(m).guidance_scale = Some(-1.0),
        &["image.guidance_scale", "0 to", "-1"],
    ),
    ("guidance is huge", |m| asked(m).guidance_scale = Some(101.0), &["image.guidance_scale", "100", "101"]),
    ("height is odd", |m| asked(m).height = Some(65), &["image.height", "multiple of 8", "65"]),
    ("width is zero", |m| asked(m).width = Some(0), &["image.width", "8 to 2048", "got 0"]),
    ("width is huge", |m| asked(m).width = Some(4096), &["image.width", "2048", "4096"]),
    ("no queries", |m| start(m).queries = 0, &["start.queries", "1 to 1024", "got 0"]),
    ("too many queries", |m| start(m).queries = 2000, &["start.queries", "1024", "2000"]),
    (
        "latents of another size",
        |m| start(m).initial_latents.as_mut().unwrap().shape = vec![4, 64],
        &["start.initial_latents", "[4, 8, 8]", "[4, 64]"],
    ),
    ("no such dtype", |m| tensor(m).dtype = 0, &["negative.embeddings", "DTYPE_F32", "got 0"]),
    (
        "another dtype",
        |m| *tensor(m) = v1::Tensor { dtype: 2, shape: vec![16, 64], data: vec![0; 2 * 16 * 64].into() },
        &["negative.embeddings", "float32", "bfloat16"],
    ),
    ("another width", |m| tensor(m).shape = vec![32, 32], &["negative.embeddings", "[32, 64]", "[32, 32]"]),
    ("too few bytes", |m| tensor(m).data.truncate(8), &["negative.embeddings", "4096 bytes", "got 8"]),
    (
        "not finite",
        |m| tensor(m).data = [&f32::NAN.to_le_bytes(), &tensor(m).data[4..]].concat().into(),
        &["negative.embeddings", "finite", "NaN"],
    ),
    ("no embeddings", |m| m.truncate(1), &["positive", "16 rows", "after 0"]),
    ("an early end", |m| m.truncate(3), &["positive", "16 rows", "after 5"]),
    (
        "no negative",
        |m| {
            m.remove(1);
        },
        &["negative", "16 rows", "after 0"],
    ),
    (
        "a gap",
        |m| {
            m.remove(2);
        },
        &["positive.start", "must be 0", "got 5"],
    ),
    ("an overlap", |m| m.insert(2, m[2].clone()), &["positive.start", "must be 5", "got 0"]),
    ("two starts", |m| m.insert(1, m[0].clone()), &["start", "once"]),
    (
        "no start",
        |m| {
            m.remove(0);
        },
        &["start", "first message", "negative"],
    ),
    ("nothing", |m| m.clear(), &["start", "first message"]),
    ("an empty message", |m| m.insert(1, DecodeRequest { message: None }), &["message", "none"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_told_by_field_limit_and_value_and_harms_nobody() {
    let (golden, service) = (golden::file("pipeline.safetensors"), run(4).await);
    let good = golden_request(&golden, "text_4");
    for (name, spoil, expected) in BAD_INPUTS {
        let mut spoilt = messages(&good);
        spoil(&mut spoilt);
        let status = service.decode(iter(spoilt)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status:?}");
        for text in *expected {
            assert!(status.message().contains(text), "{name}: {text} not in {}", status.message());
        }
    }
    assert_eq!(service.decode(iter(messages(&good))).await.unwrap().len(), 6, "the service is healthy");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_falls_silent_is_not_waited_for() {
    let service = run(4).await;
    let begun = iter(messages(&request(1, 4, 3.0)).into_iter().take(2)).chain(pending());
    let status = service.decode(begun).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("2000 ms"), "{status:?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_service_refuses_and_a_caller_who_leaves_makes_room() {
    let service = run(1).await;
    let long = messages(&request(1, 250, 3.0));
    let mut running = service.client.clone().decode(iter(long)).await.unwrap().into_inner();
    running.message().await.unwrap().unwrap();
    let status = service.decode(iter(messages(&request(2, 1, 1.0)))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(running);
    let left = Instant::now();
    let events = loop {
        match service.decode(iter(messages(&request(2, 1, 1.0)))).await {
            Ok(events) => break events,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted),
        }
        assert!(left.elapsed() < Duration::from_secs(5), "the caller has left, its permit has not");
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert_eq!(events.len(), 3);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_deadline_ends_the_call() {
    let service = run(2).await;
    let mut call = Request::new(iter(messages(&request(1, 250, 3.0))));
    call.set_timeout(Duration::from_millis(150));
    let status = async {
        let mut events = service.client.clone().decode(call).await?.into_inner();
        while events.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    let status = status.await.expect_err("250 steps in 150 ms");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_side_by_side_are_each_their_own() {
    let (golden, service) = (golden::file("pipeline.safetensors"), run(8).await);
    let calls = ["text_4", "autoencode_4", "inter_4_rect", "noguidance_4"].map(|run| {
        let messages = messages(&golden_request(&golden, run));
        let mut client = service.client.clone();
        (
            run,
            tokio::spawn(async move {
                // A caller may leave its side open.
                let events = client.decode(iter(messages).chain(pending())).await.unwrap().into_inner();
                events.map(|event| event.unwrap().event.unwrap()).collect::<Vec<_>>().await
            }),
        )
    });
    for (run, call) in calls {
        let events = call.await.unwrap();
        let [.., decode_event::Event::Image(image), decode_event::Event::Finished(_)] = &events[..] else {
            panic!("{run}: {events:?}")
        };
        let pixels = image::load_from_memory(&image.png).unwrap().into_rgb8();
        assert_levels(run, pixels.as_raw(), &bytes(&golden.tensor(&format!("{run}.image_u8"))));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_a_running_request_finish() {
    let service = run(2).await;
    let mut running =
        service.client.clone().decode(iter(messages(&request(1, 30, 3.0)))).await.unwrap().into_inner();
    running.message().await.unwrap().unwrap();
    service.shutdown.begin();
    let mut last = None;
    while let Some(event) = running.message().await.unwrap() {
        last = event.event;
    }
    assert!(matches!(last, Some(decode_event::Event::Finished(_))), "{last:?}");
    service.ended.await.unwrap().unwrap();
    tokio::net::TcpStream::connect(service.address).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_ends_the_service() {
    let config =
        Config { model_dir: "/nowhere".into(), server: ServerConfig::on_port(0), ..Config::default() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let error = crate::run(config, listeners, Shutdown::new()).await.unwrap_err();
    assert!(format!("{error:#}").contains("/nowhere"), "{error:#}");
}
