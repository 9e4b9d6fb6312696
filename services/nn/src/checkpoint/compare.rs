//! Whether two folders hold the same weights, as cheaply as it can be known.

use tch::Kind;

use super::{Entry, Files, ModelDir, Part, Source};
use crate::weights::same_values;

impl ModelDir {
    /// Whether both models hold the same weights of a part as computed with in `kind`: whether their digests would
    /// agree. Names and shapes are compared first, then values up to the first difference, which weights that were
    /// trained apart have at once; only equal ones are read to their end.
    pub fn has_weights_of(&self, other: &Self, part: Part, kind: Kind) -> bool {
        match (&self.source, &other.source) {
            (Source::Random(one), Source::Random(another)) => {
                let section = |dir: &Self| dir.config.get(part.section()).cloned();
                one.has_seed_of(another) && section(self) == section(other)
            }
            (Source::Files(files), Source::Files(others)) => {
                let entries: Vec<_> = self.entries_of(part).collect();
                let known: Vec<_> = other.entries_of(part).collect();
                let pairs = || entries.iter().zip(&known);
                let alike = |((name, entry), (other_name, other)): (&Named, &Named)| {
                    name == other_name && entry.shape == other.shape
                };
                if entries.len() != known.len() || !pairs().all(alike) {
                    return false;
                }
                let (of, with) = (self.path.display(), other.path.display());
                tracing::info!(%part, %of, %with, "comparing weights");
                pairs().all(|((_, entry), (_, other))| same(files, entry, others, other, kind))
            }
            _ => false,
        }
    }
}

type Named<'a> = (&'a str, &'a Entry);

fn same(files: &Files, entry: &Entry, others: &Files, other: &Entry, kind: Kind) -> bool {
    files.is_place_of(entry, others, other) || same_values(files, entry, others, other, kind)
}
