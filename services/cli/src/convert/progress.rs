//! How far a conversion is: a bar on a terminal, lines elsewhere.

use std::{
    io::IsTerminal,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Event, shards};

/// Between lines where there is no terminal.
const PERIOD: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    /// When the last line was written.
    told: Instant,
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
                self.say(&format!("{} in {}", shards(count), DecimalBytes(bytes)));
            }
            Event::Verifying(shard) => self.begin("verifying", shard),
            Event::Converting(shard) => self.begin("converting", shard),
            Event::Damaged(shard) => {
                self.say(&format!("{} is not what was written: converting it again", shard.display()));
            }
            Event::Advanced(bytes) => {
                self.bar.inc(bytes);
                if self.bar.is_hidden() && self.told.elapsed() >= PERIOD {
                    self.tell();
                }
            }
            Event::Finished if self.bar.is_hidden() => self.tell(),
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

    fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        }
        self.bar.println(line);
    }

    fn tell(&mut self) {
        self.told = Instant::now();
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let percent = (u128::from(done) * 100).checked_div(total.into()).unwrap_or(100).min(100);
        eprintln!("{} of {} ({percent} %)", DecimalBytes(done), DecimalBytes(total));
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self { bar: ProgressBar::hidden(), told: Instant::now() }
    }
}
