//! Real processes that are killed or stopped in the middle of their work: clients see what they would have seen.

use std::time::Duration;

use emu2_proto::v1::{self, GenerateEvent, GenerateRequest, emu2_client::Emu2Client, generate_event::Event};
use tonic::{Streaming, transport::Channel};

use crate::{
    processes::{Process, Processes},
    support::{answer, ask, client, decode, draw, fresh_png, image, painted, text},
};

/// Looks often, so that a hang is found within a fraction of a second.
const POOL: &str = "\n[pool]\nrefresh_ms = 100\ninfo_timeout_ms = 200\n";

async fn cluster() -> (Processes, Emu2Client<Channel>) {
    // Only the router knows the section.
    let cluster = Processes::replicated(2, "", POOL).await;
    let client = client(cluster.router.addr).await;
    // The router is ready with one replica of each stage.
    tokio::time::sleep(Duration::from_millis(300)).await;
    (cluster, client)
}

/// The one of two that works.
async fn busy<'a>(replicas: &'a [Process], metric: &str) -> &'a Process {
    loop {
        for replica in replicas {
            if replica.metric(metric).await > 0.0 {
                return replica;
            }
        }
    }
}

/// A request that is far enough for the client to have seen something of it.
async fn begun(
    client: &mut Emu2Client<Channel>,
    request: GenerateRequest,
    is_far: impl Fn(&Event) -> bool,
) -> (Vec<Event>, Streaming<GenerateEvent>) {
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while !seen.last().is_some_and(&is_far) {
        seen.push(stream.message().await.unwrap().expect("it has just begun").event.unwrap());
    }
    (seen, stream)
}

async fn rest(mut seen: Vec<Event>, mut stream: Streaming<GenerateEvent>) -> Vec<Event> {
    while let Some(event) = stream.message().await.unwrap() {
        seen.push(event.event.unwrap());
    }
    assert!(matches!(seen.last(), Some(Event::Finished(_))), "{:?}", seen.last());
    seen
}

fn written(events: &[Event]) -> String {
    let deltas = events.iter().filter_map(|event| match event {
        Event::TextDelta(delta) => Some(delta.text.as_str()),
        _ => None,
    });
    deltas.collect()
}

const LLM_RUNNING: &str = "emu2_stage_running{stage=\"llm\"}";
const DECODER_RUNNING: &str = "emu2_stage_running{stage=\"decoder\"}";

fn long_text() -> GenerateRequest {
    let tokens = 200;
    let output = v1::TextOutput {
        num_beams: Some(1),
        max_new_tokens: Some(tokens),
        min_length: Some(tokens + 1),
        ..Default::default()
    };
    ask("emu2-gen", vec![image(fresh_png(90)), text("What is this?")], output)
}

#[tokio::test]
async fn a_text_whose_llm_is_killed_or_stopped_is_the_same_text() {
    let (cluster, mut client) = cluster().await;
    let undisturbed = answer(&mut client, long_text()).await.unwrap();
    let llms = &cluster.stages[2..4];
    let is_text = |event: &Event| matches!(event, Event::TextDelta(_));

    let (seen, stream) = begun(&mut client, long_text(), is_text).await;
    let stopped = busy(llms, LLM_RUNNING).await;
    stopped.pause();
    assert_eq!(written(&rest(seen, stream).await), undisturbed, "the llm was stopped");
    stopped.wake();
    let awake = async { while stopped.metric(LLM_RUNNING).await > 0.0 {} };
    tokio::time::timeout(Duration::from_secs(20), awake).await.expect("it finds its call cancelled");

    let (seen, stream) = begun(&mut client, long_text(), is_text).await;
    busy(llms, LLM_RUNNING).await.kill();
    assert_eq!(written(&rest(seen, stream).await), undisturbed, "the llm was killed");
}

#[tokio::test]
async fn an_image_whose_decoder_is_killed_is_the_same_image() {
    let (cluster, mut client) = cluster().await;
    let request = || draw(vec![text("a dog")], v1::ImageOutput { steps: Some(100), ..Default::default() });
    let undisturbed = painted(&mut client, request()).await.unwrap();
    let is_step = |event: &Event| matches!(event, Event::DenoiseProgress(_));
    let (seen, stream) = begun(&mut client, request(), is_step).await;
    busy(&cluster.stages[4..6], DECODER_RUNNING).await.kill();
    let events = rest(seen, stream).await;
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::DenoiseProgress(progress) => Some(progress.step),
            _ => None,
        })
        .collect();
    assert_eq!(steps, (1..=100).collect::<Vec<_>>(), "each step once, in order");
    let png = events.iter().find_map(|event| match event {
        Event::Image(image) => Some(&image.png),
        _ => None,
    });
    assert_eq!(decode(png.unwrap()), undisturbed);
}

#[tokio::test]
async fn no_image_is_lost_when_an_encoder_is_killed() {
    let (cluster, client) = cluster().await;
    let embed = |seed: u8| {
        let mut client = client.clone();
        let image = Some(v1::Image { data: fresh_png(seed).into() });
        let request = v1::EmbedRequest { model: "emu2-gen".into(), image, ..Default::default() };
        async move { client.embed(request).await }
    };
    let running: Vec<_> = (100..140).map(|seed| tokio::spawn(embed(seed))).collect();
    cluster.stages[0].kill();
    for embedded in running {
        embedded.await.unwrap().unwrap();
    }
    embed(141).await.unwrap();
}
