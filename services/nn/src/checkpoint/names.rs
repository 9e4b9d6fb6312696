//! The one table of names: how each layout spells a weight, the part it belongs to, and its canonical name.
//!
//! A diffusers folder keeps each part in a folder of its own; its names are looked up with the folder in front
//! (`unet.conv_in.weight`), which is how upstream's native Emu2-Gen file spells them.

use std::fmt;

/// The parts of Emu2 that services load on their own. The weights of a part have canonical names, whatever the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The visual encoder, an EVA-CLIP ViT; its canonical names are the native ones without `visual.`.
    Visual,
    /// LLaMA and both projections; their canonical names are those of Emu2's native state dict.
    Llm,
    /// The visual decoder's UNet; its canonical names are the native ones without `unet.`.
    Unet,
    /// The visual decoder's VAE; its canonical names are the native ones without `vae.`.
    Vae,
}

impl Part {
    /// All parts, in the order of the enum.
    pub const ALL: [Self; 4] = [Self::Visual, Self::Llm, Self::Unet, Self::Vae];

    /// Returns the name of the part's section in the configuration.
    pub(super) fn section(self) -> &'static str {
        match self {
            Self::Visual => "vision",
            Self::Llm => "llama",
            Self::Unet => "unet",
            Self::Vae => "vae",
        }
    }

    /// Returns the name of a weight as a native checkpoint spells it.
    pub(crate) fn native_name(self, canonical: &str) -> String {
        match self {
            Self::Llm => canonical.to_owned(),
            _ => format!("{self}.{canonical}"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Visual => "visual",
            Self::Llm => "llm",
            Self::Unet => "unet",
            Self::Vae => "vae",
        })
    }
}

/// How a name begins, the part that it belongs to, and how its canonical name begins instead.
const NAMES: [(&str, Part, &str); 8] = [
    // Upstream's native state dicts.
    ("visual.", Part::Visual, ""),
    ("decoder.lm.", Part::Llm, "decoder.lm."),
    ("project_up.", Part::Llm, "project_up."),
    ("project_down.", Part::Llm, "project_down."),
    ("unet.", Part::Unet, ""),
    ("vae.", Part::Vae, ""),
    // Hugging Face, where both projections stand as above.
    ("model.visual.", Part::Visual, ""),
    ("model.decoder.lm.", Part::Llm, "decoder.lm."),
];
/// What native Emu2-Gen files and diffusers folders put before the names of the multimodal model, in either spelling.
const WRAPPER: &str = "multimodal_encoder.";

/// Whether published files hold this name and nothing needs it: rotary buffers that old transformers versions kept
/// (lossy in bfloat16: the tables are rebuilt), and Stable Diffusion's safety checker.
pub(super) fn is_known_extra(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.starts_with("safety_checker.")
}

/// Returns the part and the canonical name of a weight that is named as in any layout; none if the name is not one of
/// Emu2's.
pub fn canonical(name: &str) -> Option<(Part, String)> {
    let name = name.strip_prefix(WRAPPER).unwrap_or(name);
    NAMES.iter().find_map(|&(prefix, part, canonical)| {
        name.strip_prefix(prefix).map(|rest| (part, format!("{canonical}{rest}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_spells_the_same_weights() {
        for (part, name, spellings) in [
            (
                Part::Visual,
                "blocks.0.attn.q_bias",
                &[
                    "visual.blocks.0.attn.q_bias",
                    "multimodal_encoder.visual.blocks.0.attn.q_bias",
                    "model.visual.blocks.0.attn.q_bias",
                    "multimodal_encoder.model.visual.blocks.0.attn.q_bias",
                ][..],
            ),
            (
                Part::Llm,
                "decoder.lm.lm_head.weight",
                &[
                    "decoder.lm.lm_head.weight",
                    "multimodal_encoder.decoder.lm.lm_head.weight",
                    "model.decoder.lm.lm_head.weight",
                    "multimodal_encoder.model.decoder.lm.lm_head.weight",
                ],
            ),
            (Part::Llm, "project_up.weight", &["project_up.weight", "multimodal_encoder.project_up.weight"]),
            (Part::Unet, "conv_in.bias", &["unet.conv_in.bias"]),
            (Part::Vae, "decoder.conv_in.bias", &["vae.decoder.conv_in.bias"]),
        ] {
            for spelling in spellings {
                assert_eq!(canonical(spelling), Some((part, name.to_owned())), "{spelling}");
            }
            assert_eq!(part.native_name(name), spellings[0]);
        }
        for foreign in
            ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "visual", "decoder.conv_in.bias"]
        {
            assert_eq!(canonical(foreign), None, "{foreign}");
        }
    }
}
