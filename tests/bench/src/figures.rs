//! What a row measured: one value a round, their median and range, and the bar beside it.

use std::time::Duration;

use serde::Serialize;

/// How a figure is judged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    /// The figure's median must be at most this.
    AtMost(f64),
    /// The figure's median must be at least this.
    AtLeast(f64),
    /// The figure must be this in every round: a count.
    Exactly(f64),
}

impl Bar {
    /// Whether a value meets the bar.
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
            // Counts: whole numbers, held exactly.
            Self::Exactly(limit) => value == limit,
        }
    }

    fn limit(self) -> f64 {
        match self {
            Self::AtMost(limit) | Self::AtLeast(limit) | Self::Exactly(limit) => limit,
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::AtMost(_) => "≤",
            Self::AtLeast(_) => "≥",
            Self::Exactly(_) => "=",
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// The unit of the values.
    pub unit: &'static str,
    /// The values, one for each round.
    pub values: Vec<f64>,
    /// How the figure is judged; none where it is only told.
    pub bar: Option<Bar>,
}

/// What a row of the benchmark hands back.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The row's name.
    pub name: &'static str,
    /// The conditions under which it was measured.
    pub conditions: String,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// Differences found, causes seen: for whoever reads the numbers.
    pub notes: Vec<String>,
    /// Why the row could not run; its bars then count as not met.
    pub failed: Option<String>,
    /// How many bars the row holds, run or not.
    pub bars: usize,
}

impl Row {
    /// Returns how many of its bars the row meets.
    pub fn met(&self) -> usize {
        self.figures.iter().filter(|figure| figure.is_met() == Some(true)).count()
    }
}

impl Figure {
    /// Makes a figure without values and without a bar.
    pub fn new(what: impl Into<String>, unit: &'static str) -> Self {
        Self { what: what.into(), unit, values: vec![], bar: None }
    }

    /// Sets how the figure is judged.
    #[must_use]
    pub fn bar(mut self, bar: Bar) -> Self {
        self.bar = Some(bar);
        self
    }

    /// Adds the value of one more round.
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Returns the median over the rounds; NaN without any.
    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    /// Whether the figure meets its bar; none without a bar. Without a value no bar is met, and what must be exact must
    /// be so in every round.
    pub fn is_met(&self) -> Option<bool> {
        let bar = self.bar?;
        let met = match bar {
            Bar::Exactly(_) => !self.values.is_empty() && self.values.iter().all(|&value| bar.is_met(value)),
            _ => !self.values.is_empty() && bar.is_met(self.median()),
        };
        Some(met)
    }

    fn cells(&self) -> [String; 5] {
        let low = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (value, range) = match self.values.as_slice() {
            [] => ("—".into(), String::new()),
            [_] => (number(self.median()), String::new()),
            _ => (number(self.median()), format!("{} to {}", number(low), number(high))),
        };
        let (bar, ratio) = match self.bar {
            None => (String::new(), String::new()),
            Some(bar) => {
                let ratio = self.median() / bar.limit();
                let ratio = if ratio.is_finite() { format!("{ratio:.2} × bar") } else { String::new() };
                (format!("{} {}", bar.sign(), number(bar.limit())), ratio)
            }
        };
        let met = match self.is_met() {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        [format!("{value} {}", self.unit), range, bar, ratio, met.into()]
    }
}

/// Formats the table of all rows as text.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows {
        out += &format!("\n{}: {}\n", row.name, row.conditions);
        if let Some(reason) = &row.failed {
            out += &format!("  did not run, {} bars not met: {reason}\n", row.bars);
        }
        for figure in &row.figures {
            let [value, range, bar, ratio, met] = figure.cells();
            let line = format!("  {:<58} {value:>16}  {range:<22} {bar:<12} {ratio:<12} {met}", figure.what);
            out += line.trim_end();
            out.push('\n');
        }
        for note in &row.notes {
            out += &format!("  · {note}\n");
        }
    }
    out
}

/// Returns the median: of an even number of values, the mean of the two in the middle; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Returns the duration below which the fraction (0 to 1) of durations lies, in milliseconds; NaN of none.
pub fn percentile_ms(durations: &[Duration], fraction: f64) -> f64 {
    let mut sorted = durations.to_vec();
    sorted.sort();
    let index = (sorted.len() as f64 * fraction).ceil() as usize;
    sorted.get(index.saturating_sub(1)).map_or(f64::NAN, |it| it.as_secs_f64() * 1e3)
}

/// Formats a value with three significant digits.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size == 0.0 || size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_of_the_sorted_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        let durations: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&durations, 0.5), 50.0);
        assert_eq!(percentile_ms(&durations, 0.99), 99.0);
        assert!(percentile_ms(&[], 0.5).is_nan());
    }

    #[test]
    fn a_bar_is_judged_by_the_median_and_an_exact_one_by_every_round() {
        let figure = |bar, values: &[f64]| Figure { values: values.to_vec(), ..Figure::new("", "").bar(bar) };
        assert_eq!(figure(Bar::AtMost(2.0), &[1.0, 2.0, 9.0]).is_met(), Some(true));
        assert_eq!(figure(Bar::AtLeast(2.0), &[1.0, 1.0, 9.0]).is_met(), Some(false));
        assert_eq!(figure(Bar::Exactly(0.0), &[0.0, 0.0, 1.0]).is_met(), Some(false));
        assert_eq!(figure(Bar::Exactly(0.0), &[]).is_met(), Some(false));
    }
}
