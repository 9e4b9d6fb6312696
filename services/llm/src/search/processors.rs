//! What is done to scores before a token is chosen, in transformers' order: repetition penalty, minimal length, and
//! for sampling temperature, top-k, top-p.

/// What is done to raw logits, or to a beam search's log-probabilities (which are not normalised again).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Processors {
    /// The factor by which ids that were already chosen become less likely; 1 is off.
    pub(crate) repetition_penalty: f32,
    /// How many ids there must be before `end` may be chosen.
    pub(crate) min_length: usize,
    /// The id of the end of text.
    pub(crate) end: u32,
}

impl Processors {
    /// Changes the scores of the next token; `ids` is everything chosen so far, after the unseen beginning of text.
    pub(crate) fn apply(&self, ids: &[u32], scores: &mut [f32]) {
        if self.repetition_penalty != 1.0 {
            self.penalise(ids, scores);
        }
        if ids.len() < self.min_length {
            scores[self.end as usize] = f32::NEG_INFINITY;
        }
    }

    /// Penalises each distinct id once.
    fn penalise(&self, ids: &[u32], scores: &mut [f32]) {
        let mut seen = ids.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let score = &mut scores[id as usize];
            let penalised = if *score < 0.0 {
                *score * self.repetition_penalty
            } else {
                *score / self.repetition_penalty
            };
            // An infinite score would make a NaN of the next difference.
            *score = penalised.clamp(f32::MIN, f32::MAX);
        }
    }
}

/// What narrows a distribution before a token is drawn; what is cut off becomes -inf.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warpers {
    /// What logits are divided by, above 0; 1 is off.
    pub temperature: f32,
    /// How many of the best to keep, with whatever equals the last of them; none keeps all.
    pub top_k: Option<usize>,
    /// The probability that the kept ones together pass, with the one that crosses it; none keeps all.
    pub top_p: Option<f32>,
}

impl Warpers {
    /// Changes the scores of the next token, in transformers' order.
    pub(crate) fn apply(&self, scores: &mut [f32]) {
        if self.temperature != 1.0 {
            self.apply_temperature(scores);
        }
        if let Some(k) = self.top_k {
            keep_top_k(scores, k);
        }
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            keep_top_p(scores, p);
        }
    }
}

impl Warpers {
    /// Divides the scores as they are, as upstream, wherever that can be. Where it would overflow, they are taken
    /// relative to the best, which changes no probability: the best becomes 0, and what overflows then is a probability
    /// of 0.
    fn apply_temperature(&self, scores: &mut [f32]) {
        let finite = scores.iter().copied().filter(|score| score.is_finite());
        let (best, largest) = finite
            .fold((f32::MIN, 0.0_f32), |(best, largest), score| (best.max(score), largest.max(score.abs())));
        let origin = if (largest / self.temperature).is_finite() { 0.0 } else { best };
        scores.iter_mut().for_each(|score| *score = (*score - origin) / self.temperature);
    }
}

fn keep_top_k(scores: &mut [f32], k: usize) {
    if k >= scores.len() {
        return;
    }
    let mut sorted = scores.to_vec();
    let (_, &mut kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    scores.iter_mut().filter(|score| **score < kth).for_each(|score| *score = f32::NEG_INFINITY);
}

/// Cuts from the unlikely end while what is cut stays within 1 - p; the best always stays.
fn keep_top_p(scores: &mut [f32], p: f32) {
    let mut rising: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > f32::NEG_INFINITY).collect();
    rising.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let Some(&best) = rising.last() else { return };
    let max = scores[best];
    let total: f64 = rising.iter().map(|&i| f64::from((scores[i] - max).exp())).sum();
    let mut cut = 0.0_f64;
    for &index in &rising[..rising.len() - 1] {
        let probability = (f64::from((scores[index] - max).exp()) / total) as f32;
        cut += f64::from(probability);
        if cut as f32 > 1.0 - p {
            break;
        }
        scores[index] = f32::NEG_INFINITY;
    }
}
