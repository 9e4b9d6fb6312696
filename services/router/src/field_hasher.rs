//! The one way in which several fields become one hash.

/// Hashes fields with blake3, each with its length before it, so that no bytes can wander from one field to the next.
/// Equal fields give the same hash in every build, so that routers of different releases agree.
#[derive(Default)]
pub(crate) struct FieldHasher(blake3::Hasher);

impl FieldHasher {
    /// Adds a field.
    pub(crate) fn push(&mut self, field: &[u8]) {
        self.0.update(&(field.len() as u64).to_le_bytes());
        self.0.update(field);
    }

    /// The hash of all fields so far.
    pub(crate) fn hash(&self) -> [u8; blake3::OUT_LEN] {
        self.0.finalize().into()
    }

    /// The first eight bytes of the hash, for hints: two that are equal by accident cost a cache hit, nothing more.
    pub(crate) fn hint(&self) -> u64 {
        let hash = self.hash();
        u64::from_le_bytes(std::array::from_fn(|index| hash[index]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Routers of different builds send equal beginnings to the same replica.
    #[test]
    fn a_hint_is_the_same_in_every_build() {
        let mut hasher = FieldHasher::default();
        hasher.push(b"a");
        hasher.push(b"bc");
        let mut bytes = Vec::new();
        for field in [&b"a"[..], b"bc"] {
            bytes.extend((field.len() as u64).to_le_bytes());
            bytes.extend(field);
        }
        let hash = blake3::hash(&bytes);
        assert_eq!(&hasher.hash(), hash.as_bytes());
        assert_eq!(hasher.hint().to_le_bytes(), hash.as_bytes()[..8]);
        let mut other = FieldHasher::default();
        other.push(b"ab");
        other.push(b"c");
        assert_ne!(other.hint(), hasher.hint());
    }
}
