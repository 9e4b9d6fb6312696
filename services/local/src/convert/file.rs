//! A file that is read in places; nothing is allocated by what it says of itself, only within limits.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use anyhow::{Result, ensure};

/// A file that is open for reading, and its length when it was opened.
#[derive(Debug)]
pub(super) struct Readable {
    file: File,
    bytes: u64,
}

impl Readable {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        ensure!(metadata.is_file(), "not a file");
        Ok(Self { file, bytes: metadata.len() })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads a range of bytes.
    ///
    /// # Errors
    ///
    /// The range is longer than `limit`, or ends behind the end of the file.
    pub(super) fn read(&self, range: Range<u64>, limit: u64) -> Result<Vec<u8>> {
        self.exact(range.start, range.end.saturating_sub(range.start), limit)
    }

    pub(super) fn exact(&self, start: u64, length: u64, limit: u64) -> Result<Vec<u8>> {
        ensure!(length <= limit, "must have at most {limit} bytes where it has {length}");
        ensure!(start.checked_add(length).is_some_and(|end| end <= self.bytes), "cut short");
        let mut bytes = vec![0; usize::try_from(length)?];
        self.fill(start, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn fill(&self, start: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(bytes, start)
    }
}
