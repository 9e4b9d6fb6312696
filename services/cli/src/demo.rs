//! `emu2 demo`: a cluster in this process, tried through its public API.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use emu2_client::{Client, ConnectionArgs, RouterArgs};
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

use crate::{
    args::Demo,
    draw::save,
    parts,
    show::{Answer, follow, timings},
};

/// All prompts and answers, beside the pictures.
const SHEET: &str = "sheet.png";

pub async fn demo(args: Demo) -> Result<()> {
    say_what_the_weights_are(&args.model_dir)?;
    let steps = demo::steps(&args.model_dir, args.photos.as_deref())?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let models = vec![ModelSource::new(args.model_dir.clone(), &args.devices)];
    let mut cluster = Cluster::start(ClusterConfig { models, ..ClusterConfig::local(vec![]) }).await?;
    let outcome = show_around(&mut cluster, steps, &args).await;
    outcome.and(cluster.stop().await)
}

async fn show_around(cluster: &mut Cluster, steps: Vec<DemoStep>, args: &Demo) -> Result<()> {
    eprintln!("loading the cluster's services …");
    cluster.ready().await?;
    println!("the cluster serves at {}", cluster.addr);
    let (addr, model) = (cluster.addr, cluster.stages[0].model.clone());
    tokio::select! {
        outcome = show(addr, model, steps, args) => outcome,
        failed = cluster.failed() => failed,
    }
}

fn say_what_the_weights_are(dir: &Path) -> Result<()> {
    let config = dir.join("config.json");
    let config = fs::read(&config).with_context(|| config.display().to_string())?;
    let config: serde_json::Value = serde_json::from_slice(&config)?;
    if config["trained"] == serde_json::Value::Bool(false) {
        println!(
            "These weights are tiny and random: answers and pictures mean nothing, every step is the real one."
        );
    } else {
        println!("Weights of {}", dir.display());
    }
    Ok(())
}

/// Every step through the public API; the pictures, and all of it on one sheet, go to the folder `--out`.
async fn show(addr: SocketAddr, model: String, steps: Vec<DemoStep>, args: &Demo) -> Result<()> {
    let connection = ConnectionArgs { timeout: Some(600.0), ..ConnectionArgs::default() };
    let router = RouterArgs { addr: format!("http://{addr}"), connection };
    let mut guide = Guide { client: Client::connect(&router).await?, model };
    let mut rows = Vec::new();
    for (number, step) in (1..).zip(steps) {
        println!("\n{number}. {}", step.title);
        let answer = match step.answer {
            AnswerKind::Text => guide.ask(&step).await?,
            AnswerKind::Image => guide.draw(&step.prompt, &args.out.join(format!("{number}.png"))).await?,
        };
        let prompt = step.prompt.iter().map(tile).collect::<Result<_>>()?;
        rows.push(Row { title: format!("{number}. {}", step.title), prompt, answer: vec![answer] });
    }
    let sheet = args.out.join(SHEET);
    sheet::draw(&rows).save(&sheet).with_context(|| sheet.display().to_string())?;
    println!("\nprompts and answers side by side: {}", sheet.display());
    Ok(())
}

fn tile(piece: &PromptPart) -> Result<Tile> {
    Ok(match piece {
        PromptPart::Text(text) => Tile::Text(text.clone()),
        PromptPart::Image(path) => {
            Tile::Image(image::open(path).with_context(|| path.display().to_string())?.to_rgb8())
        }
    })
}

fn part(piece: &PromptPart) -> Result<v1::Part> {
    match piece {
        PromptPart::Text(text) => Ok(parts::text(text)),
        PromptPart::Image(path) => parts::image(path),
    }
}

struct Guide {
    client: Client,
    model: String,
}

impl Guide {
    async fn ask(&mut self, step: &DemoStep) -> Result<Tile> {
        let answer = self.generate(&step.prompt, Output::Text(v1::TextOutput::default())).await?;
        println!("   answer: {:?}", answer.text);
        if let Some(right) = &step.right {
            println!("   right:  {right:?}");
        }
        println!("   {}", timings(&answer.finished));
        Ok(Tile::Text(answer.text))
    }

    async fn draw(&mut self, prompt: &[PromptPart], path: &Path) -> Result<Tile> {
        let answer = self.generate(prompt, Output::Image(v1::ImageOutput::default())).await?;
        save(&answer, path)?;
        println!("   {} (seed {})", path.display(), answer.finished.seed);
        println!("   {}", timings(&answer.finished));
        tile(&PromptPart::Image(path.to_owned()))
    }

    async fn generate(&mut self, prompt: &[PromptPart], output: Output) -> Result<Answer> {
        let parts = prompt.iter().map(part).collect::<Result<_>>()?;
        let request = v1::GenerateRequest {
            model: self.model.clone(),
            input: Some(Input::Prompt(v1::Prompt { parts })),
            output: Some(output),
            // The same demo shows the same pictures.
            seed: Some(7),
            ..Default::default()
        };
        follow(self.client.generate(request).await?, false).await
    }
}
