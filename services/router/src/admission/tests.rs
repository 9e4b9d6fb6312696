use std::{net::TcpListener, time::Duration};

use emu2_proto::{
    stage::{DecodeStart, DecoderInfo, EncoderInfo, LlmInfo, Load, llm_start},
    v1::{self, ImageOutput, TextOutput},
};
use emu2_serve::{admission::MemoryReservation, priority::Priority, tenant::Tenant};
use tokio::time::advance;
use tonic::Code;
use tonic_types::StatusExt;

use super::*;
use crate::{config::ModelConfig, model::StagePools};

/// The router's door before a model whose replicas say what a test has them say, and are silent on their ports.
struct Door {
    admission: Admission,
    model: Model,
    _ports: [TcpListener; 3],
}

impl Door {
    fn new(max_requests: usize) -> Self {
        let ports = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let endpoints = |port: &TcpListener| vec![format!("http://{}", port.local_addr().unwrap())];
        let [encoder, llm, decoder] = [0, 1, 2].map(|index| endpoints(&ports[index]));
        let mut config = Config::default();
        config.server.max_requests = max_requests;
        config.pool.info_timeout_ms = 3_600_000;
        config.models = vec![ModelConfig { name: "emu2".into(), encoder, llm, decoder }];
        let model = Model::start(&config.models[0], &mut StagePools::new(&config)).unwrap();
        Self { admission: Admission::new(&config), model, _ports: ports }
    }

    fn enter(&self, generation: &Generation, caller: &Caller) -> Result<Admitted, Status> {
        self.admission.enter(&self.model, generation, caller)
    }

    fn encoder_says(&self, load: Load) {
        self.model.encoder.say(&EncoderInfo { load: Some(load), ..Default::default() });
    }

    fn llm_says(&self, load: Load) {
        self.model.llm.say(&LlmInfo { load: Some(load), ..Default::default() });
    }

    fn decoder_says(&self, load: Load) {
        let info = DecoderInfo { load: Some(load), ..Default::default() };
        self.model.decoder.as_ref().unwrap().say(&info);
    }
}

fn behind(backlog_seconds: f64, waiting: u64) -> Load {
    Load { backlog_seconds, waiting, running: 4, ..Default::default() }
}

fn caller(priority: Priority) -> Caller {
    let (deadline, reservation) = (Deadline::none(), MemoryReservation::default());
    Caller { tenant: Tenant::default(), priority, deadline, reservation }
}

fn within(seconds: u64) -> Caller {
    Caller { deadline: Deadline::after(Duration::from_secs(seconds)), ..caller(Priority::Normal) }
}

fn generation(task: Task) -> Generation {
    Generation { task, images: Vec::new(), seed: 1 }
}

fn paints() -> Generation {
    let image = ImageOutput {
        width: Some(1000),
        height: Some(1000),
        steps: Some(50),
        guidance_scale: Some(3.0),
        ..Default::default()
    };
    let start = DecodeStart { image: Some(image), queries: 64, ..Default::default() };
    generation(Task::Paint { input: llm_start::Input::Prompt(Default::default()), start })
}

fn writes() -> Generation {
    let parameters = TextOutput { max_new_tokens: Some(100), ..Default::default() };
    generation(Task::Write { input: llm_start::Input::Prompt(Default::default()), parameters })
}

fn event(event: Event) -> GenerateEvent {
    GenerateEvent { event: Some(event) }
}

fn regressed(done: u32) -> GenerateEvent {
    event(Event::EmbeddingProgress(v1::EmbeddingProgress { done, total: 64 }))
}

fn denoised(step: u32) -> GenerateEvent {
    event(Event::DenoiseProgress(v1::DenoiseProgress { step, steps: 50 }))
}

/// One picture at half a second a step, from its beginning to its end.
async fn paint_one(door: &Door) {
    let mut admitted = door.enter(&paints(), &caller(Priority::Normal)).unwrap();
    (1..=64).for_each(|done| admitted.observe(&regressed(done)));
    for step in 1..=50 {
        advance(Duration::from_millis(500)).await;
        admitted.observe(&denoised(step));
    }
}

#[tokio::test]
async fn lower_classes_leave_room_for_higher_ones() {
    let door = Door::new(10);
    let fill =
        |class, count| (0..count).map(|_| door.admission.permit(&caller(class)).unwrap()).collect::<Vec<_>>();
    let mut taken = fill(Priority::Low, 5);
    let refused = door.admission.permit(&caller(Priority::Low)).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().is_some());
    taken.extend(fill(Priority::Normal, 4));
    assert_eq!(door.admission.permit(&caller(Priority::Normal)).unwrap_err().code(), Code::ResourceExhausted);
    taken.extend(fill(Priority::High, 1));
    assert_eq!(door.admission.permit(&caller(Priority::High)).unwrap_err().code(), Code::ResourceExhausted);
    taken.clear();
    fill(Priority::Low, 5);
}

#[tokio::test(start_paused = true)]
async fn without_measurements_nothing_is_refused_early() {
    let door = Door::new(256);
    let _hopeless = door.enter(&paints(), &within(0)).unwrap();
    let _crowd: Vec<_> =
        (0..200).map(|_| door.enter(&writes(), &caller(Priority::Normal)).unwrap()).collect();
    advance(Duration::from_secs(600)).await;
    door.enter(&writes(), &within(1)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn steps_that_cannot_be_done_in_time_are_refused_at_once() {
    let door = Door::new(256);
    paint_one(&door).await;
    let refused = door.enter(&paints(), &within(10)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    for words in ["50 denoising steps", "25.0 s at best", "10.0 s are left"] {
        assert!(refused.message().contains(words), "{refused:?}");
    }
    drop(door.enter(&paints(), &within(30)).unwrap());
    // A text is not held to it: it may end at any token.
    drop(door.enter(&writes(), &within(1)).unwrap());
    assert_eq!(door.admission.running.load(Ordering::Relaxed), 0);
}

/// Tokens are counted as the llm counts them, not as events tell them.
#[tokio::test(start_paused = true)]
async fn tokens_that_a_text_must_have_are_refused_when_there_is_no_time_for_them() {
    let door = Door::new(256);
    let text = |min_length| {
        let mut generation = writes();
        let Task::Write { parameters, .. } = &mut generation.task else { unreachable!() };
        (parameters.num_beams, parameters.min_length) = (Some(1), Some(min_length));
        generation
    };
    let mut admitted = door.enter(&text(1), &caller(Priority::Normal)).unwrap();
    for _ in 0..=20 {
        admitted.observe(&event(Event::TextDelta(v1::TextDelta::default())));
        advance(Duration::from_secs(1)).await;
    }
    let usage = Some(v1::Usage { generated_tokens: 43, ..Default::default() });
    admitted.observe(&event(Event::Finished(v1::Finished { usage, ..Default::default() })));
    // Half a second a token.
    let refused = door.enter(&text(41), &within(19)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().contains("the 40 tokens of text.min_length take 20.0 s"), "{refused}");
    drop(door.enter(&text(41), &within(21)).unwrap());
    drop(door.enter(&text(1), &within(1)).unwrap());
}

/// A picture for which rows have to be regressed first needs the time for both.
#[tokio::test(start_paused = true)]
async fn rows_count_with_the_steps_that_come_after_them() {
    let door = Door::new(256);
    paint_one(&door).await;
    let mut regressing = door.enter(&paints(), &caller(Priority::Normal)).unwrap();
    for done in 1..=64 {
        regressing.observe(&regressed(done));
        advance(Duration::from_millis(100)).await;
    }
    drop(regressing);
    // 25 s of denoising, 6.4 s of rows.
    let thirty = within(30);
    drop(door.enter(&paints(), &thirty).unwrap());
    let check = |rows| {
        let painting = paints();
        check_painting(&door.model, painting.task.start().unwrap(), rows, thirty.deadline)
    };
    check(0).unwrap();
    let refused = check(64).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().starts_with("64 embeddings to regress and 50 denoising steps"), "{refused}");
    assert!(refused.message().contains("take 31.4 s at best"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn images_are_refused_while_the_encoder_is_too_far_behind() {
    let door = Door::new(256);
    let most = Duration::from_secs(60);
    door.encoder_says(behind(80.0, 70));
    check_encoder(&door.model, most).unwrap();
    advance(most / 5).await;
    let refused = check_encoder(&door.model, most).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().starts_with("the encoder is 80.0 s behind"), "{refused}");
    assert!(refused.get_details_retry_info().is_some());
    drop(door.enter(&writes(), &caller(Priority::Normal)).unwrap());
    door.encoder_says(behind(30.0, 20));
    check_encoder(&door.model, most).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_is_too_far_behind_refuses_with_its_backlog() {
    let door = Door::new(256);
    let enter = |caller: &Caller| door.enter(&paints(), caller);
    let normal = caller(Priority::Normal);
    door.decoder_says(behind(180.0, 3));
    drop(enter(&normal).unwrap());
    advance(Duration::from_secs(20)).await;
    let refused = enter(&normal).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(180)));
    assert!(refused.message().contains("admission.max_backlog_ms"), "{refused:?}");
    let refused = enter(&within(100)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().contains("behind, and 100.0 s are left"), "{refused:?}");
    // The llm is not what is behind.
    drop(door.enter(&writes(), &normal).unwrap());
    door.decoder_says(behind(170.0, 0));
    enter(&normal).unwrap();
    door.llm_says(behind(70.0, 1));
    advance(Duration::from_secs(20)).await;
    assert_eq!(door.enter(&writes(), &normal).unwrap_err().code(), Code::ResourceExhausted);
}
