//! The llm's forward pass over a batch of documents, and what it reads in the place of the embeddings that it is to
//! predict.

use emu2_encoder::eva_vit::EvaVit;
use emu2_llm::llama::Llama;
use tch::{Device, Tensor};

use crate::{layout::Layout, model::Model};

/// What the llm reads in the place of an image's embeddings while it predicts the same image's later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingInput {
    /// The tower's embeddings of the true image. From these alone, a model learns to copy the background and the thing
    /// from the first ones, and in serving the first ones are its own, of which it has learned little.
    TeacherForcing,
    /// The model's own predictions (arXiv 1506.03099), much as in serving; all of them from one blind pass, where
    /// serving predicts each from those before it.
    ScheduledSampling,
    /// Zeros: every embedding must come from the prompt.
    Blind,
}

impl EmbeddingInput {
    /// Returns the name of the regression's error in the log.
    pub(crate) fn error_name(self) -> &'static str {
        match self {
            Self::TeacherForcing => "mean_squared_error",
            Self::ScheduledSampling => "mean_squared_error_scheduled_sampling",
            Self::Blind => "mean_squared_error_blind",
        }
    }
}

/// A batch of documents, embedded and ready for forward passes.
pub(crate) struct LlmPass<'a> {
    llm: &'a Llama,
    layout: &'a Layout,
    /// The token embedding of every position, with that of a slot's token in slots: [(sequences tokens), hidden]
    tokens: Tensor,
    /// The tower's embeddings of the images, if there are any: [(images queries), width]
    embeddings: Option<Tensor>,
}

impl<'a> LlmPass<'a> {
    /// Encodes the images and embeds the tokens.
    ///
    /// `pixels`: normalised, [images, 3, height, width_px]
    pub(crate) fn new((tower, llm): (&EvaVit, &'a Llama), layout: &'a Layout, pixels: &Tensor) -> Self {
        let tokens = llm.embed(&indices(&layout.ids, llm.device()));
        let encode = || tower.encode_image(&pixels.to_kind(tower.kind()), tower.config.n_query).flatten(0, 1);
        Self { llm, layout, tokens, embeddings: (!layout.slots.is_empty()).then(encode) }
    }

    /// Returns row numbers as a tensor on the llm's device: [rows]
    pub(crate) fn rows(&self, rows: &[i64]) -> Tensor {
        indices(rows, self.llm.device())
    }

    /// Returns the states after the last layer: [(sequences tokens), hidden]
    pub(crate) fn hidden(&self, input: EmbeddingInput) -> Tensor {
        let Some(embeddings) = &self.embeddings else { return self.forward(&self.tokens) };
        // Where no image is predicted the inputs do not differ, and a second pass would be for nothing.
        let input = if self.layout.images.is_empty() { EmbeddingInput::TeacherForcing } else { input };
        let targets = self.rows(&self.layout.images.targets);
        let reading = |embeddings: &Tensor| {
            let slots = self.rows(&self.layout.slots);
            self.forward(&self.tokens.index_copy(0, &slots, &self.llm.project_up(embeddings)))
        };
        let blind = || reading(&embeddings.index_fill(0, &targets, 0.0));
        match input {
            EmbeddingInput::TeacherForcing => reading(embeddings),
            EmbeddingInput::Blind => blind(),
            EmbeddingInput::ScheduledSampling => {
                let predicted = tch::no_grad(|| self.predicted(&blind()));
                reading(&embeddings.index_copy(0, &targets, &predicted))
            }
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (sequences, tokens) = (self.layout.sequences as i64, self.layout.tokens as i64);
        // [(sequences tokens), hidden] -> [sequences, tokens, hidden]
        self.llm.forward_whole(&x.view([sequences, tokens, -1])).flatten(0, 1)
    }

    /// Returns the embeddings that are predicted from hidden states, of every image that is learned:
    /// [(images queries), width]
    pub(crate) fn predicted(&self, hidden: &Tensor) -> Tensor {
        self.llm.project_down(&hidden.index_select(0, &self.rows(&self.layout.images.rows)))
    }

    /// Returns the tower's embeddings that are to be predicted, detached: [(images queries), width]; `None` where no
    /// image is learned.
    pub(crate) fn target(&self) -> Option<Tensor> {
        let embeddings = self.embeddings.as_ref().filter(|_| !self.layout.images.is_empty())?;
        Some(embeddings.index_select(0, &self.rows(&self.layout.images.targets)).detach())
    }
}

fn indices(rows: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(rows).to_device(device)
}

/// Whose embeddings condition the UNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionSource {
    /// The tower's embeddings of the true image.
    Tower,
    /// The llm's predictions, made from its own earlier ones.
    Llm,
}

/// Returns the embeddings of the images to paint that condition the UNet, detached: [images, queries, width].
///
/// `pixels`: all of the documents' images, normalised, [images, 3, height, width_px]
///
/// # Panics
/// If no image is to be painted.
pub fn condition_embeddings(
    model: &Model,
    layout: &Layout,
    pixels: &Tensor,
    source: ConditionSource,
) -> Tensor {
    let embeddings = tch::no_grad(|| {
        let pass = LlmPass::new((&model.tower, &model.llm), layout, pixels);
        let target = pass.target().expect("an image is to be painted");
        match source {
            ConditionSource::Tower => target,
            ConditionSource::Llm => pass.predicted(&pass.hidden(EmbeddingInput::ScheduledSampling)),
        }
    });
    // [(images queries), width] -> [images, queries, width]
    embeddings.view([-1, i64::from(model.n_query()), model.tower.config.width])
}
