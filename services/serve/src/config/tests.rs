use std::io::Write;

use serde::Deserialize;

use super::*;
use crate::{
    server::ServerConfig,
    telemetry::{LogFormat, TelemetryConfig},
};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Sample {
    name: String,
    devices: Vec<String>,
    cores: usize,
    ratio: f64,
    redis_url: Option<String>,
    models: Vec<Model>,
    server: ServerConfig,
    telemetry: TelemetryConfig,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            name: "emu2".into(),
            devices: vec!["cpu".into()],
            cores: 0,
            ratio: 0.5,
            redis_url: None,
            models: Vec::new(),
            server: ServerConfig::on_port(50_051),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Validate for Sample {
    fn problems(&self) -> Vec<String> {
        [self.server.problems(), self.telemetry.problems()].concat()
    }
}

fn read(file: &str, environment: &[(&str, &str)]) -> Result<Sample, ConfigError> {
    let mut toml = tempfile::NamedTempFile::new().unwrap();
    toml.write_all(file.as_bytes()).unwrap();
    let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    load_from(Some(toml.path()), environment)
}

#[test]
fn defaults_then_file_then_environment() {
    assert_eq!(load_from::<Sample>(None, std::iter::empty()).unwrap(), Sample::default());
    let file = "cores = 3\nratio = 0.25\nname = \"from file\"\n[server]\nlisten = \"127.0.0.1:1\"\nreflection = false\n";
    let environment = [
        ("EMU2__NAME", "007"),
        ("EMU2__DEVICES", "cuda:0, cuda:1"),
        ("EMU2__REDIS_URL", "redis://localhost"),
        ("EMU2__MODELS", r#"[{"name": "emu2-gen"}]"#),
        ("EMU2__SERVER__LISTEN", "[::1]:2"),
        ("EMU2__SERVER__MAX_REQUESTS", "8"),
        ("EMU2__TELEMETRY__LOG_FORMAT", "text"),
        ("EMU2_HOME", "not ours"),
        ("PATH", "/bin"),
    ];
    let config = read(file, &environment).unwrap();
    assert_eq!((config.cores, config.ratio, config.name.as_str()), (3, 0.25, "007"));
    assert_eq!(config.devices, ["cuda:0", "cuda:1"]);
    assert_eq!(config.redis_url.as_deref(), Some("redis://localhost"));
    assert_eq!(config.models, [Model { name: "emu2-gen".into() }]);
    assert_eq!(config.server.listen, "[::1]:2".parse().unwrap());
    assert_eq!(config.server.admin, ServerConfig::on_port(50_051).admin);
    assert_eq!((config.server.max_requests, config.server.reflection), (8, false));
    assert_eq!(config.telemetry.log_format, LogFormat::Text);
}

#[test]
fn an_optional_key_can_be_emptied() {
    let config = read("", &[("EMU2__SERVER__ADMIN", ""), ("EMU2__REDIS_URL", "")]).unwrap();
    assert_eq!((config.server.admin, config.redis_url), (None, None));
    assert_eq!(read("", &[("EMU2__DEVICES", "")]).unwrap().devices, [""; 0]);
}

#[test]
fn unknown_keys_are_refused() {
    for file in ["colour = 1", "[server]\nlisten_on = \"127.0.0.1:1\"", "[[models]]\nname = \"a\"\nsize = 1"]
    {
        assert!(matches!(read(file, &[]), Err(ConfigError::Read(_))), "{file}");
    }
    let environment = [("EMU2__COLOUR", "1"), ("EMU2__SERVER__LISTEN__PORT", "1"), ("EMU2__SERVER", "1")];
    let Err(ConfigError::Invalid(problems)) = read("", &environment) else { panic!("accepted") };
    assert_eq!(problems.len(), 3);
    assert!(problems[0].contains("EMU2__COLOUR"), "{problems:?}");
}

#[test]
fn all_mistakes_are_told_at_once() {
    let file = "[server]\nmax_requests = 0\nmax_message_bytes = 1\n[telemetry]\notlp_endpoint = \"collector\"\nlog = \"a=b=c\"";
    let Err(ConfigError::Invalid(problems)) = read(file, &[]) else { panic!("accepted") };
    assert_eq!(problems.len(), 4, "{problems:?}");
    assert!(problems.iter().any(|problem| problem.contains("server.max_requests must be 1 to 65536, got 0")));
}

#[test]
fn wrong_types_and_missing_files_are_refused() {
    assert!(matches!(read("", &[("EMU2__CORES", "many")]), Err(ConfigError::Read(_))));
    assert!(matches!(read("cores = -1", &[]), Err(ConfigError::Read(_))));
    assert!(matches!(read("cores = ", &[]), Err(ConfigError::Syntax { .. })));
    let missing = load_from::<Sample>(Some(Path::new("/nowhere/emu2.toml")), std::iter::empty());
    assert!(matches!(missing, Err(ConfigError::Read(_))));
}

#[test]
fn a_line_that_cannot_be_parsed_is_named_and_not_quoted() {
    for line in [
        "redis_url = redis://:hunter2@cache",
        "redis_url = \"redis://:hunter2@cache",
        "redis://:hunter2@cache",
    ] {
        let error = read(&format!("name = \"emu2\"\n{line}\n"), &[]).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
