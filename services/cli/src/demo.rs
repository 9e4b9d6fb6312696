//! `emu2 demo`: a cluster in this process, tried through its public API.

pub mod tour;

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use emu2_proto::v1::{
    self,
    generate_request::{Input, Output},
};

use crate::{
    args::{Connection, Demo, Server},
    client::Client,
    cluster::{Cluster, ClusterConfig},
    draw::save,
    parts,
    plan::ModelSource,
    sheet::{self, Row, Tile},
    show::{Answer, follow, timings},
};
use tour::{Piece, Step};

/// All prompts and answers, beside the pictures.
const SHEET: &str = "sheet.png";

pub async fn demo(args: Demo) -> Result<()> {
    say_what_the_weights_are(&args.model_dir)?;
    let steps = tour::steps(&args.model_dir, args.photos.as_deref())?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let models = vec![ModelSource::new(args.model_dir.clone(), &args.devices)];
    let mut cluster = Cluster::start(ClusterConfig { models, ..ClusterConfig::local(vec![]) }).await?;
    let outcome = show_around(&mut cluster, steps, &args).await;
    outcome.and(cluster.stop().await)
}

async fn show_around(cluster: &mut Cluster, steps: Vec<Step>, args: &Demo) -> Result<()> {
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
async fn show(addr: SocketAddr, model: String, steps: Vec<Step>, args: &Demo) -> Result<()> {
    let connection = Connection { timeout: Some(600.0), ..Connection::default() };
    let server = Server { addr: format!("http://{addr}"), connection };
    let mut guide = Guide { client: Client::connect(&server).await?, model };
    let mut rows = Vec::new();
    for (number, step) in (1..).zip(steps) {
        println!("\n{number}. {}", step.title);
        let made = match step.answer {
            tour::Answer::Text => guide.ask(&step).await?,
            tour::Answer::Picture => {
                guide.draw(&step.prompt, &args.out.join(format!("{number}.png"))).await?
            }
        };
        let given = step.prompt.iter().map(tile).collect::<Result<_>>()?;
        rows.push(Row { title: format!("{number}. {}", step.title), given, made: vec![made] });
    }
    let sheet = args.out.join(SHEET);
    sheet::draw(&rows).save(&sheet).with_context(|| sheet.display().to_string())?;
    println!("\nprompts and answers side by side: {}", sheet.display());
    Ok(())
}

fn tile(piece: &Piece) -> Result<Tile> {
    Ok(match piece {
        Piece::Text(text) => Tile::Text(text.clone()),
        Piece::Image(path) => {
            Tile::Picture(image::open(path).with_context(|| path.display().to_string())?.to_rgb8())
        }
    })
}

fn part(piece: &Piece) -> Result<v1::Part> {
    match piece {
        Piece::Text(text) => Ok(parts::text(text)),
        Piece::Image(path) => parts::image(path),
    }
}

struct Guide {
    client: Client,
    model: String,
}

impl Guide {
    async fn ask(&mut self, step: &Step) -> Result<Tile> {
        let answer = self.generate(&step.prompt, Output::Text(v1::TextOutput::default())).await?;
        println!("   answer: {:?}", answer.text);
        if let Some(right) = &step.right {
            println!("   right:  {right:?}");
        }
        println!("   {}", timings(&answer.finished));
        Ok(Tile::Text(answer.text))
    }

    async fn draw(&mut self, prompt: &[Piece], path: &Path) -> Result<Tile> {
        let answer = self.generate(prompt, Output::Image(v1::ImageOutput::default())).await?;
        save(&answer, path)?;
        println!("   {} (seed {})", path.display(), answer.finished.seed);
        println!("   {}", timings(&answer.finished));
        tile(&Piece::Image(path.to_owned()))
    }

    async fn generate(&mut self, prompt: &[Piece], output: Output) -> Result<Answer> {
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
