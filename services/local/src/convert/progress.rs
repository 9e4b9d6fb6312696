//! The events of a conversion, and how they are shown: a bar on a terminal, lines elsewhere.

use std::{
    io::IsTerminal,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between lines where there is no terminal.
const PERIOD: Duration = Duration::from_secs(30);

/// An event of a conversion.
#[derive(Debug)]
pub(super) enum Event<'a> {
    /// The plan is made: so many shards with so many bytes in all.
    Planned { shards: usize, bytes: u64 },
    /// A shard of an earlier run is compared with its checksum.
    Verifying(&'a Path),
    /// A shard of an earlier run does not have its checksum.
    Damaged(&'a Path),
    /// A shard is written.
    Converting(&'a Path),
    /// So many bytes more were written or verified.
    Advanced(u64),
    /// The shard that was verified or written is finished.
    Finished,
}

/// A callback that hears of every event.
pub(super) type Watch<'a> = &'a mut dyn FnMut(Event<'_>);

/// The progress bar of a conversion.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    /// When the last line was written.
    last_line: Instant,
}

impl Progress {
    pub(super) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Planned { shards: count, bytes } => {
                let target = if std::io::stderr().is_terminal() {
                    ProgressDrawTarget::stderr()
                } else {
                    ProgressDrawTarget::hidden()
                };
                self.bar = ProgressBar::with_draw_target(Some(bytes), target);
                let style =
                    "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta}";
                self.bar.set_style(ProgressStyle::with_template(style).expect("the template is well formed"));
                self.bar.enable_steady_tick(Duration::from_millis(200));
                self.print_line(&format!("{} in {}", shard_count(count), DecimalBytes(bytes)));
            }
            Event::Verifying(shard) => self.begin("verifying", shard),
            Event::Converting(shard) => self.begin("converting", shard),
            Event::Damaged(shard) => {
                self.print_line(&format!("{} is not what was written: converting it again", shard.display()));
            }
            Event::Advanced(bytes) => {
                self.bar.inc(bytes);
                if self.bar.is_hidden() && self.last_line.elapsed() >= PERIOD {
                    self.print_position();
                }
            }
            Event::Finished if self.bar.is_hidden() => self.print_position(),
            Event::Finished => {}
        }
    }

    fn begin(&self, doing: &str, shard: &Path) {
        let message = format!("{doing} {}", shard.display());
        if self.bar.is_hidden() {
            eprintln!("{message}");
        }
        self.bar.set_message(message);
    }

    fn print_line(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        }
        self.bar.println(line);
    }

    fn print_position(&mut self) {
        self.last_line = Instant::now();
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let percent = (u128::from(done) * 100).checked_div(total.into()).unwrap_or(100).min(100);
        eprintln!("{} of {} ({percent} %)", DecimalBytes(done), DecimalBytes(total));
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self { bar: ProgressBar::hidden(), last_line: Instant::now() }
    }
}

/// Returns a number of shards in words, such as "1 shard".
pub(super) fn shard_count(count: usize) -> String {
    format!("{count} shard{}", if count == 1 { "" } else { "s" })
}
