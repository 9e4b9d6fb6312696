//! What one step of a search answers: ids that are certain, and the rows to compute next.

/// A row to compute next: `token` continues row `parent` of the step before (of the prompt, at first).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// The index of the row that is continued.
    pub(crate) parent: usize,
    /// The id that continues it.
    pub(crate) token: u32,
}

/// What a step of a search came to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    /// Ids that are certain now, an end of text included: one each step, or a beam search's whole answer at its end.
    pub(crate) ids: Vec<u32>,
    /// How the search goes on.
    pub(crate) next: Next,
}

/// How a search goes on after a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Next {
    /// The rows to compute next.
    Rows(Vec<Row>),
    /// The text is over.
    End {
        /// Whether the text ended by itself rather than at `max_new_tokens`.
        complete: bool,
        /// The score of the chosen hypothesis, where the search was one over beams.
        score: Option<f64>,
    },
}
