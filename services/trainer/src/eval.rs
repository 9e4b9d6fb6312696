//! What a served model can do, asked through the cluster's public API: `emu2-trainer eval`.
//!
//! | module | holds |
//! |---|---|
//! | [`context`] | what cases are made and judged with |
//! | [`case`] | one question: the request, and what the answer is worth |
//! | [`record`] | answers as JSON lines, from which an evaluation goes on where it ended |
//! | [`report`] | the table, with intervals, baselines and bars |

pub mod case;
pub mod context;
pub mod record;
pub mod report;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use emu2_client::{Client, ConnectionArgs, RouterArgs, explain, image::ChunkedPng};
use emu2_proto::v1::{self, generate_event::Event};
use emu2_standalone::cluster::{Cluster, ClusterConfig};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use image::RgbImage;

use crate::{
    data::{Ability, SIDE, Split, Style, World},
    documents::rgb,
    judge::Judge,
    model,
};
use case::{Case, Column};
use context::{EvalContext, ImageSettings};
use record::{Record, Records};

/// A judge that is right about fewer real scenes is not used.
const JUDGE_SCORE_MIN: f64 = 0.95;
/// Seconds after which an answer is given up, where the caller names no other time.
const TIMEOUT_S: f64 = 600.0;
/// Real scenes that the judge is tried on.
const JUDGED_SCENES: u64 = 300;

/// Arguments of `emu2-trainer eval`.
#[derive(Debug, Args)]
pub struct Eval {
    /// Ask a running cluster, e.g. http://127.0.0.1:50051; default: start one in this process.
    #[arg(long)]
    pub addr: Option<String>,
    /// Time limit and token of every request.
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// What that cluster serves.
    #[arg(long, default_value = "deploy/models/nano", value_name = "DIR")]
    pub model_dir: PathBuf,
    /// The folder that `deploy/fetch/drawings.py --unseen` prints.
    #[arg(long, value_name = "DIR")]
    pub drawings: PathBuf,
    /// Concepts that the model was trained on: the first so many; default: as many as nano.
    #[arg(long)]
    pub concepts: Option<usize>,
    /// Answers, one JSON a line; those already there are not asked for again.
    #[arg(long, default_value = "out/eval.jsonl", value_name = "FILE")]
    pub answers: PathBuf,
    /// The table as JSON.
    #[arg(long, default_value = "tests/bench/results/abilities.json", value_name = "FILE")]
    pub results: PathBuf,
    /// Cases of a score in the trained styles.
    #[arg(long, default_value_t = 300)]
    pub cases: u64,
    /// Cases of a score in the unseen style, and of a baseline.
    #[arg(long, default_value_t = 100)]
    pub other_cases: u64,
    /// Seed of the scenes; training's scenes are others in any case.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Denoising steps of an image.
    #[arg(long, default_value_t = 20)]
    pub steps: u32,
    /// The scale of classifier-free guidance.
    #[arg(long, default_value_t = 3.0)]
    pub guidance_scale: f32,
    /// Requests at once.
    #[arg(long, default_value_t = 8)]
    pub concurrency: usize,
    /// Only abilities whose name begins so.
    #[arg(long)]
    pub only: Option<String>,
}

/// Asks every case that has no answer yet, then prints the table and writes it.
///
/// # Errors
/// When the cluster cannot be reached, a request fails, or the judge is wrong about real scenes.
pub async fn eval(args: Eval) -> Result<()> {
    let timeout = args.connection.timeout.or(Some(TIMEOUT_S));
    if let Some(addr) = args.addr.clone() {
        let connection = ConnectionArgs { timeout, ..args.connection.clone() };
        return ask_all(&args, RouterArgs { addr, connection }).await;
    }
    let cluster = start(&args.model_dir).await?;
    // A token is for the cluster of `--addr`.
    let connection = ConnectionArgs { timeout, ..ConnectionArgs::default() };
    let outcome = ask_all(&args, RouterArgs { addr: format!("http://{}", cluster.addr), connection }).await;
    outcome.and(cluster.stop().await)
}

async fn start(model_dir: &Path) -> Result<Cluster> {
    let mut cluster = Cluster::start(ClusterConfig::local(vec![model_dir.to_owned()])).await?;
    cluster.ready().await.with_context(|| format!("{} cannot be served", model_dir.display()))?;
    Ok(cluster)
}

async fn ask_all(args: &Eval, router: RouterArgs) -> Result<()> {
    let mut client = Client::connect(&router).await?;
    let concepts = args.concepts.map_or_else(|| model::concept_count(&model::nano()), Ok)?;
    let world = World::open(&args.drawings, concepts, args.seed, true)?;
    let styles = [Style::Noto, Style::Fluent, Style::Twemoji];
    let context = EvalContext {
        judge: Judge::new(world.drawings(), concepts, &styles),
        world,
        text_model: client.pick(None, v1::Capability::Text).await?,
        image_model: client.pick(None, v1::Capability::Image).await?,
        image_settings: ImageSettings { steps: args.steps, guidance_scale: args.guidance_scale },
    };
    let judge_scores = judge_scores(&context);
    ensure!(
        judge_scores.iter().all(|(_, score)| *score >= JUDGE_SCORE_MIN),
        "the judge is right about {judge_scores:?} of real scenes, needs {JUDGE_SCORE_MIN}"
    );
    let served = served(&mut client, args, concepts).await?;
    let mut records = Records::open(&args.answers, &served)?;
    let open: Vec<Case> = cases(args).filter(|case| !records.holds(case)).collect();
    let bar = indicatif::ProgressBar::new(open.len() as u64).with_style(
        indicatif::ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}")
            .context("the bar's template is right")?,
    );
    let answers = stream::iter(open).map(|case| answer(&context, client.clone(), case));
    let mut answers = answers.buffer_unordered(args.concurrency.max(1));
    while let Some(record) = answers.try_next().await? {
        records.add(record)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let asked: Vec<Case> = cases(args).collect();
    let report = report::Report::new(&records, &asked, judge_scores);
    print!("{report}");
    let folder = args.results.parent().context("--results names a file in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(&args.results, serde_json::to_string_pretty(&report.json(&served))? + "\n")
        .with_context(|| format!("cannot write {}", args.results.display()))
}

/// Returns what answers depend on: those of another model, seed or way of painting are not mixed with these.
async fn served(client: &mut Client, args: &Eval, concepts: usize) -> Result<serde_json::Value> {
    let models = client.models().await?;
    let digests: Vec<_> = models
        .iter()
        .map(|model| [&model.name, &model.encoder_digest, &model.llm_digest, &model.decoder_digest])
        .collect();
    Ok(serde_json::json!({
        "models": digests, "concepts": concepts, "seed": args.seed, "steps": args.steps,
        "guidance_scale": args.guidance_scale,
    }))
}

fn cases(args: &Eval) -> impl Iterator<Item = Case> + '_ {
    let wanted =
        |ability: &Ability| args.only.as_ref().is_none_or(|only| ability.name().starts_with(only.as_str()));
    Ability::all().filter(wanted).flat_map(move |ability| {
        Column::ALL.into_iter().filter(move |column| column.applies(ability)).flat_map(move |column| {
            let count = if column == Column::Trained { args.cases } else { args.other_cases };
            (0..count).map(move |index| Case { ability, column, index })
        })
    })
}

async fn answer(context: &EvalContext, mut client: Client, case: Case) -> Result<Record> {
    let document = case.document(&context.world);
    let request = case.request(context, &document)?;
    let events = client.generate(request).await.with_context(|| format!("{case:?}"))?;
    let (text, image) = whole(events.map_err(explain)).await.with_context(|| format!("{case:?}"))?;
    let image = match image {
        Some(result) => {
            Some(image::load_from_memory(&result.png).context("the answer is no image")?.to_rgb8())
        }
        None => None,
    };
    let scores = match &image {
        Some(image) => case.score_image(&document, &context.judge.inspect(&scaled(image))),
        None => case.score_text(&document, &text),
    };
    Ok(Record { case, text: image.is_none().then_some(text), scores })
}

/// Returns the text and the image of an answer that came to its end: half of one is not a wrong one.
async fn whole(
    mut events: impl Stream<Item = Result<v1::GenerateEvent>> + Unpin,
) -> Result<(String, Option<v1::ImageResult>)> {
    let (mut text, mut image, mut png) = (String::new(), None, ChunkedPng::default());
    while let Some(event) = events.try_next().await? {
        match event.event {
            Some(Event::TextDelta(delta)) => text.push_str(&delta.text),
            Some(Event::ImageChunk(chunk)) => png.push(&chunk)?,
            Some(Event::Image(result)) => image = Some(png.finish(result)),
            Some(Event::Finished(_)) => return Ok((text, image)),
            _ => {}
        }
    }
    bail!("the stream ended before the answer was finished")
}

/// Returns the image at the size of scenes.
fn scaled(image: &RgbImage) -> RgbImage {
    let side = SIDE as u32;
    if image.dimensions() == (side, side) {
        return image.clone();
    }
    image::imageops::resize(image, side, side, image::imageops::FilterType::Triangle)
}

/// Returns the shares of real scenes whose thing, count and background the judge finds.
fn judge_scores(context: &EvalContext) -> [(&'static str, f64); 3] {
    let mut right = [("object", 0.0), ("count", 0.0), ("background", 0.0)];
    for index in 0..JUDGED_SCENES {
        let mut rng = context.world.random(Split::Test, "judged", index);
        let composer = context.world.composer(Split::Test);
        let scene = if index % 2 == 0 { composer.single(&mut rng) } else { composer.spread(&mut rng) };
        let verdict = context.judge.inspect(&rgb(&context.world.image(&scene)));
        let (concept, count) = scene.counts()[0];
        let found = [
            verdict.concept() == Some(concept),
            verdict.count() == count as usize,
            verdict.background == scene.background,
        ];
        for ((_, score), found) in right.iter_mut().zip(found) {
            *score += f64::from(u8::from(found)) / JUDGED_SCENES as f64;
        }
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answer_of(events: Vec<Event>) -> Result<(String, Option<v1::ImageResult>)> {
        let event = |event| Ok(v1::GenerateEvent { event: Some(event) });
        whole(stream::iter(events.into_iter().map(event))).await
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_none() {
        let delta = |text: &str| Event::TextDelta(v1::TextDelta { text: text.to_owned() });
        let finished = Event::Finished(v1::Finished::default());
        let answer = answer_of(vec![delta("a"), delta(" cat"), finished]).await.unwrap();
        assert_eq!(answer, ("a cat".to_owned(), None));
        let error = answer_of(vec![delta("a")]).await.unwrap_err().to_string();
        assert!(error.contains("before the answer was finished"), "{error}");
    }
}
