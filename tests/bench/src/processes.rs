//! One process of a measurement or a test: pinned to a core, killed, paused, watched, and gone when its owner is.

use std::{
    ffi::OsStr,
    fs::File,
    net::{SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};

/// The first port that is tried. The ports from it on lie below those that the kernel hands out to callers: a process
/// that is restarted finds its port free.
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 20_000;
/// Clock ticks a second of /proc's times; fixed in Linux's interface.
const TICKS_PER_SECOND: f64 = 100.0;
/// How long a process may take to end: far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process. Its whole process group is killed when it is dropped, and also when whoever started it dies
/// (`setpriv --pdeathsig`).
pub struct Process {
    child: Child,
    /// The name that its logs are called by.
    pub name: String,
    /// The file that its standard error goes to.
    pub log: PathBuf,
}

impl Process {
    /// Starts `program` with its output in `dir`, on one core if that is given.
    ///
    /// # Errors
    ///
    /// A log cannot be written, or the program cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        dir: &Path,
        name: &str,
        program: &Path,
        arguments: &[S],
        core: Option<usize>,
    ) -> anyhow::Result<Self> {
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = dir.join(format!("{name}.{number}.log"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some(core) = core {
            command.args(["taskset", "--cpu-list", &core.to_string()]);
        }
        command.arg(program).args(arguments).process_group(0);
        command
            .stdin(Stdio::null())
            .stdout(File::create(log.with_extension("out"))?)
            .stderr(File::create(&log)?);
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, name: name.to_owned(), log })
    }

    /// Returns the process id, which is also that of its group.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns what the process has written to standard output so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.log.with_extension("out")).unwrap_or_default()
    }

    /// Returns what the process has written to standard error so far.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal to the whole group: a program that works in children of its own (nginx) is stopped with them.
    pub fn signal(&self, signal: Signal) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // Fails only when it has ended already.
        let _ = kill_process_group(group.expect("a process id is positive"), signal);
    }

    /// Kills the process and waits until it is gone, its sockets with it.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Whether the process has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    ///
    /// The process does not end within a minute.
    pub async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            anyhow::ensure!(began.elapsed() < PATIENCE, "{} does not end", self.name);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns the processor time, in seconds, of the process and of the children that it still has.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let mut seconds = own_cpu_seconds(self.child.id())?;
        for child in children(self.child.id())? {
            seconds += own_cpu_seconds(child)?;
        }
        Ok(seconds)
    }

    /// Returns the resident memory of the process, in bytes.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        Ok(kib.context("/proc tells no VmRSS")?.trim().parse::<u64>()? * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn own_cpu_seconds(id: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name stands in brackets and may hold anything; utime and stime are the 12th and 13th field after it.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
    let fields: Vec<_> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|it| it.parse::<f64>().ok());
    let (user, system) = ticks(11).zip(ticks(12)).context("/proc/PID/stat is too short")?;
    Ok((user + system) / TICKS_PER_SECOND)
}

fn children(id: u32) -> anyhow::Result<Vec<u32>> {
    let listed = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    Ok(listed.split_whitespace().filter_map(|child| child.parse().ok()).collect())
}

/// Returns the path of a binary of this workspace, beside the one that runs.
///
/// # Errors
///
/// The binary is not there.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.with_context(|| format!("{name} is not beside {}: build it with the same profile", own.display()))
}

/// Returns the path of a program of the system, from PATH or from where Debian keeps servers.
///
/// # Errors
///
/// The program is not installed.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let found = places.map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not installed"))
}

/// Returns a loopback address that nobody listens on.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that look at the same time begin at places of their own.
    let offset = (std::process::id() % u32::from(PORTS)) as u16;
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST_PORT + (offset.wrapping_mul(7).wrapping_add(step)) % PORTS;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Returns the numbers of the cores that this process may use.
///
/// # Errors
///
/// The kernel does not tell.
pub fn cores() -> anyhow::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

/// Keeps this thread, and those that it starts later, on these cores.
///
/// # Errors
///
/// The kernel refuses it.
pub fn stay_on(cores: &[usize]) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}
