//! One step of the engine as one forward: the rows of all sequences that have work, whatever kind each is.

use tch::{Kind, Tensor};

use crate::{
    kv::{Append, KvCache},
    llama::{Llama, Rows},
};

/// The rows of one sequence, what they are, and what is wanted of them.
#[derive(Debug)]
pub struct Feed<'a> {
    pub kv: &'a mut KvCache,
    pub append: Append<'a>,
    /// One for each row; at a row that an embedding takes, any id.
    pub ids: Vec<u32>,
    pub embeddings: Vec<Placed>,
    pub wants: Wants,
}

/// Embeddings, [rows, embedding_width], in place of the ids from row `first` of a feed on.
#[derive(Debug)]
pub struct Placed {
    pub first: usize,
    pub embeddings: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// Only that the cache be filled.
    Nothing,
    /// The next token's, after the last row of a line or after every row of a branch.
    Logits,
    /// The next embedding of an image, after the last row.
    Embedding,
}

/// What a feed asked for.
#[derive(Debug)]
pub enum Answer {
    Nothing,
    /// [rows, vocabulary]
    Logits(Vec<f32>),
    /// [1, embedding_width], as it is to be fed back.
    Embedding(Tensor),
}

/// Computes one step; answers come in the order of the feeds.
pub fn run(model: &Llama, mut feeds: Vec<Feed<'_>>) -> Vec<Answer> {
    let x = inputs(model, &feeds);
    let mut rows: Vec<Rows<'_>> =
        feeds.iter_mut().map(|feed| Rows { kv: &mut *feed.kv, append: feed.append }).collect();
    let hidden = model.forward(&x, &mut rows);
    let logits = select(model, &hidden, &wanted_rows(&feeds, Wants::Logits))
        .map(|hidden| floats(&model.logits(&hidden)))
        .unwrap_or_default();
    let mut logits = logits.as_slice();
    let embeddings = select(model, &hidden, &wanted_rows(&feeds, Wants::Embedding))
        .map(|hidden| model.project_down(&hidden).split(1, 0))
        .unwrap_or_default();
    let mut embeddings = embeddings.into_iter();
    let vocabulary = model.config().vocab_size as usize;
    let answer = |feed: &Feed<'_>| match feed.wants {
        Wants::Nothing => Answer::Nothing,
        Wants::Logits => {
            let (own, rest) = logits.split_at(feed.wanted() * vocabulary);
            logits = rest;
            Answer::Logits(own.to_vec())
        }
        Wants::Embedding => Answer::Embedding(embeddings.next().expect("one row was selected for each")),
    };
    feeds.iter().map(answer).collect()
}

impl Feed<'_> {
    /// How many of its last rows are wanted.
    fn wanted(&self) -> usize {
        match (self.wants, self.append) {
            (Wants::Nothing, _) => 0,
            (_, Append::Line(_)) => 1,
            (_, Append::Branch(parents)) => parents.len(),
        }
    }
}

/// Rows of all feeds, [tokens, width]: one look-up for all ids, one projection for all embeddings.
fn inputs(model: &Llama, feeds: &[Feed<'_>]) -> Tensor {
    let ids: Vec<i64> = feeds.iter().flat_map(|feed| feed.ids.iter().map(|&id| i64::from(id))).collect();
    let mut x = model.embed(&Tensor::from_slice(&ids));
    let (mut first, mut rows, mut embeddings) = (0, Vec::new(), Vec::new());
    for feed in feeds {
        for placed in &feed.embeddings {
            let start = (first + placed.first) as i64;
            rows.extend(start..start + placed.embeddings.size()[0]);
            embeddings.push(&placed.embeddings);
        }
        first += feed.ids.len();
    }
    if rows.is_empty() {
        return x;
    }
    let rows = Tensor::from_slice(&rows).to_device(model.device());
    x.index_copy_(0, &rows, &model.project_up(&Tensor::cat(&embeddings, 0)))
}

/// Indices, over all feeds, of the rows that something is wanted of.
fn wanted_rows(feeds: &[Feed<'_>], wants: Wants) -> Vec<i64> {
    let mut end = 0;
    let mut rows = Vec::new();
    for feed in feeds {
        end += feed.ids.len();
        if feed.wants == wants {
            rows.extend((end - feed.wanted()) as i64..end as i64);
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
