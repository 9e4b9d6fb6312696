//! One step of the engine as one forward: the rows of all sequences that have work, whatever kind each is.

use tch::{Kind, Tensor};

use crate::{
    kv::{Append, KvCache},
    llama::{Llama, Rows},
};

/// The rows of one sequence in a step, what they are, and what is wanted of them.
#[derive(Debug)]
pub(crate) struct StepInput<'a> {
    pub(crate) kv: &'a mut KvCache,
    pub(crate) append: Append<'a>,
    /// One id for each row; at a row that an embedding takes, any id.
    pub(crate) ids: Vec<u32>,
    pub(crate) embeddings: Vec<Placed>,
    pub(crate) output: OutputKind,
}

/// Embeddings in place of the ids from row `first` of an input on.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) first: usize,
    /// The embeddings, [rows, embedding_width].
    pub(crate) embeddings: Tensor,
}

/// What is wanted of an input's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputKind {
    /// Only that the cache be filled.
    Nothing,
    /// The next token's logits, after the last row of a line or after every row of a branch.
    Logits,
    /// The next embedding of an image, after the last row.
    Embedding,
}

/// What an input asked for.
#[derive(Debug)]
pub(crate) enum StepOutput {
    Nothing,
    /// The logits, [rows, vocabulary].
    Logits(Vec<f32>),
    /// The embedding, [1, embedding_width], as it is to be fed back.
    Embedding(Tensor),
}

/// Computes one step; outputs come in the order of the inputs.
pub(crate) fn run(model: &Llama, mut inputs: Vec<StepInput<'_>>) -> Vec<StepOutput> {
    let x = embedded(model, &inputs);
    let mut rows: Vec<Rows<'_>> =
        inputs.iter_mut().map(|input| Rows { kv: &mut *input.kv, append: input.append }).collect();
    let hidden = model.forward(&x, &mut rows);
    let logits = select(model, &hidden, &wanted_rows(&inputs, OutputKind::Logits))
        .map(|hidden| floats(&model.logits(&hidden)))
        .unwrap_or_default();
    let mut logits = logits.as_slice();
    let embeddings = select(model, &hidden, &wanted_rows(&inputs, OutputKind::Embedding))
        .map(|hidden| model.project_down(&hidden).split(1, 0))
        .unwrap_or_default();
    let mut embeddings = embeddings.into_iter();
    let vocabulary = model.config().vocab_size as usize;
    let answer = |input: &StepInput<'_>| match input.output {
        OutputKind::Nothing => StepOutput::Nothing,
        OutputKind::Logits => {
            let (own, rest) = logits.split_at(input.wanted() * vocabulary);
            logits = rest;
            StepOutput::Logits(own.to_vec())
        }
        OutputKind::Embedding => {
            StepOutput::Embedding(embeddings.next().expect("one row was selected for each"))
        }
    };
    inputs.iter().map(answer).collect()
}

impl StepInput<'_> {
    /// Returns how many of the input's last rows are wanted.
    fn wanted(&self) -> usize {
        match (self.output, self.append) {
            (OutputKind::Nothing, _) => 0,
            (_, Append::Sequential(_)) => 1,
            (_, Append::Beams(parents)) => parents.len(),
        }
    }
}

/// Embeds the rows of all inputs, [tokens, width]: one look-up for all ids, one projection for all embeddings.
fn embedded(model: &Llama, inputs: &[StepInput<'_>]) -> Tensor {
    let ids: Vec<i64> = inputs.iter().flat_map(|input| input.ids.iter().map(|&id| i64::from(id))).collect();
    let mut x = model.embed(&Tensor::from_slice(&ids));
    let (mut first, mut rows, mut embeddings) = (0, Vec::new(), Vec::new());
    for input in inputs {
        for placed in &input.embeddings {
            let start = (first + placed.first) as i64;
            let (length, _) = placed.embeddings.size2().expect("embeddings have two dimensions");
            rows.extend(start..start + length);
            embeddings.push(&placed.embeddings);
        }
        first += input.ids.len();
    }
    if rows.is_empty() {
        return x;
    }
    let rows = Tensor::from_slice(&rows).to_device(model.device());
    x.index_copy_(0, &rows, &model.project_up(&Tensor::cat(&embeddings, 0)))
}

/// Returns the indices, over all inputs, of the rows that something of this kind is wanted of.
fn wanted_rows(inputs: &[StepInput<'_>], kind: OutputKind) -> Vec<i64> {
    let mut end = 0;
    let mut rows = Vec::new();
    for input in inputs {
        end += input.ids.len();
        if input.output == kind {
            rows.extend((end - input.wanted()) as i64..end as i64);
        }
    }
    rows
}

fn select(model: &Llama, hidden: &Tensor, rows: &[i64]) -> Option<Tensor> {
    let rows = (!rows.is_empty()).then(|| Tensor::from_slice(rows).to_device(model.device()))?;
    Some(hidden.index_select(0, &rows))
}

fn floats(x: &Tensor) -> Vec<f32> {
    let x = x.to_device(tch::Device::Cpu).to_kind(Kind::Float).contiguous();
    let mut values = vec![0.0_f32; x.numel()];
    x.copy_data(&mut values, x.numel());
    values
}
