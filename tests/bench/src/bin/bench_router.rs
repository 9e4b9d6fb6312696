//! `make bench-router`: runs every row (or those named), prints the table, and writes it as JSON.

use std::{fs, net::SocketAddr, path::PathBuf, time::SystemTime};

use anyhow::Context;
use clap::Parser;
use emu2_bench::{
    figures::{Row, table},
    processes::{cores, stay_on},
    relay, rows,
};
use serde::Serialize;

/// Real routers between clients and mock stages, measured and broken.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rows to run; all by default.
    #[arg(long = "only", value_name = "NAME")]
    only: Vec<String>,
    /// Times that each measurement is made.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Short windows, to see whether rows run; writes nothing.
    #[arg(long)]
    brief: bool,
    /// Where the JSON goes.
    #[arg(long, default_value = "tests/bench/results")]
    out: PathBuf,
    /// Instead: carry bytes from the first address to the second, until killed.
    #[arg(long, num_args = 2, value_names = ["LISTEN", "TO"], hide = true)]
    relay: Vec<SocketAddr>,
}

/// The report as it lies under `results/`.
#[derive(Serialize)]
struct Report {
    date: String,
    machine: Machine,
    rounds: usize,
    met: usize,
    bars: usize,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Machine {
    cores: usize,
    cpu: String,
    /// When the run began: what else was going on.
    load_average: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let cores = cores()?;
    if let [listen, to] = arguments.relay[..] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return runtime.block_on(relay::run(listen, to));
    }
    // Threads and processes that come later inherit this; routers are pinned one by one.
    let router_core = match cores.as_slice() {
        [others @ .., last] if !others.is_empty() => {
            stay_on(others)?;
            Some(*last)
        }
        _ => None,
    };
    let setup = rows::Setup { rounds: arguments.rounds.max(1), brief: arguments.brief, router_core };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            // Processes end as their owners are dropped here.
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            ran = Box::pin(run(&arguments, &setup, cores.len())) => ran,
        }
    })
}

async fn run(arguments: &Arguments, setup: &rows::Setup, cores: usize) -> anyhow::Result<()> {
    let names: Vec<_> = rows::names().collect();
    for name in &arguments.only {
        anyhow::ensure!(names.contains(&name.as_str()), "no row {name:?}: there are {}", names.join(", "));
    }
    let machine = machine(cores)?;
    let wanted = |name: &&str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let mut report = Report { date: date(), machine, rounds: setup.rounds, met: 0, bars: 0, rows: vec![] };
    println!(
        "{}, {} ({} cores), load {}",
        report.date, report.machine.cpu, cores, report.machine.load_average
    );
    for name in names.into_iter().filter(wanted) {
        eprintln!("{name} …");
        let row = rows::run(name, setup).await.context("a name from the list is a row")?;
        print!("{}", table(std::slice::from_ref(&row)));
        report.met += row.met();
        report.bars += row.bars;
        report.rows.push(row);
    }
    if setup.brief {
        println!("\nbrief: windows are too short for these figures to mean anything");
    } else if arguments.only.is_empty() {
        fs::create_dir_all(&arguments.out)?;
        let file = arguments.out.join(format!("router-{}.json", report.date));
        fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")?;
        println!("\nwritten to {}", file.display());
    }
    println!("bars: {} of {} met", report.met, report.bars);
    Ok(())
}

fn machine(cores: usize) -> anyhow::Result<Machine> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpu = model.map_or("unknown", |(_, name)| name).to_owned();
    let load = fs::read_to_string("/proc/loadavg")?;
    let load_average = load.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
    Ok(Machine { cores, cpu, load_average })
}

/// Today in UTC, as YEAR-MONTH-DAY.
fn date() -> String {
    // Its text is RFC 3339's.
    prost_types::Timestamp::from(SystemTime::now()).to_string().chars().take(10).collect()
}
