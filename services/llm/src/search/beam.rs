//! Beam search as transformers 4.31.0's `beam_search` and `BeamSearchScorer`, for one prompt, early_stopping false.

use super::{Next, Processors, Row, Step};

/// The beams of one prompt and what they have finished.
#[derive(Debug)]
pub(crate) struct BeamSearch {
    num_beams: usize,
    /// The ids of the longest answer, the unseen beginning of text included.
    max_length: usize,
    processors: Processors,
    /// The running beams: one after the prompt, then `num_beams`.
    beams: Vec<Beam>,
    finished: Hypotheses,
}

#[derive(Clone, Debug)]
struct Beam {
    ids: Vec<u32>,
    /// The sum of processed log-probabilities.
    score: f32,
}

/// A continuation of a beam by one token.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    beam: usize,
    token: u32,
}

impl BeamSearch {
    pub(super) fn new(
        num_beams: usize,
        length_penalty: f64,
        max_length: usize,
        processors: Processors,
        begin: u32,
    ) -> Self {
        // Upstream starts `num_beams` equal beams of which all but the first are set back by 1e9: one beam.
        let beams = vec![Beam { ids: vec![begin], score: 0.0 }];
        let finished = Hypotheses { kept: Vec::new(), capacity: num_beams, length_penalty };
        Self { num_beams, max_length, processors, beams, finished }
    }

    pub(super) fn step(&mut self, logits: &mut [f32]) -> Step {
        let candidates = self.candidates(logits);
        let mut rows = Vec::with_capacity(self.num_beams);
        let mut beams = Vec::with_capacity(self.num_beams);
        for (rank, candidate) in candidates.iter().enumerate() {
            let ids = &self.beams[candidate.beam].ids;
            if candidate.token == self.processors.end {
                // An end that is not among the best num_beams is forgotten, not kept for later.
                if rank < self.num_beams {
                    self.finished.add(ids, candidate.score, true);
                }
                continue;
            }
            let ids = [ids.as_slice(), &[candidate.token]].concat();
            beams.push(Beam { ids, score: candidate.score });
            rows.push(Row { parent: candidate.beam, token: candidate.token });
            if beams.len() == self.num_beams {
                break;
            }
        }
        self.beams = beams;
        let length = self.beams[0].ids.len();
        if self.finished.beat(candidates[0].score, length) {
            return self.end();
        }
        if length == self.max_length {
            for beam in &self.beams {
                self.finished.add(&beam.ids, beam.score, false);
            }
            return self.end();
        }
        Step { ids: Vec::new(), next: Next::Rows(rows) }
    }

    /// Returns the best 2 × num_beams continuations, best first. As each beam has one end, num_beams of them go on.
    fn candidates(&self, logits: &mut [f32]) -> Vec<Candidate> {
        let vocabulary = logits.len() / self.beams.len();
        let wanted = 2 * self.num_beams;
        let mut best: Vec<Candidate> = Vec::with_capacity(wanted + 1);
        for (index, scores) in logits.chunks_exact_mut(vocabulary).enumerate() {
            let beam = &self.beams[index];
            log_softmax(scores);
            self.processors.apply(&beam.ids, scores);
            for (token, log_probability) in scores.iter().enumerate() {
                let score = log_probability + beam.score;
                if best.len() == wanted && score <= best[wanted - 1].score {
                    continue;
                }
                let at = best.partition_point(|other| other.score >= score);
                best.insert(at, Candidate { score, beam: index, token: token as u32 });
                best.truncate(wanted);
            }
        }
        best
    }

    fn end(&mut self) -> Step {
        let best = self.finished.best();
        let mut ids = best.ids[1..].to_vec();
        if best.complete {
            ids.push(self.processors.end);
        }
        let next = Next::End { complete: best.complete, score: Some(best.score) };
        Step { ids, next }
    }
}

fn log_softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from((score - max).exp())).sum();
    let log_sum = sum.ln() as f32;
    scores.iter_mut().for_each(|score| *score = *score - max - log_sum);
}

/// The best finished answers, at most `capacity`.
#[derive(Debug)]
struct Hypotheses {
    kept: Vec<Hypothesis>,
    capacity: usize,
    length_penalty: f64,
}

#[derive(Debug)]
struct Hypothesis {
    /// The ids without the end of text.
    ids: Vec<u32>,
    /// The log-probability / length^length_penalty.
    score: f64,
    complete: bool,
}

impl Hypotheses {
    fn add(&mut self, ids: &[u32], sum: f32, complete: bool) {
        let score = self.penalised(sum, ids.len());
        let hypothesis = Hypothesis { ids: ids.to_vec(), score, complete };
        if self.kept.len() < self.capacity {
            self.kept.push(hypothesis);
        } else if score > self.worst().1 {
            let (worst, _) = self.worst();
            self.kept.remove(worst);
            self.kept.push(hypothesis);
        }
    }

    /// Whether nothing that continues at `best_sum` can enter, by upstream's estimate: its score at this length.
    fn beat(&self, best_sum: f32, length: usize) -> bool {
        self.kept.len() == self.capacity && self.worst().1 >= self.penalised(best_sum, length)
    }

    fn penalised(&self, sum: f32, length: usize) -> f64 {
        f64::from(sum) / (length as f64).powf(self.length_penalty)
    }

    /// Returns index and score of the worst kept answer; among equals the oldest.
    fn worst(&self) -> (usize, f64) {
        let scores = self.kept.iter().map(|hypothesis| hypothesis.score).enumerate();
        scores.min_by(|a, b| a.1.total_cmp(&b.1)).expect("num_beams is at least 1, so something is kept")
    }

    /// Returns the best kept answer; among equals the newest.
    fn best(&self) -> &Hypothesis {
        let best = self.kept.iter().max_by(|a, b| a.score.total_cmp(&b.score));
        best.expect("the running beams were added")
    }
}
