//! The first level: this process's own memory, by a byte budget. Values here were checked when they came in.

use std::time::Duration;

use emu2_proto::v1;
use moka::sync::Cache;

use super::key::Key;

/// What an entry takes beside its payload: key, shape and the table's own bookkeeping, about.
const ENTRY_OVERHEAD_BYTES: usize = 256;

#[derive(Debug)]
pub(crate) struct Memory {
    /// None without a budget: moka would hold each value for a moment, and every request would write to cold memory.
    values: Option<Cache<Key, v1::Tensor>>,
}

impl Memory {
    pub(crate) fn new(budget_bytes: u64, ttl: Duration) -> Self {
        let weigh = |_: &Key, tensor: &v1::Tensor| {
            u32::try_from(tensor.data.len() + ENTRY_OVERHEAD_BYTES).unwrap_or(u32::MAX)
        };
        let values = || Cache::builder().max_capacity(budget_bytes).weigher(weigh).time_to_live(ttl).build();
        Self { values: (budget_bytes > 0).then(values) }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<v1::Tensor> {
        self.values.as_ref()?.get(key)
    }

    pub(crate) fn put(&self, key: Key, tensor: v1::Tensor) {
        if let Some(values) = &self.values {
            values.insert(key, tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::tests::key;

    #[test]
    fn the_budget_in_bytes_is_kept() {
        let memory = Memory::new(10 * 1024, Duration::from_secs(60));
        let tensor = v1::Tensor { data: vec![0; 1024].into(), ..Default::default() };
        for index in 0..100_u8 {
            memory.put(key(&[index]), tensor.clone());
        }
        let values = memory.values.unwrap();
        values.run_pending_tasks();
        assert!(values.weighted_size() <= 10 * 1024, "{}", values.weighted_size());
        assert!(values.entry_count() >= 7);
    }

    #[test]
    fn no_budget_keeps_nothing() {
        let memory = Memory::new(0, Duration::from_secs(60));
        memory.put(key(b"a"), v1::Tensor { data: vec![0; 8].into(), ..Default::default() });
        assert_eq!(memory.get(&key(b"a")), None);
    }
}
