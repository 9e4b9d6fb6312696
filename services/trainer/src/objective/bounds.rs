//! Checks of the numbers in a stage's file, each of which tells what is wrong and with which value.

/// Returns a problem unless a value lies within 0 and `max`.
pub(crate) fn share(name: &str, value: f64, max: f64) -> Option<String> {
    let holds = (0.0..=max).contains(&value);
    (!holds).then(|| format!("{name} must be 0 to {max}, is {value}"))
}

/// Returns a problem unless a count, of samples or of draws of noise, fits one step.
pub(crate) fn batch_size(value: usize) -> Option<String> {
    let holds = (1..=65_536).contains(&value);
    (!holds).then(|| format!("batch must be 1 to 65536, is {value}"))
}
