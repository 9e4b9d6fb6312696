//! Texts and image files as parts of a prompt.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use emu2_proto::v1::{self, part::Kind};

/// Returns a part of literal text.
pub fn text(text: impl Into<String>) -> v1::Part {
    v1::Part { kind: Some(Kind::Text(text.into())) }
}

/// Reads an image file, whose bytes are sent as they are.
///
/// # Errors
///
/// The file cannot be read.
pub fn image(path: &Path) -> Result<v1::Image> {
    let data = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(v1::Image { data: data.into() })
}

/// Returns a part of an image file, as [`image`] reads it.
///
/// # Errors
///
/// The file cannot be read.
pub fn image_part(path: &Path) -> Result<v1::Part> {
    Ok(v1::Part { kind: Some(Kind::Image(image(path)?)) })
}
