//! The one attention function: a faster one replaces its body, never a model.

use tch::Tensor;

/// softmax(q kᵀ / √head_width) v
///
/// q: [batch, heads, queries, head_width], k and v: [batch, heads, tokens, head_width]
/// -> [batch, heads, queries, head_width]
///
/// `causal`: query i sees keys 0..=i. The mask is aligned at the top left, so it is meant for equal lengths; a
/// later chunk of a prompt needs the earlier keys too and is attended without it.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Tensor {
    debug_assert!(!causal || q.size()[2] == k.size()[2], "a causal mask is aligned at the top left");
    Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, causal, None, false)
}

/// As [`attend`], where query i sees key j if `mask` is 0 there and not if it is -inf.
///
/// mask: [queries, tokens], of the queries' kind; every query sees something.
pub fn attend_masked(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, Some(mask), 0.0, false, None, false)
}
