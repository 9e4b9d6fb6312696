//! A request's stages as spans, opened and closed on the engine's thread.

use std::sync::{Arc, Mutex};

use tracing::{Subscriber, info_span, span};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt, registry::LookupSpan};

use super::*;

/// That a span began or ended.
struct Note {
    name: String,
    parent: Option<String>,
    end: bool,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Note>>>);

impl Recorder {
    fn note<S>(&self, id: &span::Id, context: &Context<'_, S>, end: bool)
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let span = context.span(id).expect("the registry knows its spans");
        let parent = span.parent().map(|parent| parent.name().to_owned());
        self.0.lock().unwrap().push(Note { name: span.name().to_owned(), parent, end });
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, _: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        self.note(id, &context, false);
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        self.note(&id, &context, true);
    }
}

#[tokio::test]
async fn stages_are_children_of_the_callers_span_one_after_the_other() {
    let recorder = Recorder::default();
    // Of the whole process: the engine's thread has no subscriber of its own. Nothing else here sets one.
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(recorder.clone())).unwrap();
    let running = Running::start(config("emu2-base")).await;
    let span = info_span!("caller of the spans test");
    let submitted = span.in_scope(|| running.submit(written(&[1, 5, 9]), endless(5)));
    drop(span);
    collect(submitted).await.unwrap();
    running.runs(0).await;
    let notes = recorder.0.lock().unwrap();
    let of_caller = notes.iter().filter(|note| note.parent.as_deref() == Some("caller of the spans test"));
    let stages: Vec<(&str, bool)> = of_caller.map(|note| (note.name.as_str(), note.end)).collect();
    let mut expected = Vec::new();
    for pair in ["queue", "prefill", "decode_steps"].windows(2) {
        // The next one begins, then the one before it is let go.
        expected.extend([(pair[1], false), (pair[0], true)]);
    }
    expected.insert(0, ("queue", false));
    expected.push(("decode_steps", true));
    assert_eq!(stages, expected);
}
