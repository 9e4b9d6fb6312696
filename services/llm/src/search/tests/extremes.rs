//! Parameters and logits as far out as their types go: whatever comes, a token that is possible is chosen.

use proptest::{
    prelude::{Just, any, prop_assert, prop_assert_eq, prop_oneof, proptest},
    strategy::Strategy as Values,
};

use super::*;

/// Any finite number, with the ends of the range and what is smallest among them.
fn finite() -> impl Values<Value = f32> {
    let ends = [0.0, 1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, 1e-45, -1e-45];
    prop_oneof![
        proptest::sample::select(ends.to_vec()),
        -20.0_f32..20.0,
        any::<f32>().prop_filter("finite", |value| value.is_finite()),
    ]
}

fn positive() -> impl Values<Value = f32> {
    finite().prop_map(|value| value.abs().max(1e-45))
}

fn warpers() -> impl Values<Value = Warpers> {
    let top_k = proptest::option::of(prop_oneof![1_usize..50, Just(u32::MAX as usize)]);
    let top_p =
        proptest::option::of(prop_oneof![0.0_f32..1.0, Just(1.0), positive().prop_map(|p| p.min(1.0))]);
    (positive(), top_k, top_p).prop_map(|(temperature, top_k, top_p)| Warpers { temperature, top_k, top_p })
}

fn processors() -> impl Values<Value = Processors> {
    let end = IDS.end;
    (positive(), 0_usize..6).prop_map(move |(repetition_penalty, min_length)| Processors {
        repetition_penalty,
        min_length,
        end,
    })
}

proptest! {
    #[test]
    fn what_is_drawn_is_possible(
        logits in proptest::collection::vec(finite(), 4..60),
        seen in proptest::collection::vec(0_u32..4, 1..6),
        processors in processors(),
        warpers in warpers(),
        uniform in prop_oneof![0.0_f64..1.0, Just(0.0), Just(1.0 - f64::EPSILON)],
    ) {
        let mut scores = logits.clone();
        processors.apply(&seen, &mut scores);
        let possible = scores.clone();
        warpers.apply(&mut scores);
        prop_assert!(scores.iter().all(|score| *score < f32::INFINITY), "{scores:?}");
        let token = draw(&scores, uniform) as usize;
        prop_assert!(scores[token] > f32::NEG_INFINITY && possible[token] > f32::NEG_INFINITY, "{scores:?}");
        // What a temperature makes too close for float32 to tell apart is equally good.
        let mut tempered = possible.clone();
        Warpers { top_k: None, top_p: None, ..warpers }.apply(&mut tempered);
        let best = tempered.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let kept = |index: usize| scores[index] > f32::NEG_INFINITY;
        prop_assert!((0..scores.len()).any(|index| tempered[index] == best && kept(index)), "the best is kept");
        prop_assert!(processors.min_length <= seen.len() || token != IDS.end as usize);
    }

    #[test]
    fn a_cold_draw_is_the_best(logits in proptest::collection::vec(-50.0_f32..50.0, 2..60), uniform in 0.0_f64..1.0) {
        let best = argmax(&logits) as usize;
        let mut scores = logits.clone();
        Warpers { temperature: 1e-40, top_k: None, top_p: None }.apply(&mut scores);
        prop_assert_eq!(logits[draw(&scores, uniform) as usize], logits[best]);
    }

    #[test]
    fn any_search_ends_within_its_limits(
        penalty in 0.1_f32..10.0,
        length_penalty in -10.0_f64..10.0,
        num_beams in 1_usize..9,
        min_length in 0_usize..12,
        size in positive().prop_map(|size| size.min(1e30)),
        salt in any::<u64>(),
    ) {
        let parameters = TextParameters {
            max_new_tokens: 10,
            min_length,
            repetition_penalty: penalty,
            strategy: if num_beams > 1 { beam(num_beams, length_penalty) } else { Strategy::Greedy },
        };
        let mut search = Search::new(&parameters, IDS);
        let mut rows: Vec<Vec<u32>> = vec![Vec::new()];
        let mut answer = Vec::new();
        for _ in 0..parameters.max_new_tokens {
            let mut scores: Vec<f32> =
                rows.iter().flat_map(|ids| logits(ids, 20, salt)).map(|logit| logit * size).collect();
            let step = search.step(&mut scores);
            answer.extend(step.ids);
            let Next::Rows(next) = step.next else { break };
            rows = next.iter().map(|row| [&rows[row.parent][..], &[row.token]].concat()).collect();
        }
        prop_assert!(!answer.is_empty() && answer.len() <= 10 && answer.iter().all(|&id| id < 20), "{answer:?}");
        let end = answer.iter().position(|&id| id == IDS.end);
        // The unseen first id counts.
        prop_assert!(end.is_none_or(|end| end + 1 >= min_length && end + 1 == answer.len()), "{answer:?}");
    }
}
