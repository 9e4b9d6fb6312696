//! Answers as JSON lines: the first line says of what, each other is one case.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::case::{Case, Column, Scores};
use crate::data::Ability;

/// One answer and what it is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The question.
    pub case: Case,
    /// The answer in text; `None` if it was an image.
    pub text: Option<String>,
    /// What the answer is worth.
    pub scores: Scores,
}

/// A record as it is written.
#[derive(Serialize, Deserialize)]
struct Line {
    ability: String,
    /// Demonstrations of each name.
    #[serde(skip_serializing_if = "Option::is_none")]
    shots: Option<u32>,
    column: Column,
    index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    scores: Scores,
}

/// The answers of one evaluation, in memory and in a file.
#[derive(Debug)]
pub struct Records {
    file: File,
    answers: HashMap<Case, Record>,
}

impl Records {
    /// Opens a file of answers, and goes on where an evaluation of the same `served` ended.
    ///
    /// # Errors
    /// When the file holds answers of something else, or cannot be read and written.
    pub fn open(path: &Path, served: &Value) -> Result<Self> {
        let cannot = || format!("cannot use {}", path.display());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(cannot)?;
        }
        let written =
            if path.exists() { fs::read_to_string(path).with_context(cannot)? } else { String::new() };
        // A line that was being written when the evaluation was killed has no end.
        let whole = written.rfind('\n').map_or("", |end| &written[..=end]);
        let mut lines = whole.lines();
        let header = lines.next().map(serde_json::from_str::<Value>).transpose().with_context(cannot)?;
        if let Some(header) = &header {
            ensure!(
                header == served,
                "{} holds answers of {header}, not of {served}: give another file",
                path.display()
            );
        }
        let mut answers = HashMap::new();
        for line in lines {
            let record = Record::parse(line).with_context(|| format!("{}: {line}", path.display()))?;
            answers.insert(record.case, record);
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path).with_context(cannot)?;
        file.set_len(whole.len() as u64).with_context(cannot)?;
        if header.is_none() {
            writeln!(file, "{served}").with_context(cannot)?;
        }
        Ok(Self { file, answers })
    }

    /// Returns whether a case is answered.
    pub fn holds(&self, case: &Case) -> bool {
        self.answers.contains_key(case)
    }

    /// Returns a case's answer.
    pub fn get(&self, case: &Case) -> Option<&Record> {
        self.answers.get(case)
    }

    /// Adds an answer to the file and to memory.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let line = serde_json::to_string(&record.line())?;
        writeln!(self.file, "{line}").context("cannot write an answer")?;
        self.answers.insert(record.case, record);
        Ok(())
    }
}

impl Record {
    fn line(&self) -> Line {
        let Case { ability, column, index } = self.case;
        let shots = match ability {
            Ability::Names { shots } => Some(shots),
            _ => None,
        };
        let (text, scores) = (self.text.clone(), self.scores.clone());
        Line { ability: ability.name().to_owned(), shots, column, index, text, scores }
    }

    fn parse(line: &str) -> Result<Self> {
        let Line { ability, shots, column, index, text, scores } = serde_json::from_str(line)?;
        let named = |known: &Ability| {
            known.name() == ability && shots.is_none_or(|shots| *known == Ability::Names { shots })
        };
        let ability =
            Ability::all().find(named).with_context(|| format!("no ability is called {ability}"))?;
        Ok(Self { case: Case { ability, column, index }, text, scores })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(ability: Ability, index: u64) -> Record {
        let scores = Scores::from([("right".to_owned(), 1.0)]);
        Record {
            case: Case { ability, column: Column::Trained, index },
            text: Some("cat".to_owned()),
            scores,
        }
    }

    #[test]
    fn an_evaluation_goes_on_where_it_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some/answers.jsonl");
        let served = serde_json::json!({"seed": 1});
        let kept = [record(Ability::Name, 3), record(Ability::Names { shots: 4 }, 0)];
        let mut records = Records::open(&path, &served).unwrap();
        for record in &kept {
            records.add(record.clone()).unwrap();
        }
        drop(records);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(br#"{"ability": "na"#).unwrap();
        let mut records = Records::open(&path, &served).unwrap();
        for record in &kept {
            assert_eq!(records.get(&record.case), Some(record));
        }
        assert!(!records.holds(&record(Ability::Names { shots: 8 }, 0).case));
        records.add(record(Ability::Count, 1)).unwrap();
        drop(records);
        assert!(Records::open(&path, &served).unwrap().holds(&record(Ability::Count, 1).case));
    }

    #[test]
    fn answers_of_another_model_are_not_mixed_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        Records::open(&path, &serde_json::json!({"seed": 1})).unwrap();
        let error = Records::open(&path, &serde_json::json!({"seed": 2})).unwrap_err().to_string();
        assert!(error.contains(r#"{"seed":1}"#) && error.contains(r#"{"seed":2}"#), "{error}");
    }
}
