//! The first level: this process's own memory, by a byte budget. Values here were checked when they came in.

use std::time::Duration;

use emu2_proto::v1;
use moka::{policy::EvictionPolicy, sync::Cache};

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
        // By recency: moka's default keeps whatever was asked for most often, so that values which are never asked for
        // again can keep every newer one out.
        let values = || {
            Cache::builder()
                .eviction_policy(EvictionPolicy::lru())
                .max_capacity(budget_bytes)
                .weigher(weigh)
                .time_to_live(ttl)
                .build()
        };
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

    /// As moka's default policy would not: a hundred values were asked for thrice, and never again.
    #[test]
    fn the_newest_value_is_kept_however_often_older_ones_were_asked_for() {
        let memory = Memory::new(100 * 1280, Duration::from_secs(60));
        let tensor = v1::Tensor { data: vec![0; 1024].into(), ..Default::default() };
        let settled = || memory.values.as_ref().unwrap().run_pending_tasks();
        let old: Vec<_> = (0..100_u8).map(|index| key(&[index])).collect();
        old.iter().for_each(|key| memory.put(*key, tensor.clone()));
        settled();
        for _ in 0..3 {
            assert!(old.iter().all(|key| memory.get(key).is_some()));
            settled();
        }
        for index in 0..100_u8 {
            let new = key(&[1, index]);
            memory.put(new, tensor.clone());
            settled();
            assert!(memory.get(&new).is_some(), "the image just sent, number {index}");
        }
    }

    #[test]
    fn no_budget_keeps_nothing() {
        let memory = Memory::new(0, Duration::from_secs(60));
        memory.put(key(b"a"), v1::Tensor { data: vec![0; 8].into(), ..Default::default() });
        assert_eq!(memory.get(&key(b"a")), None);
    }
}
