//! `emu2 demo`: a cluster in this process, tried through its public API on a real photograph.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use emu2_proto::v1::{
    self,
    generate_request::{Input, Output},
};

use crate::{
    args::{Demo, Server},
    client::Client,
    cluster::{Cluster, ClusterConfig},
    draw::save,
    parts::{image, text},
    plan::ModelSource,
    show::{Answer, follow, timings},
};

pub async fn demo(args: Demo) -> Result<()> {
    say_what_the_weights_are(&args.model_dir)?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let models = vec![ModelSource::new(args.model_dir.clone(), &args.devices)];
    let mut cluster = Cluster::start(ClusterConfig { models, ..ClusterConfig::local(vec![]) }).await?;
    let outcome = show_around(&mut cluster, &args).await;
    outcome.and(cluster.stop().await)
}

async fn show_around(cluster: &mut Cluster, args: &Demo) -> Result<()> {
    eprintln!("loading the cluster's services …");
    cluster.ready().await?;
    println!("the cluster serves at {}", cluster.addr);
    let (addr, model) = (cluster.addr, cluster.stages[0].model.clone());
    tokio::select! {
        outcome = tour(addr, model, args) => outcome,
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

async fn tour(addr: SocketAddr, model: String, args: &Demo) -> Result<()> {
    let server = Server { addr: format!("http://{addr}"), timeout: Some(600.0), ..Default::default() };
    let mut guide = Guide { client: Client::connect(&server).await?, model };
    let cat = || image(&args.photos.join("chelsea.png"));
    let cup = || image(&args.photos.join("coffee.png"));

    println!("\n1. A question about a photograph (chelsea.png)");
    guide.ask(vec![cat()?, text("Describe the image in details:")]).await?;

    println!("\n2. The task shown by two examples (coffee.png, chelsea.png → coffee.png)");
    guide.ask(vec![cup()?, text("[cup: 1]."), cat()?, text("[cat: 1]."), cup()?]).await?;

    println!("\n3. A picture from words");
    guide.draw(vec![text("a cup of coffee on a wooden table")], &args.out.join("from-words.png")).await?;

    println!("\n4. A picture from a photograph and words");
    guide
        .draw(
            vec![cat()?, text("wearing a red hat on the beach")],
            &args.out.join("from-photo-and-words.png"),
        )
        .await?;

    println!("\n5. The photograph through the visual encoder and back");
    guide.draw(vec![cat()?], &args.out.join("autoencoded.png")).await?;
    Ok(())
}

struct Guide {
    client: Client,
    model: String,
}

impl Guide {
    async fn ask(&mut self, parts: Vec<v1::Part>) -> Result<()> {
        let answer = self.generate(parts, Output::Text(v1::TextOutput::default())).await?;
        println!("   answer: {:?}", answer.text);
        println!("   {}", timings(&answer.finished));
        Ok(())
    }

    async fn draw(&mut self, parts: Vec<v1::Part>, path: &Path) -> Result<()> {
        let answer = self.generate(parts, Output::Image(v1::ImageOutput::default())).await?;
        save(&answer, path)?;
        println!("   {} (seed {})", path.display(), answer.finished.seed);
        println!("   {}", timings(&answer.finished));
        Ok(())
    }

    async fn generate(&mut self, parts: Vec<v1::Part>, output: Output) -> Result<Answer> {
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
