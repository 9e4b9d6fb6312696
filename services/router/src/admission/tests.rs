use emu2_proto::{
    stage::{DecodeStart, TextParameters, llm_start},
    v1,
};
use tokio::time::advance;
use tonic::Code;
use tonic_types::StatusExt;

use super::*;

fn admission(max_requests: usize) -> Admission {
    let mut config = Config::default();
    config.server.max_requests = max_requests;
    Admission::new(&config)
}

fn caller(priority: Priority) -> Caller {
    let (deadline, holding) = (Deadline::none(), MemoryReservation::default());
    Caller { tenant: Tenant::default(), priority, deadline, holding }
}

fn within(seconds: u64) -> Caller {
    Caller { deadline: Deadline::after(Duration::from_secs(seconds)), ..caller(Priority::Normal) }
}

fn generation(task: Task) -> Generation {
    Generation { task, pictures: Vec::new(), seed: 1 }
}

fn paints() -> Generation {
    let (width, height, steps, queries) = (1000, 1000, 50, 64);
    let start = DecodeStart { width, height, steps, queries, guidance_scale: 3.0, ..Default::default() };
    generation(Task::Paint { input: llm_start::Input::Prompt(Default::default()), start })
}

fn writes() -> Generation {
    let parameters = TextParameters { max_new_tokens: 100, ..Default::default() };
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
async fn paint_one(admission: &Admission) {
    let mut admitted = admission.enter("emu2", &paints(), &caller(Priority::Normal)).unwrap();
    (1..=64).for_each(|done| admitted.observe(&regressed(done)));
    for step in 1..=50 {
        advance(Duration::from_millis(500)).await;
        admitted.observe(&denoised(step));
    }
}

#[test]
fn lower_classes_leave_room_for_higher_ones() {
    let admission = admission(10);
    let fill =
        |class, count| (0..count).map(|_| admission.permit(&caller(class)).unwrap()).collect::<Vec<_>>();
    let mut taken = fill(Priority::Low, 5);
    let refused = admission.permit(&caller(Priority::Low)).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().is_some());
    taken.extend(fill(Priority::Normal, 4));
    assert_eq!(admission.permit(&caller(Priority::Normal)).unwrap_err().code(), Code::ResourceExhausted);
    taken.extend(fill(Priority::High, 1));
    assert_eq!(admission.permit(&caller(Priority::High)).unwrap_err().code(), Code::ResourceExhausted);
    taken.clear();
    fill(Priority::Low, 5);
}

#[tokio::test(start_paused = true)]
async fn without_measurements_nothing_is_refused_early() {
    let admission = admission(256);
    let _hopeless = admission.enter("emu2", &paints(), &within(0)).unwrap();
    let _crowd: Vec<_> =
        (0..200).map(|_| admission.enter("emu2", &writes(), &caller(Priority::Normal)).unwrap()).collect();
    advance(Duration::from_secs(600)).await;
    admission.enter("emu2", &writes(), &within(1)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn steps_that_cannot_be_done_in_time_are_refused_at_once() {
    let admission = admission(256);
    paint_one(&admission).await;
    let refused = admission.enter("emu2", &paints(), &within(10)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    for words in ["50 denoising steps", "25.0 s at best", "10.0 s are left"] {
        assert!(refused.message().contains(words), "{refused:?}");
    }
    drop(admission.enter("emu2", &paints(), &within(30)).unwrap());
    // A text is not held to it: it may end at any token.
    drop(admission.enter("emu2", &writes(), &within(1)).unwrap());
    assert_eq!(admission.running.load(Ordering::Relaxed), 0);
}

/// Tokens are counted as the llm counts them, not as events tell them.
#[tokio::test(start_paused = true)]
async fn tokens_that_a_text_must_have_are_refused_when_there_is_no_time_for_them() {
    let admission = admission(256);
    let text = |min_length| {
        let mut generation = writes();
        let Task::Write { parameters, .. } = &mut generation.task else { unreachable!() };
        (parameters.num_beams, parameters.min_length) = (1, min_length);
        generation
    };
    let mut admitted = admission.enter("emu2", &text(1), &caller(Priority::Normal)).unwrap();
    for _ in 0..=20 {
        admitted.observe(&event(Event::TextDelta(v1::TextDelta::default())));
        advance(Duration::from_secs(1)).await;
    }
    let usage = Some(v1::Usage { generated_tokens: 43, ..Default::default() });
    admitted.observe(&event(Event::Finished(v1::Finished { usage, ..Default::default() })));
    // Half a second a token.
    let refused = admission.enter("emu2", &text(41), &within(19)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().contains("the 40 tokens of text.min_length take 20.0 s"), "{refused}");
    drop(admission.enter("emu2", &text(41), &within(21)).unwrap());
    drop(admission.enter("emu2", &text(1), &within(1)).unwrap());
}

/// A picture for which rows have to be regressed first needs the time for both.
#[tokio::test(start_paused = true)]
async fn rows_count_with_the_steps_that_come_after_them() {
    let admission = admission(256);
    paint_one(&admission).await;
    let mut regressing = admission.enter("emu2", &paints(), &caller(Priority::Normal)).unwrap();
    for done in 1..=64 {
        regressing.observe(&regressed(done));
        advance(Duration::from_millis(100)).await;
    }
    drop(regressing);
    // 25 s of denoising, 6.4 s of rows.
    let thirty = within(30);
    drop(admission.enter("emu2", &paints(), &thirty).unwrap());
    let check = |rows| {
        let painting = paints();
        let backlogs = admission.backlogs("emu2").unwrap();
        backlogs.check_painting(painting.task.start().unwrap(), rows, thirty.deadline)
    };
    check(0).unwrap();
    let refused = check(64).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().starts_with("64 embeddings to regress and 50 denoising steps"), "{refused}");
    assert!(refused.message().contains("take 31.4 s at best"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn pictures_are_refused_while_the_encoder_is_too_far_behind() {
    let admission = admission(256);
    let encoder = || admission.backlogs("emu2").unwrap().encode();
    let mut waiting: Vec<_> = (0..100).map(|_| encoder().unwrap()).collect();
    for _ in 0..20 {
        advance(Duration::from_secs(1)).await;
        waiting.remove(0).finish();
    }
    let refused = encoder().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().starts_with("the encoder is 80."), "{refused}");
    assert!(refused.get_details_retry_info().is_some());
    drop(admission.enter("emu2", &writes(), &caller(Priority::Normal)).unwrap());
    waiting.truncate(30);
    encoder().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_is_too_far_behind_refuses_with_its_backlog() {
    let admission = admission(256);
    let enter = |caller: &Caller| admission.enter("emu2", &paints(), caller);
    let normal = caller(Priority::Normal);
    let mut painting = enter(&normal).unwrap();
    painting.observe(&regressed(64));
    // Three more have their embeddings and wait for the decoder.
    let mut waiting: Vec<_> = (0..3).map(|_| enter(&normal).unwrap()).collect();
    waiting.iter_mut().for_each(|admitted| admitted.observe(&regressed(64)));
    for step in 1..=20 {
        advance(Duration::from_secs(1)).await;
        painting.observe(&denoised(step));
    }
    // 180 steps are left, at one a second.
    let refused = enter(&normal).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let retry = refused.get_details_retry_info().unwrap().retry_delay.unwrap().as_secs_f64();
    assert!((170.0..=190.0).contains(&retry), "{retry}");
    assert!(refused.message().contains("admission.max_backlog_ms"), "{refused:?}");
    let refused = enter(&within(100)).unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().contains("behind, and 100.0 s are left"), "{refused:?}");
    // The llm is not what is behind.
    drop(admission.enter("emu2", &writes(), &normal).unwrap());
    drop(waiting);
    enter(&normal).unwrap();
}
