//! How a stage states the limit of a parameter.

use std::ops::RangeInclusive;

use crate::v1::ParameterLimit;

impl ParameterLimit {
    /// The limit of `field`, such as `text.num_beams`: the values it may have, and the one of a request that leaves it
    /// out.
    pub fn new<T: Copy + Into<f64>>(field: &str, values: RangeInclusive<T>, default: Option<T>) -> Self {
        Self {
            field: field.to_owned(),
            min: (*values.start()).into(),
            max: (*values.end()).into(),
            default: default.map(Into::into),
            above_min: false,
            multiple_of: 0,
        }
    }

    /// The same, without `min` itself.
    #[must_use]
    pub fn above_min(self) -> Self {
        Self { above_min: true, ..self }
    }

    /// The same, of multiples of `factor` alone.
    #[must_use]
    pub fn multiple_of(self, factor: u32) -> Self {
        Self { multiple_of: factor, ..self }
    }
}
