//! `emu2 inspect DIR`: what a model folder holds, and whether it can be served here. Nothing is started.
//!
//! Each stage is built as its service builds it, but without values: whatever is missing, misshapen or left over is
//! what serving would refuse. Pickles are read as `emu2 convert` reads them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{IsTerminal, Write},
    path::Path,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use emu2_decoder::{denoise::DiffusionPipeline, error::LoadError as DecoderError};
use emu2_encoder::eva_vit::EvaVit;
use emu2_llm::error::LoadError as LlmError;
use emu2_nn::{
    checkpoint::{CheckpointError, ModelDir, Part, Progress, Reading, canonical},
    device,
};
use indicatif::{DecimalBytes, HumanCount, ProgressBar, ProgressStyle};
use tch::{Device, Kind};

use crate::{args, convert};

/// Mistakes of a stage, and unknown names, that are spelled out at most.
const MAX_PROBLEMS: usize = 10;
/// Percent between two lines of progress where standard error is no terminal.
const STEP_PERCENT: u8 = 10;

/// Prints what a model folder holds.
///
/// # Errors
///
/// The folder cannot be read, or cannot be served on the devices.
pub(crate) async fn inspect(args: args::Inspect) -> Result<()> {
    tokio::task::spawn_blocking(move || {
        let can_be_served = report(&args, &mut std::io::stdout().lock())?;
        ensure!(can_be_served, "{} cannot be served as it is", args.dir.display());
        Ok(())
    })
    .await
    .context("the inspection panicked")?
}

/// Writes the report of a folder; returns whether it can be served.
fn report(args: &args::Inspect, out: &mut impl Write) -> Result<bool> {
    let dir = match ModelDir::open_for(&args.dir, Reading::Names, Progress::default()) {
        Err(CheckpointError::Pickled { .. }) => return pickled(&args.dir, out).map(|()| false),
        opened => opened?,
    };
    let devices = device::open(&args.devices)?;
    let kind = device::compute_kind(devices[0]);
    let words = kind_name(kind);
    writeln!(out, "layout     {}", dir.layout())?;
    writeln!(out, "model      {}{}", dir.name(), if dir.instruct() { ", tuned to chat" } else { "" })?;
    tokenizer(&dir, out)?;
    table(stored(&dir), out)?;
    unknown(dir.unknown(), out)?;
    let verdicts = Stage::ALL.map(|stage| (stage, stage.verdict(&dir, kind)));
    for (stage, verdict) in &verdicts {
        verdict.write(stage, out)?;
    }
    let memory = memory_needed(&dir, &devices, kind);
    match &memory {
        Ok(needed) => {
            let (needed, devices) = (DecimalBytes(*needed), args.devices.join(", "));
            writeln!(out, "memory     {needed} as {words} on {devices}: fits")?;
        }
        Err(error) => writeln!(out, "memory     as {words}: {error}")?,
    }
    if args.digest {
        digests(args, &verdicts, kind, out)?;
    }
    let serves = serves(&dir, &verdicts);
    let can_be_served = serves.is_some() && memory.is_ok();
    if let Some(serves) = serves {
        writeln!(out, "serves     {}", serves.join(", "))?;
    }
    if can_be_served {
        let devices = match &args.devices[..] {
            [one] if one == "cpu" => String::new(),
            devices => format!(" --devices {}", devices.join(",")),
        };
        writeln!(out, "next       emu2 up --model-dir {}{devices}", args.dir.display())?;
    }
    Ok(can_be_served)
}

/// A stage of a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Encoder,
    Llm,
    Decoder,
}

/// Whether a folder holds what a stage is built from.
#[derive(Debug)]
enum Verdict {
    /// Everything is there, and fits.
    Complete,
    /// The folder holds nothing of the stage.
    Absent,
    /// Names that are missing, misshapen or left over, in sentences.
    Broken(Vec<String>),
}

impl Stage {
    const ALL: [Self; 3] = [Self::Encoder, Self::Llm, Self::Decoder];

    fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Llm => "llm",
            Self::Decoder => "decoder",
        }
    }

    fn parts(self) -> &'static [Part] {
        match self {
            Self::Encoder => &[Part::Visual],
            Self::Llm => &[Part::Llm],
            Self::Decoder => &[Part::Unet, Part::Vae],
        }
    }

    fn verdict(self, dir: &Rc<ModelDir>, kind: Kind) -> Verdict {
        if !self.parts().iter().any(|&part| dir.has(part)) {
            return Verdict::Absent;
        }
        match self.build(dir, kind) {
            Ok(_) => Verdict::Complete,
            Err(problems) => Verdict::Broken(problems),
        }
    }

    /// Builds the stage as its service does; returns the digest of its weights, or everything that is wrong.
    fn build(self, dir: &Rc<ModelDir>, kind: Kind) -> Result<String, Vec<String>> {
        let each = |error| match error {
            CheckpointError::Mismatch { problems, .. } => problems,
            other => vec![other.to_string()],
        };
        match self {
            Self::Encoder => EvaVit::load(dir, Device::Cpu, kind).map(|(_, digest)| digest).map_err(each),
            Self::Llm => emu2_llm::load::verify(dir, kind).map_err(|error| match error {
                LlmError::Checkpoint(error) => each(error),
                other => vec![other.to_string()],
            }),
            Self::Decoder => match DiffusionPipeline::load(dir, Device::Cpu, kind) {
                Ok((_, info)) => Ok(info.weights_digest),
                Err(DecoderError::Checkpoint(error)) => Err(each(error)),
                Err(other) => Err(vec![other.to_string()]),
            },
        }
    }
}

impl Verdict {
    fn write(&self, stage: &Stage, out: &mut impl Write) -> Result<()> {
        let name = stage.name();
        match self {
            Self::Complete => writeln!(out, "{name:<10} complete")?,
            Self::Absent => writeln!(out, "{name:<10} absent")?,
            Self::Broken(problems) => {
                writeln!(out, "{name:<10} cannot be built:")?;
                for problem in problems.iter().take(MAX_PROBLEMS) {
                    writeln!(out, "             {problem}")?;
                }
                if let Some(more @ 1..) = problems.len().checked_sub(MAX_PROBLEMS) {
                    writeln!(out, "             and {more} more")?;
                }
            }
        }
        Ok(())
    }
}

/// Returns the capabilities of a cluster that serves the folder; none if it could not be started.
fn serves(dir: &ModelDir, verdicts: &[(Stage, Verdict); 3]) -> Option<Vec<&'static str>> {
    let [encoder, llm, decoder] = verdicts.each_ref().map(|(_, verdict)| verdict);
    let mut serves = match (encoder, llm) {
        (Verdict::Complete, Verdict::Complete) => vec!["embed", "text"],
        _ => return None,
    };
    if dir.instruct() {
        serves.push("chat");
    }
    match decoder {
        Verdict::Complete => serves.push("image"),
        Verdict::Absent => {}
        Verdict::Broken(_) => return None,
    }
    Some(serves)
}

/// Writes the digests of the sound stages' weights, which are read a tensor at a time.
fn digests(
    args: &args::Inspect,
    verdicts: &[(Stage, Verdict); 3],
    kind: Kind,
    out: &mut impl Write,
) -> Result<()> {
    let dir = ModelDir::open_for(&args.dir, Reading::Digest, reading())?;
    let sound = verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Complete));
    let sound: Vec<_> = sound.map(|(stage, _)| *stage).collect();
    let parts: Vec<_> = sound.iter().flat_map(|stage| stage.parts()).copied().collect();
    dir.prepare(&parts, Device::Cpu, kind)?;
    for stage in sound {
        let digest = stage.build(&dir, kind).map_err(|problems| anyhow::anyhow!(problems.join("; ")))?;
        writeln!(out, "{:<10} {digest} as {}", stage.name(), kind_name(kind))?;
    }
    Ok(())
}

/// Returns the progress of reading weights: a bar on a terminal, lines elsewhere.
fn reading() -> Progress {
    if !std::io::stderr().is_terminal() {
        return Progress::observed(|percent| {
            if percent.is_multiple_of(STEP_PERCENT) {
                eprintln!("reading weights: {percent} %");
            }
        });
    }
    let bar = ProgressBar::new(100);
    let style = ProgressStyle::with_template("reading weights {bar:30} {percent} % eta {eta}");
    bar.set_style(style.expect("the template is well formed"));
    bar.enable_steady_tick(Duration::from_millis(200));
    Progress::observed(move |percent| {
        bar.set_position(percent.into());
        if percent == 100 {
            bar.finish_and_clear();
        }
    })
}

/// The sums of one part's tensors.
#[derive(Debug, Default)]
struct Row {
    tensors: u64,
    values: u64,
    bytes: u64,
    dtypes: BTreeSet<String>,
}

fn stored(dir: &ModelDir) -> Vec<(String, Row)> {
    let row = |part: emu2_nn::checkpoint::Contents| {
        let (tensors, dtypes) = (part.tensors as u64, part.dtypes);
        (part.part.to_string(), Row { tensors, values: part.values, bytes: part.bytes, dtypes })
    };
    dir.contents().into_iter().map(row).collect()
}

fn table(rows: Vec<(String, Row)>, out: &mut impl Write) -> Result<()> {
    writeln!(out, "{:<10} {:>8} {:>16} {:>11}  stored as", "part", "tensors", "parameters", "size")?;
    for (name, row) in rows {
        let (tensors, values) = (HumanCount(row.tensors).to_string(), HumanCount(row.values).to_string());
        let (size, dtypes) = (DecimalBytes(row.bytes).to_string(), Vec::from_iter(row.dtypes).join(", "));
        writeln!(out, "{name:<10} {tensors:>8} {values:>16} {size:>11}  {dtypes}")?;
    }
    Ok(())
}

/// Writes what the folder has of a tokenizer; whether it fits the embedding table, the llm's verdict says.
fn tokenizer(dir: &ModelDir, out: &mut impl Write) -> Result<()> {
    match (dir.tokenizer_bytes(), dir.added_tokens()) {
        (Ok(bytes), Ok(added)) => {
            let added =
                added.map_or(String::new(), |added| format!(", added_tokens.json with {}", added.len()));
            writeln!(out, "tokenizer  {}{added}", DecimalBytes(bytes.len() as u64))?;
        }
        (Err(error), _) | (_, Err(error)) => writeln!(out, "tokenizer  {error}")?,
    }
    Ok(())
}

fn unknown(names: &[String], out: &mut impl Write) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let cited: Vec<_> = names.iter().take(MAX_PROBLEMS).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > MAX_PROBLEMS { ", …" } else { "" };
    writeln!(out, "unknown    {}: {}{more}", HumanCount(names.len() as u64), cited.join(", "))?;
    Ok(())
}

/// Writes the report of a folder of pickles, as published: what they hold, and the command that converts them.
fn pickled(dir: &Path, out: &mut impl Write) -> Result<()> {
    let outline = convert::outline(dir)?;
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for tensor in outline.tensors {
        let part = canonical(&tensor.name).map_or("other".to_owned(), |(part, _)| part.to_string());
        let row = rows.entry(part).or_default();
        row.tensors += 1;
        row.values += tensor.values;
        row.bytes += tensor.bytes;
        row.dtypes.insert(tensor.dtype);
    }
    writeln!(out, "weights    pickled, in {} files; they call no code", outline.files)?;
    table(rows.into_iter().collect(), out)?;
    let needed = DecimalBytes(outline.written_bytes);
    writeln!(out, "next       emu2 convert {} OUT, which takes {needed} in OUT", dir.display())?;
    Ok(())
}

/// Returns the bytes of all weights, if they fit as `emu2 up` places them: the llm's layers on all devices, the rest on
/// the first.
fn memory_needed(dir: &ModelDir, devices: &[Device], kind: Kind) -> Result<u64> {
    let mut shares = Vec::new();
    for part in Part::ALL.into_iter().filter(|&part| dir.has(part)) {
        match part {
            Part::Llm => shares.extend(emu2_llm::load::room(dir, devices, kind)?),
            _ => shares.push((devices[0], dir.bytes(part, kind))),
        }
    }
    device::check_room(&shares)?;
    Ok(shares.iter().map(|(_, bytes)| bytes).sum())
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests;
