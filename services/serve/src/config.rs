//! A service's configuration: `T::default()`, then a TOML file, then `EMU2__SECTION__KEY` environment variables.
//!
//! Keys that `T` does not have are refused in the file (by `#[serde(deny_unknown_fields)]` on `T` and its parts) and
//! in the environment (here). A variable whose default is a list is split at commas; a list of tables is written as
//! JSON. An empty variable takes the value of an optional key away.

use std::path::{Path, PathBuf};

use clap::{Arg, Command, value_parser};
use config::{Config, File, FileFormat, Value, ValueKind};
use serde::{Serialize, de::DeserializeOwned};

const PREFIX: &str = "EMU2__";
const SEPARATOR: &str = "__";

/// A configuration that can tell what is wrong with itself beyond what its types refuse.
pub trait Validate {
    /// Returns all mistakes at once, each naming the key, the limit and the value; empty when there is none.
    fn problems(&self) -> Vec<String>;
}

/// The reasons why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file is missing, or holds a key or a type that the configuration does not have.
    #[error("configuration cannot be read: {0}")]
    Read(#[from] config::ConfigError),
    /// A file is not TOML. The message names the line and does not quote it, because it may hold a secret.
    #[error("{file} cannot be parsed: {problem}")]
    Syntax {
        /// Path of the file.
        file: String,
        /// Place and reason, as the parser tells them.
        problem: String,
    },
    /// The default values cannot be serialized, which is a fault of the configuration's type.
    #[error("defaults cannot be written as JSON: {0}")]
    Defaults(#[source] serde_json::Error),
    /// The values contradict themselves or their limits; every mistake is listed.
    #[error("configuration is invalid: {}", .0.join("; "))]
    Invalid(Vec<String>),
}

/// Reads the configuration of a service: its defaults, then the file that `--config FILE` on the command line names,
/// then the environment. `--help` and mistakes on the command line print and exit, as is usual.
pub fn from_args<T>() -> Result<T, ConfigError>
where
    T: Serialize + DeserializeOwned + Default + Validate,
{
    let file = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("TOML file; EMU2__SECTION__KEY environment variables override it");
    let arguments = Command::new("emu2").version(env!("CARGO_PKG_VERSION")).arg(file).get_matches();
    load(arguments.get_one::<PathBuf>("config").map(PathBuf::as_path))
}

/// Reads the configuration from an optional file and the process's environment.
fn load<T>(file: Option<&Path>) -> Result<T, ConfigError>
where
    T: Serialize + DeserializeOwned + Default + Validate,
{
    // A variable that is not Unicode cannot be one of ours.
    let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let environment = environment.map(|(name, value)| (name, value.to_string_lossy().into_owned()));
    load_from(file, environment)
}

fn load_from<T>(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<T, ConfigError>
where
    T: Serialize + DeserializeOwned + Default + Validate,
{
    // Through JSON, because config's own serializer leaves empty lists out.
    let defaults = serde_json::to_value(T::default()).map_err(ConfigError::Defaults)?;
    let mut builder = Config::builder().add_source(File::from_str(&defaults.to_string(), FileFormat::Json));
    if let Some(file) = file {
        builder = builder.add_source(File::from(file).format(FileFormat::Toml));
    }
    let mut problems = Vec::new();
    for (name, text) in environment {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let path = key.to_lowercase();
        match override_of(&defaults, &path, &text) {
            Ok(value) => builder = builder.set_override(path.replace(SEPARATOR, "."), value)?,
            Err(problem) => problems.push(format!("{name}: {problem}")),
        }
    }
    if !problems.is_empty() {
        return Err(ConfigError::Invalid(problems));
    }
    let config: T = builder.build().map_err(without_source)?.try_deserialize()?;
    match config.problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(ConfigError::Invalid(problems)),
    }
}

/// Where and why a file cannot be parsed, without the line that the parser quotes between bars: it may hold a password.
fn without_source(error: config::ConfigError) -> ConfigError {
    let config::ConfigError::FileParse { uri, cause } = error else { return error.into() };
    let cause = cause.to_string();
    let said: Vec<_> = cause.lines().map(str::trim).filter(|line| !line.contains('|')).collect();
    ConfigError::Syntax { file: uri.unwrap_or_else(|| "configuration".into()), problem: said.join(": ") }
}

/// A variable's text in the shape that its key's default has; serde turns text into numbers and booleans.
fn override_of(defaults: &serde_json::Value, path: &str, text: &str) -> Result<Value, String> {
    let mut default = defaults;
    for key in path.split(SEPARATOR) {
        // Indexing a list by its items' keys finds nothing either.
        default = default.get(key).ok_or("no such key")?;
    }
    let list = || {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect::<Vec<_>>()
    };
    match default {
        serde_json::Value::Object(_) => Err("a section, not a key".into()),
        serde_json::Value::Array(_) if text.starts_with('[') => {
            serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
        }
        serde_json::Value::Array(_) => Ok(Value::from(list())),
        _ if text.is_empty() => Ok(Value::from(ValueKind::Nil)),
        _ => Ok(Value::from(text)),
    }
}

#[cfg(test)]
mod tests;
