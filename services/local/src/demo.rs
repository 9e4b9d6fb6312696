//! `emu2 demo`: a cluster in this process, tried through its public API.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use emu2_client::{
    Answer, Client, ConnectionArgs, RouterArgs, follow,
    parts::{image_part, text},
};
use emu2_proto::v1::{
    self,
    generate_request::{Input, Output},
};
use emu2_sheet::{
    demo::{self, AnswerKind, DemoStep, PromptPart},
    sheet::{self, Row, Tile},
};
use emu2_standalone::{
    cluster::{Cluster, ClusterConfig},
    plan::ModelSource,
};

use crate::args::Demo;

/// The contact sheet of all prompts and answers, in the folder of the images.
const SHEET: &str = "sheet.png";

pub(crate) async fn demo(args: Demo) -> Result<()> {
    print_weights(&args.model_dir)?;
    let steps = demo::steps(&args.model_dir, args.photos.as_deref())?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let models = vec![ModelSource::new(args.model_dir.clone(), &args.devices)];
    let mut cluster = Cluster::start(ClusterConfig { models, ..ClusterConfig::local(vec![]) }).await?;
    let outcome = run(&mut cluster, steps, &args).await;
    outcome.and(cluster.stop().await)
}

async fn run(cluster: &mut Cluster, steps: Vec<DemoStep>, args: &Demo) -> Result<()> {
    eprintln!("loading the cluster's services …");
    cluster.ready().await?;
    println!("the cluster serves at {}", cluster.addr);
    let (addr, model) = (cluster.addr, cluster.stages[0].model.clone());
    tokio::select! {
        outcome = run_steps(addr, model, steps, args) => outcome,
        failed = cluster.failed() => failed,
    }
}

fn print_weights(dir: &Path) -> Result<()> {
    let config = dir.join("config.json");
    let config = fs::read(&config).with_context(|| config.display().to_string())?;
    let config: serde_json::Value = serde_json::from_slice(&config)?;
    if config["trained"] == serde_json::Value::Bool(false) {
        println!(
            "These weights are tiny and random: answers and images mean nothing, every step is the real one."
        );
    } else {
        println!("Weights of {}", dir.display());
    }
    Ok(())
}

/// Sends every prompt through the public API; the images, and a sheet of prompts and answers, go to the folder `--out`.
async fn run_steps(addr: SocketAddr, model: String, steps: Vec<DemoStep>, args: &Demo) -> Result<()> {
    let connection = ConnectionArgs { timeout: Some(600.0), ..ConnectionArgs::default() };
    let router = RouterArgs { addr: format!("http://{addr}"), connection };
    let mut client = DemoClient { client: Client::connect(&router).await?, model };
    let mut rows = Vec::new();
    for (number, step) in (1..).zip(steps) {
        println!("\n{number}. {}", step.title);
        let answer = match step.answer {
            AnswerKind::Text => client.ask(&step).await?,
            AnswerKind::Image => client.draw(&step.prompt, &args.out.join(format!("{number}.png"))).await?,
        };
        let prompt = step.prompt.iter().map(tile).collect::<Result<_>>()?;
        rows.push(Row { title: format!("{number}. {}", step.title), prompt, answer: vec![answer] });
    }
    let sheet = args.out.join(SHEET);
    sheet::draw(&rows).save(&sheet).with_context(|| sheet.display().to_string())?;
    println!("\nprompts and answers side by side: {}", sheet.display());
    Ok(())
}

fn tile(part: &PromptPart) -> Result<Tile> {
    Ok(match part {
        PromptPart::Text(text) => Tile::Text(text.clone()),
        PromptPart::Image(path) => {
            Tile::Image(image::open(path).with_context(|| path.display().to_string())?.to_rgb8())
        }
    })
}

fn request_part(part: &PromptPart) -> Result<v1::Part> {
    match part {
        PromptPart::Text(literal) => Ok(text(literal)),
        PromptPart::Image(path) => image_part(path),
    }
}

/// A client of the demo's cluster.
struct DemoClient {
    client: Client,
    model: String,
}

impl DemoClient {
    async fn ask(&mut self, step: &DemoStep) -> Result<Tile> {
        let answer = self.generate(&step.prompt, Output::Text(v1::TextOutput::default())).await?;
        println!("   answer: {:?}", answer.text);
        if let Some(right) = &step.right {
            println!("   right:  {right:?}");
        }
        println!("   {}", answer.timings());
        Ok(Tile::Text(answer.text))
    }

    async fn draw(&mut self, prompt: &[PromptPart], path: &Path) -> Result<Tile> {
        let answer = self.generate(prompt, Output::Image(v1::ImageOutput::default())).await?;
        answer.save_image(path)?;
        println!("   {} (seed {})", path.display(), answer.finished.seed);
        println!("   {}", answer.timings());
        tile(&PromptPart::Image(path.to_owned()))
    }

    async fn generate(&mut self, prompt: &[PromptPart], output: Output) -> Result<Answer> {
        let parts = prompt.iter().map(request_part).collect::<Result<_>>()?;
        let request = v1::GenerateRequest {
            model: self.model.clone(),
            input: Some(Input::Prompt(v1::Prompt { parts })),
            output: Some(output),
            // The same demo shows the same images.
            seed: Some(7),
            ..Default::default()
        };
        follow(self.client.generate(request).await?, false).await
    }
}
