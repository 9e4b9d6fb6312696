//! The zip file that torch.save writes, since PyTorch 1.6: `NAME/data.pkl`, and each storage as `NAME/data/KEY`.
//!
//! Entries are stored, never compressed, so that a storage is a range of the file. Anything else that a zip file may
//! be is refused. Sizes and checksums are read from the directory at the end, which PyTorch writes last: a file that
//! was cut short has none.

use std::{collections::BTreeMap, ops::Range};

use anyhow::{Context, Result, bail, ensure};

use super::file::Readable;

const LOCAL: u32 = 0x0403_4b50;
const LOCAL_BYTES: u64 = 30;
const ENTRY: u32 = 0x0201_4b50;
const ENTRY_BYTES: usize = 46;
const END: u32 = 0x0605_4b50;
const END_BYTES: u64 = 22;
const END_64: u32 = 0x0606_4b50;
const END_64_BYTES: u64 = 56;
const LOCATOR_64: u32 = 0x0706_4b50;
const LOCATOR_64_BYTES: u64 = 20;
/// The placeholder for a value that does not fit 32 bits; the value itself stands in the ZIP64 extra field.
const ELSEWHERE: u32 = u32::MAX;
/// Largest directory that is read: Emu2's largest shard has a hundred entries of some 100 bytes.
const MAX_DIRECTORY_BYTES: u64 = 16 << 20;
/// Largest pickle that is read; that of a whole Emu2 has 200 kB.
const MAX_PICKLE_BYTES: u64 = 16 << 20;

/// The byte range of an entry in the file, and the CRC-32 of its bytes.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) range: Range<u64>,
    pub(super) crc: u32,
}

/// A torch.save'd file: its pickle, and its storages by key.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) pickle: Vec<u8>,
    storages: BTreeMap<String, DirectoryEntry>,
}

/// An entry as the central directory lists it.
#[derive(Clone, Debug)]
struct DirectoryEntry {
    name: String,
    header: u64,
    bytes: u64,
    crc: u32,
}

impl Archive {
    pub(super) fn open(file: &Readable) -> Result<Self> {
        let mut storages = BTreeMap::new();
        let mut named = BTreeMap::new();
        for listed in directory(file)? {
            let (_, name) = listed.name.split_once('/').unwrap_or(("", &listed.name));
            let twice = match name.strip_prefix("data/") {
                Some(key) => storages.insert(key.to_owned(), listed),
                None => named.insert(name.to_owned(), listed),
            };
            // Readers differ in which of two they take: what was looked at need not be what is read.
            ensure!(
                twice.is_none(),
                "{} stands in it twice",
                twice.map(|listed| listed.name).unwrap_or_default()
            );
        }
        let read = |name: &str, limit: u64| -> Result<Option<Vec<u8>>> {
            let Some(listed) = named.get(name) else { return Ok(None) };
            let entry = listed.locate(file)?;
            Ok(Some(file.read(entry.range, limit)?))
        };
        let pickle =
            read("data.pkl", MAX_PICKLE_BYTES)?.context("it has no data.pkl: torch.save did not write it")?;
        let order = read("byteorder", 16)?;
        ensure!(order.is_none_or(|order| order == b"little"), "its values are not little-endian");
        Ok(Self { pickle, storages })
    }

    pub(super) fn storage(&self, file: &Readable, key: &str) -> Result<Entry> {
        let listed = self.storages.get(key).with_context(|| format!("storage `{key}` is not in it"))?;
        listed.locate(file)
    }
}

impl DirectoryEntry {
    /// Finds an entry's bytes by the local header before them: only that says where they start.
    fn locate(&self, file: &Readable) -> Result<Entry> {
        let header = file.exact(self.header, LOCAL_BYTES, LOCAL_BYTES)?;
        ensure!(u32_at(&header, 0) == LOCAL, "{}: no entry where the directory says", self.name);
        let skipped = LOCAL_BYTES + u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
        let start = self.header.checked_add(skipped);
        let end = start.and_then(|start| start.checked_add(self.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file.bytes() => Ok(Entry { range: start..end, crc: self.crc }),
            _ => bail!("{}: {} bytes are more than the file has", self.name, self.bytes),
        }
    }
}

fn directory(file: &Readable) -> Result<Vec<DirectoryEntry>> {
    let range = directory_range(file)?;
    let bytes = file.read(range, MAX_DIRECTORY_BYTES)?;
    let mut rest = &bytes[..];
    let mut listed = Vec::new();
    while !rest.is_empty() {
        ensure!(rest.len() >= ENTRY_BYTES && u32_at(rest, 0) == ENTRY, "its directory is damaged");
        let sizes = [28, 30, 32].map(|at| usize::from(u16_at(rest, at)));
        let total = ENTRY_BYTES + sizes.iter().sum::<usize>();
        ensure!(rest.len() >= total, "its directory is damaged");
        let (entry, after) = rest.split_at(total);
        listed.push(directory_entry(entry, sizes[0], sizes[1])?);
        rest = after;
    }
    Ok(listed)
}

fn directory_entry(entry: &[u8], name_bytes: usize, extra_bytes: usize) -> Result<DirectoryEntry> {
    let name = String::from_utf8_lossy(&entry[ENTRY_BYTES..][..name_bytes]).into_owned();
    ensure!(u16_at(entry, 8) & 1 == 0, "{name} is encrypted");
    ensure!(u16_at(entry, 10) == 0, "{name} is compressed, which torch.save does not do");
    let mut extra = &entry[ENTRY_BYTES + name_bytes..][..extra_bytes];
    // The 64-bit values that did not fit, in this order, each only if it did not.
    let mut wide = &[][..];
    while extra.len() >= 4 {
        let (id, length) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        ensure!(extra.len() >= 4 + length, "its directory is damaged");
        if id == 1 {
            wide = &extra[4..4 + length];
        }
        extra = &extra[4 + length..];
    }
    let mut value = |at| -> Result<u64> {
        match u32_at(entry, at) {
            ELSEWHERE => {
                let (first, after) = wide.split_first_chunk().context("its directory is damaged")?;
                wide = after;
                Ok(u64::from_le_bytes(*first))
            }
            value => Ok(value.into()),
        }
    };
    let (bytes, stored, header) = (value(24)?, value(20)?, value(42)?);
    ensure!(bytes == stored, "{name} is compressed, which torch.save does not do");
    Ok(DirectoryEntry { name, header, bytes, crc: u32_at(entry, 16) })
}

fn directory_range(file: &Readable) -> Result<Range<u64>> {
    const WHAT: &str = "not a zip file as torch.save writes it, or cut short";
    let bytes = file.bytes();
    let first = file.exact(0, bytes.min(4), 4)?;
    // PyTorch before 1.6 wrote a pickle with a number in front, and the storages behind.
    ensure!(
        !first.starts_with(&[0x80, 2]),
        "written in the form of PyTorch before 1.6: save it again with a newer one"
    );
    ensure!(bytes >= END_BYTES, WHAT);
    // A zip file may end with a comment; torch.save writes none.
    let at = bytes - END_BYTES;
    let end = file.exact(at, END_BYTES, END_BYTES)?;
    ensure!(u32_at(&end, 0) == END && u16_at(&end, 20) == 0, WHAT);
    let (mut length, mut start, mut limit) = (u64::from(u32_at(&end, 12)), u64::from(u32_at(&end, 16)), at);
    if let Some(locator) = at.checked_sub(LOCATOR_64_BYTES) {
        let found = file.exact(locator, LOCATOR_64_BYTES, LOCATOR_64_BYTES)?;
        if u32_at(&found, 0) == LOCATOR_64 {
            limit = u64_at(&found, 8);
            let end = file.exact(limit, END_64_BYTES, END_64_BYTES)?;
            ensure!(u32_at(&end, 0) == END_64, WHAT);
            (length, start) = (u64_at(&end, 40), u64_at(&end, 48));
        }
    }
    // Directly before its end: what lies between could be anything.
    ensure!(start.checked_add(length) == Some(limit), WHAT);
    Ok(start..limit)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
