//! Models by name: their sections, and what they hold.

use serde_json::{Map, Value, json};

use crate::checkpoint::Part;

/// A model of which nothing but sizes is known.
#[derive(Debug)]
pub(super) struct Size {
    pub(super) config: Map<String, Value>,
    /// How many values each part has, in the order of [`Part::ALL`], as far as serving loads it: without the VAE's
    /// encoder.
    pub(super) values: [u64; Part::ALL.len()],
    /// How many pieces the tokenizer has: the vocabulary without Emu2's 272 special tokens.
    pub(super) pieces: usize,
}

const NAMES: [&str; 3] = ["emu2-37b", "emu2-third", "emu2-tiny"];

pub(super) fn find(name: &str) -> Result<Size, String> {
    let (sections, values, pieces) = match name {
        "emu2-37b" => (published(), [4_350_093_568, 32_556_419_584, 2_525_520_644, 49_490_199], 32_000),
        "emu2-third" => (third(), [425_843_920, 3_585_754_240, 229_173_892, 4_996_279], 32_000),
        "emu2-tiny" => (tiny(), [301_612, 569_568, 1_355_844, 228_407], 899),
        _ => return Err(format!("sizes are {}, got `{name}`", NAMES.join(", "))),
    };
    let mut config = Map::from_iter(sections.map(|(section, value)| (section.to_owned(), value)));
    config.insert("name".to_owned(), json!(name));
    config.insert("trained".to_owned(), json!(false));
    Ok(Size { config, values, pieces })
}

/// Returns the sections of Emu2-Gen as published, which is what sections default to.
fn published() -> [(&'static str, Value); 5] {
    ["vision", "llama", "unet", "vae", "scheduler"].map(|section| (section, json!({})))
}

/// Returns the sections of a model with all layers of the published one at about a third of their width, in whole heads
/// and groups: 17 GB in float32, the largest that a host of 24 GB serves.
fn third() -> [(&'static str, Value); 5] {
    [
        ("vision", json!({ "width": 560 })),
        ("llama", json!({ "hidden_size": 2176, "intermediate_size": 5888, "num_attention_heads": 17 })),
        (
            "unet",
            json!({
                "block_out_channels": [96, 192, 384],
                // The first level has no attention, but its number must divide too.
                "attention_head_dim": [2, 3, 6],
                "cross_attention_dim": 560,
                "projection_class_embeddings_input_dim": 560 + 6 * 256,
            }),
        ),
        ("vae", json!({ "block_out_channels": [32, 96, 160, 160] })),
        ("scheduler", json!({})),
    ]
}

/// Returns the sections of a model as small as it goes, for tests; the sizes of the golden models.
fn tiny() -> [(&'static str, Value); 5] {
    [
        (
            "vision",
            json!({
                "image_size": 56, "width": 64, "layers": 3, "head_width": 16, "n_query": 16, "v_query": 16,
            }),
        ),
        (
            "llama",
            json!({
                "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3,
                "vocab_size": 1171,
            }),
        ),
        (
            "unet",
            json!({
                "sample_size": 8,
                "block_out_channels": [16, 32, 48],
                "attention_head_dim": [1, 2, 3],
                "transformer_layers_per_block": [1, 1, 2],
                "cross_attention_dim": 64,
                "addition_time_embed_dim": 32,
                "projection_class_embeddings_input_dim": 256,
                "norm_num_groups": 16,
            }),
        ),
        ("vae", json!({ "block_out_channels": [16, 24, 32, 32], "norm_num_groups": 8 })),
        ("scheduler", json!({})),
    ]
}
