//! What scenes are made of: things that every emoji set draws, with short names.

use std::sync::LazyLock;

/// The number of concepts in the table; a run trains on the first so many of them, see
/// [`World::open`](super::World::open).
pub const CONCEPTS_MAX: usize = 96;

/// One a line: name, code points of the emoji in hexadecimal, and the plural where it is not the name with an s. The
/// most distinct come first, so that a cut keeps them. Names are words of emojibase's labels or tags, which a test
/// holds.
const TABLE: &str = include_str!("concepts.tsv");

/// A kind of thing, as an index into the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Concept(pub u16);

struct Row {
    name: &'static str,
    hexcode: &'static str,
    plural: Option<&'static str>,
}

static ROWS: LazyLock<Vec<Row>> = LazyLock::new(|| {
    let row = |line: &'static str| {
        let mut fields = line.split('\t');
        let mut field = || fields.next();
        let (name, hexcode) = field().zip(field()).expect("a line has a name and code points");
        Row { name, hexcode, plural: field() }
    };
    TABLE.lines().map(row).collect()
});

impl Concept {
    /// Iterates over every concept, in the order of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..).map(Self).take(CONCEPTS_MAX)
    }

    /// Returns the concept with this name or plural.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|concept| concept.name() == name || concept.plural() == name)
    }

    /// Returns the concept's place in the table.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Returns the singular without an article: `cat`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns the plural: `cats`.
    pub fn plural(self) -> String {
        let row = self.row();
        row.plural.map_or_else(|| format!("{}s", row.name), str::to_owned)
    }

    /// Returns the name with its article: `a cat`, `an owl`.
    pub fn with_article(self) -> String {
        let name = self.name();
        // Of the table's names that begin with a vowel, each also sounds so.
        let article = if name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        format!("{article} {name}")
    }

    pub(super) fn hexcode(self) -> &'static str {
        self.row().hexcode
    }

    fn row(self) -> &'static Row {
        &ROWS[self.index()]
    }
}
