//! Which slots of a prompt still wait for their embeddings, and whether what comes fits.

use emu2_proto::{
    array::{Array, Dtype},
    stage::SlotEmbeddings,
};
use emu2_serve::status::Violation;

use crate::prompt::Slot;

#[derive(Debug)]
pub(super) struct Placement {
    slots: Vec<Slot>,
    arrived: Vec<bool>,
    dtype: Dtype,
    width: usize,
}

impl Placement {
    pub(super) fn new(slots: Vec<Slot>, dtype: Dtype, width: usize) -> Self {
        Self { arrived: vec![false; slots.len()], slots, dtype, width }
    }

    /// The slot and its embeddings, [len, width].
    pub(super) fn take(&mut self, message: SlotEmbeddings) -> Result<(usize, Array), Violation> {
        let slot = message.slot as usize;
        let Some(&Slot { len, .. }) = self.slots.get(slot) else {
            let slots = self.slots.len();
            return Err(Violation::new(
                "embeddings.slot",
                format!("must be below {slots}, the prompt's slots, got {slot}"),
            ));
        };
        if self.arrived[slot] {
            return Err(Violation::new("embeddings.slot", format!("must come once, got {slot} twice")));
        }
        let array = Array::try_from(message.embeddings)
            .and_then(|array| array.expect(self.dtype, &[len, self.width]));
        let array =
            array.map_err(|error| Violation::new(format!("embeddings[slot {slot}]"), error.to_string()))?;
        self.arrived[slot] = true;
        Ok((slot, array))
    }

    /// How many the prompt has.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The first slot that has not been filled.
    pub(super) fn missing(&self) -> Option<usize> {
        self.arrived.iter().position(|arrived| !arrived)
    }

    /// Checks that every slot has been filled when no more embeddings will come.
    pub(super) fn finish(&self) -> Result<(), Violation> {
        match self.missing() {
            None => Ok(()),
            Some(missing) => {
                let (slots, arrived) =
                    (self.slots.len(), self.arrived.iter().filter(|&&arrived| arrived).count());
                let text = format!(
                    "must come for all {slots} slots, the stream ended after {arrived}: slot {missing} is missing"
                );
                Err(Violation::new("embeddings", text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use emu2_proto::v1;

    use super::*;

    fn embeddings(slot: u32, shape: &[u32], values: &[f32]) -> SlotEmbeddings {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let dtype = v1::Dtype::F32.into();
        SlotEmbeddings {
            slot,
            embeddings: Some(v1::Tensor { dtype, shape: shape.to_vec(), data: data.into() }),
        }
    }

    #[test]
    fn each_slot_is_filled_once_with_what_fits() {
        let slots = vec![Slot { start: 2, len: 2 }, Slot { start: 8, len: 1 }];
        let mut placement = Placement::new(slots, Dtype::F32, 3);
        let mut error = |message| placement.take(message).unwrap_err().to_string();
        for (message, expected) in [
            (embeddings(2, &[1, 3], &[0.0; 3]), "embeddings.slot must be below 2, the prompt's slots, got 2"),
            (embeddings(1, &[2, 3], &[0.0; 6]), "embeddings[slot 1] shape must be [1, 3], got [2, 3]"),
            (embeddings(1, &[1, 3], &[0.0; 2]), "embeddings[slot 1] data must be 12 bytes"),
            (
                embeddings(1, &[1, 3], &[0.0, f32::NAN, 0.0]),
                "embeddings[slot 1] values must be finite, got NaN at element 1",
            ),
            (SlotEmbeddings { slot: 1, embeddings: None }, "embeddings[slot 1] tensor is missing"),
        ] {
            let error = error(message);
            assert!(error.starts_with(expected), "{error}");
        }
        assert_eq!(placement.take(embeddings(1, &[1, 3], &[1.0; 3])).unwrap().0, 1);
        let twice = placement.take(embeddings(1, &[1, 3], &[1.0; 3])).unwrap_err().to_string();
        assert_eq!(twice, "embeddings.slot must come once, got 1 twice");
        let missing = placement.finish().unwrap_err().to_string();
        assert!(missing.contains("all 2 slots") && missing.ends_with("slot 0 is missing"), "{missing}");
        placement.take(embeddings(0, &[2, 3], &[1.0; 6])).unwrap();
        assert_eq!(placement.finish(), Ok(()));

        let mut half = Placement::new(vec![Slot { start: 0, len: 1 }], Dtype::Bf16, 3);
        let wrong = half.take(embeddings(0, &[1, 3], &[0.0; 3])).unwrap_err().to_string();
        assert_eq!(wrong, "embeddings[slot 0] dtype must be bfloat16, got float32");
    }
}
