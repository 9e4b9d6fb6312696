//! Pools of mock stages and routers in front of them, as processes on loopback.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use emu2_proto::v1::{ListModelsRequest, emu2_client::Emu2Client};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::Channel;

use crate::processes::{Process, binary, free_address, program};

/// The name of the one model of every cluster here.
pub const MODEL: &str = "emu2";
/// How long anything here may take to start: far above what it takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the replicas of a stage are, as `mock-stage` takes it.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The role: `encoder`, `llm` or `decoder`.
    pub role: &'static str,
    /// The further arguments, which set costs and the weights digest.
    pub arguments: Vec<String>,
}

impl Stage {
    /// Makes a stage of a role; `costs` are as on the command line: `--image-ms 5 --rows 8`.
    pub fn new(role: &'static str, costs: &str) -> Self {
        Self { role, arguments: costs.split_whitespace().map(str::to_owned).collect() }
    }
}

/// A process that serves replicas of one stage. It keeps its address over restarts when it serves one.
pub struct Replica {
    /// What the process serves.
    pub stage: Stage,
    listen: SocketAddr,
    dir: PathBuf,
    core: Option<usize>,
    /// The process.
    pub process: Process,
    /// The endpoints of its replicas, as a router's configuration names them.
    pub endpoints: Vec<String>,
    admins: Vec<SocketAddr>,
}

impl Replica {
    /// Starts the process and waits until it listens; its output goes to `dir`, and it stays on `core` if one is given.
    ///
    /// # Errors
    ///
    /// The process cannot be started or does not listen in time.
    pub async fn start(dir: &Path, stage: &Stage, core: Option<usize>) -> anyhow::Result<Self> {
        let listen = free_address();
        let process = Self::spawn(dir, stage, listen, core)?;
        let mut replica = Self {
            stage: stage.clone(),
            listen,
            dir: dir.to_owned(),
            core,
            process,
            endpoints: vec![],
            admins: vec![],
        };
        replica.listening().await?;
        Ok(replica)
    }

    fn spawn(dir: &Path, stage: &Stage, listen: SocketAddr, core: Option<usize>) -> anyhow::Result<Process> {
        let mut arguments = vec![stage.role.to_owned(), "--listen".into(), listen.to_string()];
        arguments.extend(stage.arguments.iter().cloned());
        Process::start(dir, stage.role, &binary("mock-stage")?, &arguments, core)
    }

    /// Starts the process again on its address, after killing it if it still runs.
    ///
    /// # Errors
    ///
    /// Those of [`Self::start`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill();
        self.process = Self::spawn(&self.dir, &self.stage, self.listen, self.core)?;
        self.listening().await
    }

    /// Restarts the process as [`Self::restart`] does, as another stage: a roll to other weights.
    ///
    /// # Errors
    ///
    /// Those of [`Self::start`].
    pub async fn restart_as(&mut self, stage: Stage) -> anyhow::Result<()> {
        self.stage = stage;
        self.restart().await
    }

    async fn listening(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let wanted = self.stage.arguments.iter().skip_while(|it| *it != "--replicas").nth(1);
        let wanted = wanted.map_or(Ok(1), |count| count.parse::<usize>())?;
        loop {
            let output = self.process.output();
            let lines: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("ready ")).collect();
            if lines.len() == wanted {
                let addresses = lines.iter().filter_map(|line| line.split_once(' '));
                let (endpoints, admins): (Vec<_>, Vec<_>) = addresses.unzip();
                self.endpoints = endpoints.into_iter().map(str::to_owned).collect();
                let admins =
                    admins.into_iter().filter_map(|admin| admin.strip_prefix("http://")?.parse().ok());
                self.admins = admins.collect();
                return Ok(());
            }
            anyhow::ensure!(
                began.elapsed() < PATIENCE && self.process.is_running(),
                "{} does not start: {}",
                self.process.name,
                self.process.errors()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Returns the sum of a metric over the replicas of the process; 0 while it is down.
    pub async fn metric(&self, name: &str) -> f64 {
        let mut sum = 0.0;
        for admin in &self.admins {
            let text = metrics(*admin).await.unwrap_or_default();
            sum += value(&text, name).unwrap_or(0.0);
        }
        sum
    }
}

/// Reads the text of `/metrics` at an admin address.
///
/// # Errors
///
/// Nobody answers there.
pub async fn metrics(admin: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(admin).await?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// Returns the value of a series, whose labels are part of its name; none if the metrics have no such series.
pub fn value(metrics: &str, series: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A router as a process.
pub struct Router {
    /// The process.
    pub process: Process,
    /// The address of its API.
    pub address: SocketAddr,
    /// The address of its metrics and health.
    pub admin: SocketAddr,
}

impl Router {
    /// Opens a channel of its own to the router.
    pub fn client(&self) -> Emu2Client<Channel> {
        client_of(self.address)
    }

    /// Waits until every stage has answered the router.
    ///
    /// # Errors
    ///
    /// The router ends, or is not ready in time.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut client = self.client();
        loop {
            if let Ok(listing) = client.list_models(ListModelsRequest {}).await
                && listing.get_ref().models.iter().all(|model| model.ready)
            {
                return Ok(());
            }
            anyhow::ensure!(
                began.elapsed() < PATIENCE && self.process.is_running(),
                "the router is not ready: {}",
                self.process.errors()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Opens a channel to an address as services of the cluster do.
pub fn client_of(address: SocketAddr) -> Emu2Client<Channel> {
    let endpoint = emu2_serve::client::endpoint(format!("http://{address}"));
    let channel = endpoint.expect("an address makes an endpoint").connect_lazy();
    Emu2Client::new(channel).max_decoding_message_size(64 << 20)
}

/// How many replicas of what a cluster has, and what its routers are told beside their endpoints.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the encoders are.
    pub encoder: Stage,
    /// What the llms are.
    pub llm: Stage,
    /// What the decoders are.
    pub decoder: Stage,
    /// How many processes each stage has.
    pub replicas: usize,
    /// The lines of the router's `[server]`.
    pub server: String,
    /// Further tables of the router's configuration.
    pub tables: String,
    /// The core that routers stay on; none for any.
    pub router_core: Option<usize>,
    /// The core that stages stay on; none for any.
    pub stage_core: Option<usize>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            encoder: Stage::new("encoder", ""),
            llm: Stage::new("llm", ""),
            decoder: Stage::new("decoder", ""),
            replicas: 1,
            server: String::new(),
            tables: NO_CACHE.into(),
            router_core: None,
            stage_core: None,
        }
    }
}

/// The table of a router's configuration that turns its cache off.
pub const NO_CACHE: &str = "[cache]\nmemory_bytes = 0\n";

/// A running cluster; its processes end when it is dropped.
pub struct Cluster {
    /// What the cluster was started by.
    pub plan: Plan,
    /// The processes of the encoder's pool.
    pub encoders: Vec<Replica>,
    /// The processes of the llm's pool.
    pub llms: Vec<Replica>,
    /// The processes of the decoder's pool.
    pub decoders: Vec<Replica>,
    /// The routers in front of them.
    pub routers: Vec<Router>,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Starts the stages and one router, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// A process does not start in time.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let mut cluster = Self::without_router(plan).await?;
        cluster.add_router().await?;
        Ok(cluster)
    }

    /// Starts the stages alone.
    ///
    /// # Errors
    ///
    /// A process does not start in time.
    pub async fn without_router(plan: Plan) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut pools = [Vec::new(), Vec::new(), Vec::new()];
        for (pool, stage) in pools.iter_mut().zip([&plan.encoder, &plan.llm, &plan.decoder]) {
            for _ in 0..plan.replicas {
                pool.push(Replica::start(dir.path(), stage, plan.stage_core).await?);
            }
        }
        let [encoders, llms, decoders] = pools;
        Ok(Self { plan, encoders, llms, decoders, routers: vec![], dir })
    }

    /// Returns the folder of logs and configurations, which is removed with the cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts another router in front of the same stages, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// The router does not start in time.
    pub async fn add_router(&mut self) -> anyhow::Result<()> {
        let mut router = self.spawn_router(free_address())?;
        router.ready().await?;
        self.routers.push(router);
        Ok(())
    }

    /// Starts a router on this address, without waiting until it is ready.
    ///
    /// # Errors
    ///
    /// The process cannot be started.
    pub fn spawn_router(&self, address: SocketAddr) -> anyhow::Result<Router> {
        let admin = free_address();
        let pool = |replicas: &[Replica]| {
            let endpoints: Vec<_> = replicas.iter().flat_map(|replica| &replica.endpoints).collect();
            format!("{endpoints:?}")
        };
        let models = format!(
            "[[models]]\nname = \"{MODEL}\"\nencoder = {}\nllm = {}\ndecoder = {}\n",
            pool(&self.encoders),
            pool(&self.llms),
            pool(&self.decoders)
        );
        let server = format!("[server]\nlisten = \"{address}\"\nadmin = \"{admin}\"\n{}\n", self.plan.server);
        let telemetry = "[telemetry]\nlog = \"warn\"\n";
        let file = self.dir.path().join(format!("router-{}.toml", address.port()));
        fs::write(&file, format!("{server}{telemetry}{}\n{models}", self.plan.tables))?;
        let arguments = [Path::new("--config"), &file];
        let process = Process::start(
            self.dir.path(),
            "emu2-router",
            &binary("emu2-router")?,
            &arguments,
            self.plan.router_core,
        )?;
        Ok(Router { process, address, admin })
    }

    /// Returns the first router.
    ///
    /// # Panics
    ///
    /// The cluster was started without one.
    pub fn router(&self) -> &Router {
        &self.routers[0]
    }

    /// Returns every process of every stage.
    pub fn replicas(&mut self) -> impl Iterator<Item = &mut Replica> {
        self.encoders.iter_mut().chain(&mut self.llms).chain(&mut self.decoders)
    }

    /// Returns the pool of a stage by its number modulo 3: encoder, llm, decoder.
    pub fn pool(&mut self, number: usize) -> &mut Vec<Replica> {
        match number % 3 {
            0 => &mut self.encoders,
            1 => &mut self.llms,
            _ => &mut self.decoders,
        }
    }
}

/// A redis-server of its own, without persistence.
pub struct Redis {
    /// The process.
    pub process: Process,
    address: SocketAddr,
    dir: PathBuf,
}

impl Redis {
    /// Starts a server on a free address and waits until it listens.
    ///
    /// # Errors
    ///
    /// redis-server is not installed or does not start in time.
    pub async fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_on(dir, free_address()).await
    }

    async fn start_on(dir: &Path, address: SocketAddr) -> anyhow::Result<Self> {
        let port = address.port().to_string();
        let arguments = ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        let process = Process::start(dir, "redis", &program("redis-server")?, &arguments, None)?;
        let began = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            anyhow::ensure!(began.elapsed() < PATIENCE, "redis-server does not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(Self { process, address, dir: dir.to_owned() })
    }

    /// Returns the server's URL, as a router's configuration names it.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Stops the process where it is; connections stay open and nothing is answered.
    pub fn pause(&self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets a paused process go on.
    pub fn go_on(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Starts the server again, empty, on its address.
    ///
    /// # Errors
    ///
    /// The server does not come back in time.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill();
        *self = Self::start_on(&self.dir, self.address).await.context("redis-server does not come back")?;
        Ok(())
    }
}
