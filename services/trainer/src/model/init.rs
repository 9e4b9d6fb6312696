//! What training starts from: normal values as wide as their fan-in asks, and residual branches that begin small.
//!
//! The random model's own values have one width for all sizes; here they are rescaled, so that the same seed still
//! decides them.

use tch::{Tensor, nn::VarStore};

/// Standard deviation of the random model's values.
const RANDOM: f64 = 0.02;
/// The deviation of rows of the vocabulary, of positions and of the class token: below the images' embeddings, which
/// are about 1.
const TABLES: f64 = 0.1;
const HEAD: f64 = 0.02;
/// Torch's own layers use uniform values of this deviation times the root of the fan-in.
const LAYERS: f64 = 0.577;
/// A residual branch's last layer, against [`LAYERS`]: a dozen branches add up to about the trunk.
const BRANCHES: f64 = 0.25;

/// Names that end a residual branch.
const BRANCH_ENDS: [&str; 6] = [
    ".o_proj.weight",
    ".down_proj.weight",
    ".conv2.weight",
    ".to_out.0.weight",
    ".net.2.weight",
    ".proj_out.weight",
];

pub(super) fn scale(variables: &VarStore) {
    for (name, mut tensor) in variables.variables() {
        tch::no_grad(|| {
            if tensor.dim() == 1 {
                let _ = tensor.fill_(if name.ends_with(".weight") { gain(&name) } else { 0.0 });
            } else {
                let _ = tensor.g_mul_scalar_(deviation(&name, &tensor) / RANDOM);
            }
        });
    }
}

/// Returns the initial scale of a norm. The tower's norms sit on its branches and make them as wide as the trunk,
/// however small what they normalise.
fn gain(name: &str) -> f64 {
    if name.starts_with("visual.blocks.") { BRANCHES } else { 1.0 }
}

fn deviation(name: &str, tensor: &Tensor) -> f64 {
    if ["embed_tokens.weight", "cls_token", "pos_embed"].iter().any(|end| name.ends_with(end)) {
        return TABLES;
    }
    if name.ends_with("lm_head.weight") || name == "unet.conv_out.weight" {
        return HEAD;
    }
    let fan_in: i64 = tensor.size().iter().skip(1).product();
    let branch = BRANCH_ENDS.iter().any(|end| name.ends_with(end));
    LAYERS * if branch { BRANCHES } else { 1.0 } / (fan_in as f64).sqrt()
}
