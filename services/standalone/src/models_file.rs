//! The file of `emu2 up --models`: models by name, with their folders and devices.
//!
//! ```toml
//! [[models]]
//! name = "emu2-chat"              # default: what the folder calls itself
//! dir = "Emu2-Chat"               # beside this file, or absolute
//! encoder = ["cuda:0"]            # devices of each stage; default: those of --devices
//! llm = ["cuda:0", "cuda:1"]
//! decoder = ["cuda:1"]
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use config::{Config, File, FileFormat};
use serde::Deserialize;

use crate::plan::ModelSource;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelsFile {
    models: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Option<String>,
    dir: PathBuf,
    encoder: Option<Vec<String>>,
    llm: Option<Vec<String>>,
    decoder: Option<Vec<String>>,
}

/// Reads the models of a file. A stage that names no devices takes `devices`; relative folders lie beside the file.
///
/// # Errors
///
/// The file cannot be read, is not of this form, or names no model.
pub fn read(path: &Path, devices: &[String]) -> Result<Vec<ModelSource>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let file = Config::builder().add_source(File::from_str(&text, FileFormat::Toml)).build();
    let file = file.and_then(Config::try_deserialize::<ModelsFile>);
    let ModelsFile { models } = file.with_context(|| path.display().to_string())?;
    ensure!(!models.is_empty(), "{}: names no model", path.display());
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok(models.into_iter().map(|entry| entry.source(folder, devices)).collect())
}

impl Entry {
    fn source(self, folder: &Path, devices: &[String]) -> ModelSource {
        let is_random = self.dir.to_str().is_some_and(|dir| dir.starts_with("random:"));
        let dir = if is_random { self.dir } else { folder.join(self.dir) };
        let default = ModelSource::new(dir, devices);
        ModelSource {
            name: self.name,
            encoder: self.encoder.unwrap_or(default.encoder),
            llm: self.llm.unwrap_or(default.llm),
            decoder: self.decoder.unwrap_or(default.decoder),
            dir: default.dir,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<ModelSource>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models.toml");
        std::fs::write(&path, text).unwrap();
        let devices = ["cuda:0", "cuda:1"].map(str::to_owned);
        let mut models = super::read(&path, &devices)?;
        for model in &mut models {
            if let Ok(beside) = model.dir.strip_prefix(folder.path()) {
                model.dir = beside.to_owned();
            }
        }
        Ok(models)
    }

    #[test]
    fn models_have_names_folders_and_devices() {
        let models = read(
            "[[models]]\ndir = \"Emu2\"\n\n\
             [[models]]\nname = \"Mine\"\ndir = \"/abs\"\nencoder = [\"cpu\"]\nllm = [\"cuda:2\", \"cuda:3\"]\n\n\
             [[models]]\ndir = \"random:emu2-tiny\"\ndecoder = [\"cuda:5\"]\n",
        )
        .unwrap();
        let rows: Vec<_> = models
            .iter()
            .map(|model| {
                let name = model.name.as_deref().unwrap_or("-");
                let devices = [&model.encoder, &model.llm, &model.decoder].map(|devices| devices.join(","));
                format!("{name} {} {}", model.dir.display(), devices.join(" "))
            })
            .collect();
        assert_eq!(
            rows,
            [
                "- Emu2 cuda:0 cuda:0,cuda:1 cuda:0",
                "Mine /abs cpu cuda:2,cuda:3 cuda:0",
                "- random:emu2-tiny cuda:0 cuda:0,cuda:1 cuda:5",
            ]
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, problem) in [
            ("models = []", "names no model"),
            ("[[models]]\nname = \"x\"", "dir"),
            ("[[models]]\ndir = \"x\"\ndevice = \"cpu\"", "device"),
            ("[[models]\n", "models.toml"),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains(problem), "{problem} not in {error}");
        }
    }
}
