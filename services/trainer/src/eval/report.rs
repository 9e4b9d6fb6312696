//! The table: a row for each score of each ability, with intervals, baselines and bars.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

use super::{
    case::{Case, Column},
    record::Records,
};
use crate::data::Ability;

/// The quantile of the normal distribution for intervals of 95 %.
const Z: f64 = 1.96;

/// Below: the least that two cores should reach; then where training on a GPU should get.
const BARS: [(&str, &str, f64, Option<f64>); 17] = [
    ("name", "right", 0.90, Some(0.97)),
    ("count", "right", 0.85, Some(0.95)),
    ("pair", "right", 0.65, Some(0.85)),
    ("background", "right", 0.95, Some(0.99)),
    ("names, 4 shots", "right", 0.70, Some(0.90)),
    ("tuples", "right", 0.60, Some(0.80)),
    ("locate", "iou", 0.50, Some(0.70)),
    ("autoencode", "object", 0.85, Some(0.95)),
    ("text_to_image", "object", 0.65, Some(0.85)),
    ("text_to_image", "count", 0.50, Some(0.75)),
    ("text_to_image", "background", 0.85, Some(0.95)),
    ("subject", "object", 0.60, Some(0.80)),
    ("boxed", "object", 0.60, Some(0.80)),
    ("boxed", "inside", 0.60, Some(0.80)),
    ("direction", "right", 0.75, Some(0.90)),
    // Not above this: without a demonstration there is nothing to know.
    ("names, 0 shots", "right", -0.30, None),
    // More than with fewer demonstrations: see `Report::bar`.
    ("names, 8 shots", "right", 0.0, None),
];
/// Points by which 8 demonstrations may be worse than 4.
const LOSS_MAX: f64 = 0.03;

/// A mean of scores from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// The mean score.
    pub cases: usize,
    /// The number of cases.
    pub mean: f64,
    /// 95 %.
    pub interval: [f64; 2],
}

impl Score {
    /// Wilson's interval where scores are right or wrong; the normal one of a mean otherwise.
    fn of(scores: &[f64]) -> Self {
        let cases = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / cases;
        let interval = if scores.iter().all(|score| [0.0, 1.0].contains(score)) {
            let (middle, square) = (mean + Z * Z / (2.0 * cases), Z * Z / cases);
            let half = Z * (mean * (1.0 - mean) / cases + square / (4.0 * cases)).sqrt();
            [(middle - half) / (1.0 + square), (middle + half) / (1.0 + square)]
        } else {
            let variance =
                scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / (cases - 1.0).max(1.0);
            let half = Z * (variance / cases).sqrt();
            [(mean - half).max(0.0), (mean + half).min(1.0)]
        };
        Self { cases: scores.len(), mean, interval }
    }
}

/// One score of one ability.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    ability: String,
    score: String,
    columns: BTreeMap<&'static str, Score>,
}

/// The table of an evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    rows: Vec<Row>,
    judge: Vec<(&'static str, f64)>,
}

impl Report {
    /// Makes the table of those of `asked` that were answered.
    pub fn new(records: &Records, asked: &[Case], judge: [(&'static str, f64); 3]) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        let mut scores: BTreeMap<(usize, &'static str), Vec<f64>> = BTreeMap::new();
        for record in asked.iter().filter_map(|case| records.get(case)) {
            let ability = label(record.case.ability);
            for (score, &value) in &record.scores {
                let known = rows.iter().position(|row| row.ability == ability && row.score == *score);
                let row = known.unwrap_or_else(|| {
                    let (ability, score) = (ability.clone(), score.clone());
                    rows.push(Row { ability, score, columns: BTreeMap::new() });
                    rows.len() - 1
                });
                scores.entry((row, column(record.case.column))).or_default().push(value);
            }
        }
        for ((row, column), scores) in scores {
            rows[row].columns.insert(column, Score::of(&scores));
        }
        Self { rows, judge: judge.to_vec() }
    }

    fn mean(&self, ability: &str, score: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.ability == ability && row.score == score)?;
        row.columns.get(column(Column::Trained)).map(|score| score.mean)
    }

    /// Returns what a row must reach, in words, and whether it does.
    fn bar(&self, row: &Row) -> Option<(String, bool)> {
        let found = self.mean(&row.ability, &row.score)?;
        let names = |shots: u32| self.mean(&label(Ability::Names { shots }), "right");
        let &(_, _, bar, _) =
            BARS.iter().find(|(ability, score, ..)| *ability == row.ability && *score == row.score)?;
        Some(match row.ability.as_str() {
            "names, 0 shots" => (format!("≤ {}", percent(-bar)), found <= -bar),
            "names, 4 shots" => {
                let rising = names(1).zip(names(2)).is_some_and(|(one, two)| one < two && two < found);
                (format!("≥ {}, and 1 < 2 < 4 shots", percent(bar)), found >= bar && rising)
            }
            "names, 8 shots" => {
                let least = names(4).map_or(f64::INFINITY, |four| four - LOSS_MAX);
                (format!("≥ 4 shots - {}", percent(LOSS_MAX)), found >= least)
            }
            _ => (format!("≥ {}", percent(bar)), found >= bar),
        })
    }

    /// Returns the number of bars met, and of all of them; a bar whose row was not asked for is not met.
    pub fn bars(&self) -> (usize, usize) {
        let met = self.rows.iter().filter(|row| self.bar(row).is_some_and(|(_, met)| met)).count();
        (met, BARS.len())
    }

    /// Returns the report as JSON. `served`: what the answers depend on.
    pub fn json(&self, served: &Value) -> Value {
        let score =
            |score: &Score| json!({"cases": score.cases, "mean": score.mean, "interval": score.interval});
        let rows = self.rows.iter().map(|row| {
            let columns: BTreeMap<_, _> =
                row.columns.iter().map(|(name, column)| (*name, score(column))).collect();
            let bar = self.bar(row).map(|(bar, met)| json!({"bar": bar, "met": met}));
            json!({"ability": row.ability, "score": row.score, "columns": columns, "bar": bar,
                   "target": target(row)})
        });
        let (met, all) = self.bars();
        let judge: BTreeMap<_, _> = self.judge.iter().copied().collect();
        json!({"served": served, "rows": rows.collect::<Vec<_>>(), "judge_on_real_scenes": judge,
               "bars_met": met, "bars": all})
    }
}

/// The report is Markdown, as `deploy/models/nano/README.md` shows it.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| ability | score | cases | trained styles | 95 % | bar | target | | unseen style | text only | other pictures |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let mean = |column_of| {
                row.columns.get(column(column_of)).map_or_else(|| "–".to_owned(), |score| percent(score.mean))
            };
            let trained = row.columns.get(column(Column::Trained));
            let cases = trained.map_or(0, |score| score.cases);
            let interval = trained.map_or_else(
                || "–".to_owned(),
                |score| format!("{} to {}", percent(score.interval[0]), percent(score.interval[1])),
            );
            let (bar, met) = match self.bar(row) {
                Some((bar, met)) => (bar, if met { "met" } else { "missed" }),
                None => ("–".to_owned(), ""),
            };
            let target = target(row).map_or_else(|| "–".to_owned(), percent);
            writeln!(
                f,
                "| {} | {} | {cases} | {} | {interval} | {bar} | {target} | {met} | {} | {} | {} |",
                row.ability,
                row.score,
                mean(Column::Trained),
                mean(Column::Unseen),
                mean(Column::TextOnly),
                mean(Column::Shuffled),
            )?;
        }
        let judge = self.judge.iter().map(|(name, score)| format!("{name} {}", percent(*score)));
        writeln!(f, "judge on real scenes: {}", judge.collect::<Vec<_>>().join(", "))?;
        let (met, all) = self.bars();
        writeln!(f, "bars: {met} of {all} met")
    }
}

fn label(ability: Ability) -> String {
    match ability {
        Ability::Names { shots } => format!("names, {shots} shots"),
        _ => ability.name().to_owned(),
    }
}

fn column(column: Column) -> &'static str {
    match column {
        Column::Trained => "trained",
        Column::Unseen => "unseen",
        Column::TextOnly => "text_only",
        Column::Shuffled => "shuffled",
    }
}

fn target(row: &Row) -> Option<f64> {
    let bar = BARS.iter().find(|(ability, score, ..)| *ability == row.ability && *score == row.score);
    bar.and_then(|(.., target)| *target)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{case::Scores, record::Record};

    /// Answers of which so many in ten are right.
    fn report(rights: &[(Ability, u64)]) -> Report {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(&folder.path().join("answers.jsonl"), &json!({})).unwrap();
        let mut asked = Vec::new();
        for &(ability, right) in rights {
            for index in 0..10 {
                let case = Case { ability, column: Column::Trained, index };
                let scores = Scores::from([("right".to_owned(), f64::from(u8::from(index < right)))]);
                records.add(Record { case, text: None, scores }).unwrap();
                asked.push(case);
            }
        }
        Report::new(&records, &asked, [("object", 1.0), ("count", 0.98), ("background", 1.0)])
    }

    fn shots(rights: [u64; 5]) -> Vec<(Ability, u64)> {
        [0, 1, 2, 4, 8]
            .into_iter()
            .zip(rights)
            .map(|(shots, right)| (Ability::Names { shots }, right))
            .collect()
    }

    #[test]
    fn intervals_are_wilson_s() {
        // Wilson (1927) for 81 of 263, as in Newcombe's comparison (1998), table I.
        let scores: Vec<f64> = (0..263).map(|index| f64::from(u8::from(index < 81))).collect();
        let Score { cases, interval: [low, high], .. } = Score::of(&scores);
        assert_eq!(cases, 263);
        assert!((low - 0.2553).abs() < 1e-4 && (high - 0.3662).abs() < 1e-4, "{low} {high}");
        let Score { mean, interval: [low, high], .. } = Score::of(&[0.2, 0.4, 0.6, 0.8]);
        assert!((mean - 0.5).abs() < 1e-9 && (high - mean - (mean - low)).abs() < 1e-9 && high < 0.76);
    }

    #[test]
    fn names_must_rise_with_demonstrations() {
        assert_eq!(report(&shots([2, 4, 6, 9, 9])).bars().0, 3);
        // One not below two, and so not rising.
        assert_eq!(report(&shots([2, 6, 6, 9, 9])).bars().0, 2);
        // Eight far below four.
        assert_eq!(report(&shots([2, 4, 6, 9, 8])).bars().0, 2);
        // Known without a demonstration.
        assert_eq!(report(&shots([4, 5, 6, 9, 9])).bars().0, 2);
    }

    #[test]
    fn a_bar_that_was_not_measured_is_not_met() {
        let report = report(&[(Ability::Name, 9), (Ability::Count, 8)]);
        assert_eq!(report.bars(), (1, BARS.len()));
        let text = report.to_string();
        assert!(
            text.contains("| name | right | 10 | 90.0 % |") && text.contains("bars: 1 of 17 met"),
            "{text}"
        );
        assert!(text.contains("count 98.0 %"), "{text}");
        assert_eq!(report.json(&json!({}))["rows"][1]["bar"]["met"], json!(false));
    }
}
