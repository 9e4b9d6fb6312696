use emu2_proto::{array::Dtype, stage::DecodeStart};

use super::*;

fn limits() -> Limits {
    let model = ModelInfo {
        weights_digest: String::new(),
        dtype: Dtype::F32,
        width: 4,
        default_side: 64,
        scale_factor: 8,
        latent_channels: 4,
        train_steps: 100,
    };
    Limits::new(&Config::default(), model)
}

fn image() -> ImageOutput {
    ImageOutput {
        height: Some(64),
        width: Some(32),
        steps: Some(10),
        guidance_scale: Some(3.0),
        ..ImageOutput::default()
    }
}

fn of(image: ImageOutput) -> DecodeStart {
    DecodeStart { image: Some(image), queries: 3, ..DecodeStart::default() }
}

fn start() -> DecodeStart {
    of(image())
}

fn without_guidance() -> DecodeStart {
    of(ImageOutput { guidance_scale: Some(1.0), ..image() })
}

fn message(message: Message) -> DecodeRequest {
    DecodeRequest { message: Some(message) }
}

fn zeros(shape: &[u32]) -> Tensor {
    let count: u32 = shape.iter().product();
    let dtype = emu2_proto::v1::Dtype::F32.into();
    Tensor { dtype, shape: shape.to_vec(), data: vec![0; 4 * count as usize].into() }
}

fn chunk(start: u32, shape: &[u32]) -> RegressedEmbeddings {
    RegressedEmbeddings { start, embeddings: Some(zeros(shape)) }
}

fn open(start: DecodeStart) -> Result<Intake, String> {
    let opened = Intake::open(Some(message(Message::Start(start))), &limits());
    opened.map_err(|violations| violations.iter().map(Violation::to_string).collect::<Vec<_>>().join("\n"))
}

#[test]
fn rows_come_in_chunks_and_both_sides_interleave() {
    let mut intake =
        open(DecodeStart { seed: 9, ..of(ImageOutput { crop_top: Some(1), crop_left: Some(2), ..image() }) })
            .unwrap();
    for (side, at, rows) in [('+', 0, 1), ('-', 0, 2), ('+', 1, 2), ('-', 2, 1)] {
        assert!(!intake.is_complete());
        let chunk = chunk(at, &[rows, 4]);
        intake
            .push(message(if side == '+' { Message::Positive(chunk) } else { Message::Negative(chunk) }))
            .unwrap();
    }
    assert!(intake.is_complete());
    let request = intake.finish().unwrap();
    assert_eq!((request.height, request.width, request.steps, request.seed), (64, 32, 10, 9));
    assert_eq!((request.positive.shape(), request.negative.unwrap().shape()), (&[3, 4][..], &[3, 4][..]));
    assert_eq!((request.conditions.crop_top, request.conditions.crop_left), (1, 2));
}

#[test]
fn rows_keep_their_order() {
    let mut intake = open(DecodeStart { queries: 2, ..without_guidance() }).unwrap();
    for row in 0..2_u32 {
        let data: Vec<u8> = (0..4).flat_map(|i| ((10 * row + i) as f32).to_le_bytes()).collect();
        let embeddings = Some(Tensor { data: data.into(), ..zeros(&[1, 4]) });
        intake.push(message(Message::Positive(RegressedEmbeddings { start: row, embeddings }))).unwrap();
    }
    let request = intake.finish().unwrap();
    assert_eq!(request.positive.values().collect::<Vec<_>>(), [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
    assert!(request.negative.is_none());
}

#[test]
fn every_mistake_of_a_start_names_field_limit_and_value() {
    let wrong = ImageOutput {
        height: Some(65),
        width: Some(4096),
        steps: Some(0),
        guidance_scale: Some(f32::NAN),
        ..image()
    };
    let wrong = DecodeStart { queries: 1025, initial_latents: Some(zeros(&[4, 8, 4])), ..of(wrong) };
    let text = open(wrong).unwrap_err();
    for violation in [
        "image.height must be a multiple of 8, got 65",
        "image.width must be 8 to 2048, got 4096",
        "image.steps must be 1 to 100, got 0",
        "start.queries must be 1 to 1024, got 1025",
        "image.guidance_scale must be 0 to 100, got NaN",
        "start.initial_latents must be a valid tensor: shape must be [4, 8, 512], got [4, 8, 4]",
    ] {
        assert!(text.contains(violation), "{violation} not in:\n{text}");
    }
    for (start, field) in [
        (of(ImageOutput { height: Some(0), ..image() }), "image.height"),
        (of(ImageOutput { width: Some(u32::MAX), ..image() }), "image.width"),
        (of(ImageOutput { steps: Some(101), ..image() }), "image.steps"),
        (DecodeStart { queries: 0, ..start() }, "start.queries"),
        (of(ImageOutput { guidance_scale: Some(-0.1), ..image() }), "image.guidance_scale"),
        (of(ImageOutput { guidance_scale: Some(100.5), ..image() }), "image.guidance_scale"),
        (of(ImageOutput { guidance_scale: Some(f32::INFINITY), ..image() }), "image.guidance_scale"),
        (DecodeStart { initial_latents: Some(zeros(&[4, 8])), ..start() }, "start.initial_latents"),
    ] {
        let text = open(start).unwrap_err();
        assert!(text.starts_with(field) && !text.contains('\n'), "{text}");
    }
    open(DecodeStart { initial_latents: Some(zeros(&[4, 8, 4])), ..start() }).unwrap();
}

#[test]
fn every_mistake_of_a_chunk_names_its_field() {
    let bf16 = Tensor { dtype: emu2_proto::v1::Dtype::Bf16.into(), ..zeros(&[2, 2]) };
    let bf16 = Tensor { shape: vec![2, 4], ..bf16 };
    let nan = Tensor { data: [f32::NAN; 4].map(f32::to_le_bytes).concat().into(), ..zeros(&[1, 4]) };
    let tensor = |embeddings| Message::Positive(RegressedEmbeddings { start: 0, embeddings });
    for (wrong, expected) in [
        (Message::Positive(chunk(1, &[1, 4])), "positive.start must be 0, the next row to come, got 1"),
        (Message::Negative(chunk(2, &[1, 4])), "negative.start must be 0"),
        (
            Message::Positive(chunk(0, &[4, 4])),
            "positive.embeddings must have at most 3 more rows (start.queries), got 4",
        ),
        (Message::Positive(chunk(0, &[1, 5])), "shape must be [1, 4], got [1, 5]"),
        (Message::Positive(chunk(0, &[4])), "shape must be [4, 4], got [4]"),
        (tensor(Some(bf16)), "dtype must be float32, got bfloat16"),
        (tensor(Some(nan)), "values must be finite, got NaN at element 0"),
        (tensor(None), "positive.embeddings must be a valid tensor: tensor is missing"),
        (Message::Start(start()), "start must come once"),
    ] {
        let violation = open(start()).unwrap().push(message(wrong)).unwrap_err().to_string();
        assert!(violation.contains(expected), "{violation}");
    }
    let violation = open(start()).unwrap().push(DecodeRequest { message: None }).unwrap_err().to_string();
    assert!(violation.contains("must be start, positive or negative"), "{violation}");
}

#[test]
fn no_negative_without_guidance_and_none_missing_with_it() {
    let mut intake = open(without_guidance()).unwrap();
    let violation = intake.push(message(Message::Negative(chunk(0, &[3, 4])))).unwrap_err();
    assert!(violation.to_string().contains("guidance_scale is 1 or below, got 1"), "{violation}");
    let mut intake = open(start()).unwrap();
    intake.push(message(Message::Positive(chunk(0, &[3, 4])))).unwrap();
    let missing = intake.finish().unwrap_err();
    assert_eq!(missing.len(), 1);
    assert_eq!(missing[0].to_string(), "negative must have 3 rows (start.queries), the stream ended after 0");
}

#[test]
fn start_comes_first() {
    for first in
        [None, Some(DecodeRequest { message: None }), Some(message(Message::Positive(chunk(0, &[1, 4]))))]
    {
        let violations = Intake::open(first, &limits()).unwrap_err();
        assert!(violations[0].to_string().starts_with("start must be the first message"), "{violations:?}");
    }
}
