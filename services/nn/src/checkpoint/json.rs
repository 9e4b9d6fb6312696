//! Configurations and indexes are JSON files of a bounded size.

use std::{fs, path::Path};

use serde_json::Value;

use super::error::CheckpointError;

/// Reads a JSON file of at most `limit` bytes.
///
/// # Errors
///
/// The file cannot be read, is larger, or is not JSON.
pub(super) fn read_json(path: &Path, limit: u64) -> Result<Value, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let bad = |reason| CheckpointError::Config { path: path.to_owned(), reason };
    let bytes = fs::metadata(path).map_err(io)?.len();
    if bytes > limit {
        return Err(bad(format!("must be at most {limit} bytes, got {bytes}")));
    }
    serde_json::from_slice(&fs::read(path).map_err(io)?).map_err(|error| bad(error.to_string()))
}
