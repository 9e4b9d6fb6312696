//! A log line as one JSON object: the event's fields, and of the spans around it what joins lines to a request.

use serde_json::{Map, Value};
use tracing::{Event, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{JsonFields, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// Fields of enclosing spans that every line repeats, so that a log store can be searched by them.
const SPAN_FIELDS: [&str; 3] = ["request_id", "trace_id", "service"];

/// The format of a log line as one JSON object; spans must be formatted by `JsonFields`.
pub(crate) struct JsonLines;

impl<S> FormatEvent<S, JsonFields> for JsonLines
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut fields = String::new();
        JsonFields::new().format_fields(Writer::new(&mut fields), event)?;
        let mut line = object(&fields);
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        line.insert("time".into(), time.into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        let mut spans = context.event_scope().into_iter().flatten().peekable();
        if let Some(innermost) = spans.peek() {
            line.insert("span".into(), innermost.name().into());
        }
        for span in spans {
            let extensions = span.extensions();
            let Some(fields) = extensions.get::<FormattedFields<JsonFields>>() else { continue };
            let mut fields = object(fields.as_str());
            for name in SPAN_FIELDS {
                if let Some(value) = fields.remove(name) {
                    line.entry(name).or_insert(value);
                }
            }
        }
        writeln!(writer, "{}", Value::Object(line))
    }
}

fn object(json: &str) -> Map<String, Value> {
    serde_json::from_str(json).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_carries_its_fields_and_the_request_it_belongs_to() {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let request = tracing::info_span!(
                "request",
                request_id = "r-1",
                trace_id = tracing::field::Empty,
                other = 3
            );
            request.record("trace_id", "abc");
            let _request = request.entered();
            let _stage = tracing::info_span!("prefill").entered();
            tracing::info!(tokens = 12, "prompt \"accepted\"");
        });
        let line: Value = serde_json::from_slice(&lines.0.lock().unwrap()).unwrap();
        assert_eq!(line["message"], "prompt \"accepted\"");
        assert_eq!(line["tokens"], 12);
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["span"], "prefill");
        assert_eq!(line["request_id"], "r-1");
        assert_eq!(line["trace_id"], "abc");
        assert!(line.get("other").is_none());
    }
}
