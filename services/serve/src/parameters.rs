//! The parameters of a request, their defaults filled in and checked: the same rules at the router and at the stages.
//!
//! A parameter stands in one message of the contracts, and the stage that acts on it states one [`ParameterLimit`] for
//! it; nothing here knows it by name, except where one parameter bounds another.

use std::{fmt::Display, sync::LazyLock};

use emu2_proto::{
    DESCRIPTORS,
    v1::{self, ImageOutput, ParameterLimit, TextOutput},
};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage, Value};

use crate::status::Violation;

static CONTRACTS: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).expect("our own descriptors can be read"));

/// The parameters of a text as they take effect by an llm's `limits`, and a violation for each that is wrong.
pub fn text(asked: &TextOutput, limits: &[ParameterLimit]) -> (TextOutput, Vec<Violation>) {
    let (mut text, mut violations) = apply(asked, "emu2.v1.TextOutput", "text", limits);
    if asked.do_sample {
        let beams = *text.num_beams.insert(asked.num_beams.unwrap_or(1));
        if beams > 1 {
            violations
                .push(Violation::new("text.num_beams", format!("must be 1 with do_sample, got {beams}")));
        }
    }
    // The invisible leading id counts, so that the longest output has one more.
    let (shortest, longest) = (text.min_length(), text.max_new_tokens().saturating_add(1));
    if shortest > longest && violations.iter().all(|it| it.field != "text.min_length") {
        violations.push(Violation::out_of_range("text.min_length", 0, longest, shortest));
    }
    text.keep_special_tokens.get_or_insert(asked.grounding);
    (text, violations)
}

/// The parameters of an image as they take effect by a decoder's `limits`, and a violation for each that is wrong.
pub fn image(asked: &ImageOutput, limits: &[ParameterLimit]) -> (ImageOutput, Vec<Violation>) {
    apply(asked, "emu2.v1.ImageOutput", "image", limits)
}

/// What is wrong with a region's edges; `field` is where the request holds it.
pub fn region(field: &str, region: &v1::Box) -> Vec<Violation> {
    let v1::Box { left, top, right, bottom, .. } = *region;
    let axes = [("left", left, "right", right), ("top", top, "bottom", bottom)];
    // Written so that NaN is refused.
    let wrong = axes.into_iter().filter(|(_, low, _, high)| !(0.0 <= *low && low < high && *high <= 1.0));
    wrong
        .map(|(low_name, low, high_name, high)| {
            let rule = format!("must be 0 <= {low_name} < {high_name} <= 1, got {low} and {high}");
            Violation::new(format!("{field}.{low_name}"), rule)
        })
        .collect()
}

/// The limit of `field`, such as `text.top_k`, if it is stated.
pub fn limit<'a>(limits: &'a [ParameterLimit], field: &str) -> Option<&'a ParameterLimit> {
    limits.iter().find(|limit| limit.field == field)
}

/// Whether a field of an error is one of a client's `GenerateRequest`, as `text.top_k` and `prompt.parts[2]` are: then
/// the client can mend what is wrong with it.
pub fn is_of_request(field: &str) -> bool {
    let first = field.split(['.', '[']).next().unwrap_or(field);
    let request =
        CONTRACTS.get_message_by_name("emu2.v1.GenerateRequest").expect("a message of the contracts");
    request.get_field_by_name(first).is_some() || request.oneofs().any(|oneof| oneof.name() == first)
}

/// Fills in the defaults of a message and checks what it says, by the limits of fields under `prefix`. A NaN is out of
/// any.
fn apply<M: Message + Default>(
    message: &M,
    name: &str,
    prefix: &str,
    limits: &[ParameterLimit],
) -> (M, Vec<Violation>) {
    let descriptor = CONTRACTS.get_message_by_name(name).expect("a message of the contracts");
    let bytes = message.encode_to_vec();
    let mut dynamic = DynamicMessage::decode(descriptor, &*bytes).expect("what was just encoded");
    let mut violations = Vec::new();
    for limit in limits {
        let Some(name) = limit.field.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) else {
            continue;
        };
        // A stage of a later release may have a parameter that this one does not know: no request has it.
        let Some(field) = dynamic.descriptor().get_field_by_name(name) else { continue };
        if dynamic.has_field(&field) {
            violations.extend(problem(limit, &dynamic.get_field(&field)));
        } else if let Some(default) = limit.default {
            let value = match dynamic.get_field(&field).as_ref() {
                Value::U32(_) => Value::U32(default as u32),
                Value::F32(_) => Value::F32(default as f32),
                _ => continue,
            };
            dynamic.set_field(&field, value);
        }
    }
    (dynamic.transcode_to().expect("the message that it was made from"), violations)
}

fn problem(limit: &ParameterLimit, value: &Value) -> Option<Violation> {
    // Numbers are told in the type of the field, so that a float's limit is not printed with a double's digits.
    match value {
        Value::U32(value) => {
            let multiple = limit.multiple_of.max(1);
            let range = outside(limit, *value, limit.min as u32, limit.max as u32);
            let odd = || {
                let rule = format!("must be a multiple of {multiple}, got {value}");
                (!value.is_multiple_of(multiple)).then(|| Violation::new(limit.field.as_str(), rule))
            };
            range.or_else(odd)
        }
        Value::F32(value) => outside(limit, *value, limit.min as f32, limit.max as f32),
        _ => None,
    }
}

fn outside<T: Copy + Display + PartialOrd>(
    limit: &ParameterLimit,
    value: T,
    min: T,
    max: T,
) -> Option<Violation> {
    let field = limit.field.as_str();
    if limit.above_min {
        let inside = value > min && value <= max;
        let rule = format!("must be above {min} to {max}, got {value}");
        return (!inside).then(|| Violation::new(field, rule));
    }
    (!(min..=max).contains(&value)).then(|| Violation::out_of_range(field, min, max, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Vec<ParameterLimit> {
        vec![
            ParameterLimit::new("text.max_new_tokens", 1.0..=100.0, Some(64.0)),
            ParameterLimit::new("text.min_length", 0.0..=101.0, Some(1.0)),
            ParameterLimit::new("text.num_beams", 1.0..=5.0, Some(5.0)),
            ParameterLimit::new("text.temperature", 0.001_f32..=100.0, Some(1.0)),
            ParameterLimit::new("text.top_p", 0.0..=1.0, None).above_min(),
            ParameterLimit::new("image.height", 8.0..=1024.0, Some(512.0)).multiple_of(8),
            ParameterLimit::new("text.parameter_of_a_later_release", 0.0..=1.0, Some(1.0)),
        ]
    }

    fn problems(asked: &TextOutput) -> Vec<String> {
        text(asked, &limits()).1.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_left_out_gets_its_default_and_what_is_said_stays() {
        let asked = TextOutput { max_new_tokens: Some(7), grounding: true, ..Default::default() };
        let filled = TextOutput {
            min_length: Some(1),
            num_beams: Some(5),
            temperature: Some(1.0),
            keep_special_tokens: Some(true),
            ..asked
        };
        assert_eq!(text(&asked, &limits()), (filled, vec![]));
        assert_eq!(text(&filled, &limits()), (filled, vec![]), "a stage finds nothing to fill in");
    }

    #[test]
    fn drawn_tokens_need_one_beam() {
        let sampled = TextOutput { do_sample: true, ..Default::default() };
        assert_eq!(text(&sampled, &limits()).0.num_beams, Some(1));
        let beams = TextOutput { num_beams: Some(2), ..sampled };
        assert_eq!(problems(&beams), ["text.num_beams must be 1 with do_sample, got 2"]);
    }

    #[test]
    fn every_value_out_of_its_limits_is_named_with_both() {
        let asked = TextOutput {
            max_new_tokens: Some(0),
            min_length: Some(2),
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            ..Default::default()
        };
        assert_eq!(
            problems(&asked),
            [
                "text.max_new_tokens must be 1 to 100, got 0",
                "text.temperature must be 0.001 to 100, got NaN",
                "text.top_p must be above 0 to 1, got 0",
                "text.min_length must be 0 to 1, got 2",
            ]
        );
        assert_eq!(problems(&TextOutput { top_p: Some(1.0), ..Default::default() }), [""; 0]);
        let long = TextOutput { min_length: Some(102), ..Default::default() };
        assert_eq!(problems(&long), ["text.min_length must be 0 to 101, got 102"], "once");
    }

    #[test]
    fn a_region_has_its_edges_in_order_and_within_the_image() {
        let of = |left, top, right, bottom| {
            let box_ = v1::Box { left, top, right, bottom, phrase: String::new() };
            region("box", &box_).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(0.0, 0.25, 1.0, 0.5), [""; 0]);
        assert_eq!(of(0.5, 0.0, 0.5, 1.0), ["box.left must be 0 <= left < right <= 1, got 0.5 and 0.5"]);
        let both = of(f32::NAN, 0.0, 1.0, 1.5);
        assert_eq!(both.len(), 2, "{both:?}");
    }

    #[test]
    fn fields_of_requests_are_told_from_fields_of_stages() {
        for field in ["text.num_beams", "image.height", "prompt.parts[3].box", "chat.turns", "input"] {
            assert!(is_of_request(field), "{field}");
        }
        for field in ["start.queries", "positive.embeddings", "resume", "texts", ""] {
            assert!(!is_of_request(field), "{field}");
        }
    }

    #[test]
    fn a_side_of_an_image_is_a_multiple() {
        let asked = ImageOutput { height: Some(12), ..Default::default() };
        let (filled, violations) = image(&asked, &limits());
        assert_eq!(violations[0].to_string(), "image.height must be a multiple of 8, got 12");
        assert_eq!((filled.height, filled.width, violations.len()), (Some(12), None, 1));
        assert_eq!(image(&ImageOutput::default(), &limits()).0.height, Some(512));
    }
}
