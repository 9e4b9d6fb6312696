//! `emu2 ask` and `emu2 chat`: answers in text.

use std::{
    io::{IsTerminal, Write},
    path::Path,
};

use anyhow::{Context, Result};
use emu2_client::{
    Client, follow,
    parts::{image_part, text},
};
use emu2_proto::v1::{
    self, Capability, Role,
    generate_request::{Input, Output},
};

use crate::{
    args::{Ask, Chat, TextArgs},
    parts::from_words,
};

/// Asks for a text and prints it.
pub(crate) async fn ask(args: Ask) -> Result<()> {
    let prompt = v1::Prompt { parts: from_words(&args.parts)? };
    let mut client = Client::connect(&args.target.router).await?;
    let model = client.pick(args.target.model.as_deref(), Capability::Text).await?;
    let request = v1::GenerateRequest {
        model,
        input: Some(Input::Prompt(prompt)),
        output: Some(Output::Text(text_output(&args.text))),
        seed: args.target.seed,
        ..Default::default()
    };
    let answer = follow(client.generate(request).await?, true).await?;
    println!();
    eprintln!("{}", answer.timings());
    Ok(())
}

/// Holds a dialogue on standard input. Answers are greedy unless --beams asks for more, so that they stream.
pub(crate) async fn chat(args: Chat) -> Result<()> {
    let mut client = Client::connect(&args.target.router).await?;
    let model = client.pick(args.target.model.as_deref(), Capability::Chat).await?;
    let output = v1::TextOutput { num_beams: Some(args.text.beams.unwrap_or(1)), ..text_output(&args.text) };
    let mut turns: Vec<v1::Turn> = Vec::new();
    let mut attached = Vec::new();
    while let Some(line) = read_line(&model).await? {
        if let Some(path) = line.strip_prefix("/image ") {
            match image_part(Path::new(path.trim())) {
                Ok(image) => attached.push(image),
                Err(error) => eprintln!("{error:#}"),
            }
            continue;
        }
        let mut parts = std::mem::take(&mut attached);
        parts.push(text(line));
        turns.push(v1::Turn { role: Role::User.into(), parts });
        let request = v1::GenerateRequest {
            model: model.clone(),
            input: Some(Input::Chat(v1::Chat { turns: turns.clone(), system_message: args.system.clone() })),
            output: Some(Output::Text(output)),
            seed: args.target.seed,
            ..Default::default()
        };
        match answer(&mut client, request).await {
            Ok(reply) => turns.push(v1::Turn { role: Role::Assistant.into(), parts: vec![text(reply)] }),
            // The dialogue goes on without the turn that failed.
            Err(error) => {
                turns.pop();
                eprintln!("{error:#}");
            }
        }
    }
    Ok(())
}

async fn answer(client: &mut Client, request: v1::GenerateRequest) -> Result<String> {
    let answer = follow(client.generate(request).await?, true).await?;
    println!();
    Ok(answer.text)
}

/// Returns the next line that is not empty; none at the end of input.
async fn read_line(model: &str) -> Result<Option<String>> {
    let prompt = format!("{model}> ");
    let read = move || -> std::io::Result<Option<String>> {
        loop {
            if std::io::stdin().is_terminal() {
                print!("{prompt}");
                std::io::stdout().flush()?;
            }
            let mut line = String::new();
            if std::io::stdin().read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if !line.trim().is_empty() {
                return Ok(Some(line.trim().to_owned()));
            }
        }
    };
    tokio::task::spawn_blocking(read).await?.context("standard input")
}

fn text_output(args: &TextArgs) -> v1::TextOutput {
    v1::TextOutput {
        max_new_tokens: args.max_new_tokens,
        num_beams: args.beams,
        do_sample: args.temperature.is_some(),
        temperature: args.temperature,
        top_p: args.top_p,
        grounding: args.grounding,
        ..Default::default()
    }
}
