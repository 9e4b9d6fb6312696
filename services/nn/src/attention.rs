//! The one attention function: a faster one replaces its body, never a model.

use tch::{Device, Kind, Tensor};

/// Computes scaled dot-product attention, softmax(q kᵀ / √head_width) v.
///
/// q: [batch, heads, queries, head_width]; k and v: [batch, heads, tokens, head_width]
/// -> [batch, heads, queries, head_width]
///
/// With `causal`, query i sees the keys 0..=i. The mask is aligned at the top left, so it is meant for equal lengths; a
/// later chunk of a prompt needs the earlier keys too and is attended without it.
///
/// # Panics
///
/// q or k does not have four dimensions, or torch refuses their shapes.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    let (_, _, queries, _) = q.size4().expect("q has four dimensions");
    let (_, _, tokens, _) = k.size4().expect("k has four dimensions");
    debug_assert!(!causal || queries == tokens, "a causal mask is aligned at the top left");
    if queries > 1 && queries * tokens <= WRITTEN_OUT_MAX && computes_narrow_on_cpu(q) {
        return attend_written_out(q, k, v, causal);
    }
    attend_fused(q, k, v, causal)
}

fn attend_fused(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, causal, None, false)
}

/// Whether the processor's own instructions compute in bfloat16, as in training; what is served on a CPU computes in
/// float32.
fn computes_narrow_on_cpu(x: &Tensor) -> bool {
    x.kind() == Kind::BFloat16 && x.device() == Device::Cpu && is_x86_feature_detected!("avx512bf16")
}

/// Scores of one head, up to which [`attend_written_out`] is the faster one. Forward and backward on one core with
/// AVX512_BF16, heads of width 32: 38 instead of 188 ms for 384 heads of 65 queries, 109 instead of 217 ms for 128
/// heads of 240. At 400 queries nothing is gained any more, and at 800 it is the slower one.
const WRITTEN_OUT_MAX: i64 = 256 * 256;

/// Computes attention by two products of all heads. In bfloat16 torch's fused kernel for CPUs sets up a library call
/// for each head and block, which is most of its time where heads are small.
fn attend_written_out(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    let (batch, heads, queries, head_width) = q.size4().expect("q has four dimensions");
    let (_, _, tokens, _) = k.size4().expect("k has four dimensions");
    // [batch, heads, rows, head_width] -> [(batch heads), rows, head_width]
    let [q, k, v] = [q, k, v].map(|x| x.flatten(0, 1));
    let mut unseen = Tensor::zeros([queries, tokens], (q.kind(), q.device()));
    if causal {
        unseen = unseen.fill(f64::NEG_INFINITY).triu(1);
    }
    let scores = unseen.baddbmm(&q, &k.transpose(1, 2), 1.0, 1.0 / (head_width as f64).sqrt());
    scores.softmax(-1, v.kind()).bmm(&v).unflatten(0, [batch, heads])
}

/// Computes the attention of [`attend`] under a mask that is added to the scores: query i sees key j where `mask` is 0,
/// and does not see it where `mask` is -inf.
///
/// q, k and v as there; mask: [queries, tokens], of the kind of q. Every query must see some key, or its row is NaN.
pub fn attend_masked(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, Some(mask), 0.0, false, None, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Attend = fn(&Tensor, &Tensor, &Tensor, bool) -> Tensor;

    /// Values and gradients of either way, against float32.
    #[test]
    fn attention_in_bfloat16_is_attention() {
        tch::manual_seed(3);
        for (queries, tokens, causal) in [(7, 7, true), (5, 9, false), (1, 9, false)] {
            let random = |rows| Tensor::randn([2, 3, rows, 8], (Kind::Float, Device::Cpu));
            let inputs = [random(queries), random(tokens), random(tokens)];
            let attended = |attend: Attend, kind| {
                let [q, k, v] = [0, 1, 2].map(|i| inputs[i].to_kind(kind).detach().set_requires_grad(true));
                let output = attend(&q, &k, &v, causal);
                assert_eq!(output.size(), [2, 3, queries, 8]);
                output.square().sum(Kind::Float).backward();
                [output, q.grad(), k.grad(), v.grad()].map(|x| x.to_kind(Kind::Float).detach())
            };
            let wide = attended(attend_fused, Kind::Float);
            for (way, attend) in [("fused", attend_fused as Attend), ("written out", attend_written_out)] {
                for (narrow, wide) in attended(attend, Kind::BFloat16).iter().zip(&wide) {
                    let most = wide.abs().max().double_value(&[]);
                    let error = (narrow - wide).abs().max().double_value(&[]);
                    assert!(error <= 0.03 * most, "{way} {queries} {tokens} {causal}: {error} of {most}");
                }
            }
        }
    }
}
