//! The name of a cached value: everything that decides it, hashed. Two values under one key would be a wrong answer,
//! so the first field is the format's version and every one is length-prefixed.

use std::fmt;

use emu2_proto::v1;

use crate::field_hasher::FieldHasher;

/// Grows whenever the fields below or the bytes of a value change their meaning.
const FORMAT_VERSION: u32 = 3;

/// What kind of thing is cached; also a label of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// An image's embeddings.
    Image,
    /// Embeddings of a region drawn as an image.
    Box,
    /// The all-zero image's embeddings: the negative of autoencoding.
    MeanColour,
    /// The regression of a whole prompt; of the empty one it is the negative of image generation.
    Regressed,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Box => "box",
            Self::MeanColour => "mean_colour",
            Self::Regressed => "regressed",
        }
    }
}

/// What a value depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Recipe<'a> {
    pub(crate) kind: Kind,
    /// The digest of the weights that computed the value.
    pub(crate) weights_digest: &'a str,
    /// The version of the encoder's preprocessing, or of the llm's templates.
    pub(crate) preprocessing_version: u32,
    pub(crate) n_query: u32,
    pub(crate) dtype: v1::Dtype,
    /// Whose value it is: nobody learns from a quick answer what another tenant has sent.
    pub(crate) tenant: &'a str,
    /// The image's bytes; a region's edges; for a prompt, the hash of its parts and of the tokenizer's digest.
    pub(crate) content: &'a [u8],
}

impl Recipe<'_> {
    pub(crate) fn key(&self) -> Key {
        let mut fields = FieldHasher::default();
        fields.push(&FORMAT_VERSION.to_le_bytes());
        fields.push(self.kind.name().as_bytes());
        fields.push(self.weights_digest.as_bytes());
        fields.push(&self.preprocessing_version.to_le_bytes());
        fields.push(&self.n_query.to_le_bytes());
        fields.push(self.dtype.as_str_name().as_bytes());
        fields.push(self.tenant.as_bytes());
        fields.push(self.content);
        Key(fields.hash())
    }
}

/// blake3-256 of a [`Recipe`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key([u8; blake3::OUT_LEN]);

impl Key {
    pub(crate) fn bytes(&self) -> &[u8; blake3::OUT_LEN] {
        &self.0
    }
}

/// A key in hexadecimal, as Redis has it.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The key of a picture, for the tests of the modules beside this one.
    pub(in crate::cache) fn key(content: &[u8]) -> Key {
        Recipe { content, ..RECIPE }.key()
    }

    const RECIPE: Recipe<'static> = Recipe {
        kind: Kind::Image,
        weights_digest: "d1",
        preprocessing_version: 1,
        n_query: 64,
        dtype: v1::Dtype::F32,
        tenant: "default",
        content: b"picture",
    };

    /// Routers of different builds share one Redis: a changed key needs a changed `FORMAT_VERSION`.
    #[test]
    fn a_key_is_the_same_in_every_build() {
        assert_eq!(
            RECIPE.key().to_string(),
            "525af01a1bff2f59ae0d61e95dedfe248c13320d1473778d77128b4c4d989a42"
        );
    }

    #[test]
    fn every_field_changes_the_key() {
        let changed = [
            RECIPE,
            Recipe { kind: Kind::MeanColour, ..RECIPE },
            Recipe { kind: Kind::Regressed, ..RECIPE },
            Recipe { weights_digest: "d2", ..RECIPE },
            Recipe { preprocessing_version: 2, ..RECIPE },
            Recipe { n_query: 256, ..RECIPE },
            Recipe { dtype: v1::Dtype::Bf16, ..RECIPE },
            Recipe { tenant: "acme", ..RECIPE },
            Recipe { content: b"picturf", ..RECIPE },
            Recipe { content: b"", ..RECIPE },
            // Bytes that wander over a field's border.
            Recipe { weights_digest: "d", ..RECIPE },
        ];
        let keys: HashSet<Key> = changed.iter().map(Recipe::key).collect();
        assert_eq!(keys.len(), changed.len());
    }
}
