//! Settings of published configurations for which one value is supported: anything else is refused at load, by name.

use std::collections::BTreeMap;

use serde_json::Value;

/// The keys of a section that no field reads.
pub(crate) type Settings = BTreeMap<String, Value>;

/// The one value that a setting may have. A setting that is absent has it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Supported {
    /// The setting must be null or false.
    Off,
    /// The setting must be true.
    On,
    /// The setting must be this number.
    Number(f64),
    /// The setting must be this text.
    Text(&'static str),
}

impl Supported {
    fn accepts(self, value: &Value) -> bool {
        match self {
            Self::Off => value.is_null() || value == false,
            Self::On => value == true,
            Self::Number(number) => value.as_f64() == Some(number),
            Self::Text(text) => value == text,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Off => "null or false".to_owned(),
            Self::On => "true".to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => format!("\"{text}\""),
        }
    }
}

/// Makes one sentence for each setting that has another value than the supported one.
pub(crate) fn unsupported(settings: &Settings, table: &[(&str, Supported)]) -> Vec<String> {
    let wrong = table.iter().filter_map(|(key, supported)| {
        let value = settings.get(*key).filter(|value| !supported.accepts(value))?;
        Some(format!("`{key}` must be {}, got {value}", supported.name()))
    });
    wrong.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_other_values_of_known_settings_are_refused() {
        let table =
            [("off", Supported::Off), ("act", Supported::Text("silu")), ("scale", Supported::Number(1.0))];
        let settings = |value: Value| serde_json::from_value::<Settings>(value).unwrap();
        let fine = settings(json!({"off": null, "act": "silu", "scale": 1, "_version": "0.21.2"}));
        assert!(unsupported(&fine, &table).is_empty());
        let wrong = settings(json!({"off": "yes", "act": "relu", "scale": 0.5}));
        assert_eq!(
            unsupported(&wrong, &table),
            [
                "`off` must be null or false, got \"yes\"",
                "`act` must be \"silu\", got \"relu\"",
                "`scale` must be 1, got 0.5"
            ]
        );
    }
}
