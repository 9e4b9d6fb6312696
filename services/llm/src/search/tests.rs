mod extremes;

use emu2_nn::golden;

use super::*;

const IDS: TextIds = TextIds { begin: 1, end: 2 };

fn parameters(strategy: Strategy) -> TextParameters {
    TextParameters { max_new_tokens: 8, min_length: 1, repetition_penalty: 1.0, strategy }
}

fn beam(num_beams: usize, length_penalty: f64) -> Strategy {
    Strategy::Beam { num_beams, length_penalty }
}

/// A stand-in for a model: logits that depend on every id so far.
fn logits(ids: &[u32], vocabulary: usize, salt: u64) -> Vec<f32> {
    let seed = ids.iter().fold(salt, |seed, &id| seed.wrapping_mul(0x0100_0000_01b3) ^ u64::from(id));
    let mut generator = ChaCha12Rng::seed_from_u64(seed);
    let mut logits: Vec<f32> = (0..vocabulary).map(|_| generator.random_range(-4.0..4.0)).collect();
    // Likely enough that beams end, some of them in the same step.
    logits[IDS.end as usize] += (salt / 12 % 4) as f32;
    logits
}

/// Runs a search against the stand-in; the ids it answers with and its last step.
fn run(parameters: &TextParameters, vocabulary: usize, salt: u64) -> (Vec<u32>, Next) {
    let mut search = Search::new(parameters, IDS);
    let mut rows: Vec<Vec<u32>> = vec![Vec::new()];
    let mut answer = Vec::new();
    loop {
        let mut scores: Vec<f32> = rows.iter().flat_map(|ids| logits(ids, vocabulary, salt)).collect();
        let step = search.step(&mut scores);
        answer.extend(step.ids);
        match step.next {
            Next::Rows(next) => {
                rows = next.iter().map(|row| [&rows[row.parent][..], &[row.token]].concat()).collect();
            }
            end => return (answer, end),
        }
    }
}

#[test]
fn processors_and_warpers_equal_the_golden_cases() {
    let golden = golden::file("sampling.safetensors");
    let rows = |name: &str| Vec::<Vec<f32>>::try_from(golden.tensor(name)).unwrap();
    let previous = Vec::<Vec<i64>>::try_from(golden.tensor("prev_ids")).unwrap();
    let close = |name: &str, got: &[f32], want: &[f32]| {
        for (index, (got, want)) in got.iter().zip(want).enumerate() {
            let equal = got == want || (got - want).abs() <= 1e-6 * want.abs().max(1.0);
            assert!(equal, "{name}: {got} is not {want} at {index}");
        }
    };
    let mut checked = 0;
    // Two at least are kept when beams sample, which is not served.
    let skipped = |name: &str| ["logits", "prev_ids"].contains(&name) || name.contains("_keep2");
    for name in golden.names().into_iter().filter(|name| !skipped(name)) {
        for (row, want) in rows(name).iter().enumerate() {
            let mut scores = rows("logits")[row].clone();
            let ids: Vec<u32> = previous[row].iter().map(|&id| id as u32).collect();
            let off = Processors { repetition_penalty: 1.0, min_length: 0, end: 2 };
            match name {
                "repetition_1.3" => Processors { repetition_penalty: 1.3, ..off }.apply(&ids, &mut scores),
                "min_length_8_eos2" => Processors { min_length: 8, ..off }.apply(&ids, &mut scores),
                _ => warpers(name).apply(&mut scores),
            }
            if name.ends_with(".probs") {
                let total: f32 = scores.iter().map(|score| score.exp()).sum();
                scores.iter_mut().for_each(|score| *score = score.exp() / total);
            }
            close(name, &scores, want);
            checked += 1;
        }
    }
    assert_eq!(checked, 2 * (2 + 2 * 8));
}

/// From a golden name such as `t0.7_k50_p0.9_keep1.probs`.
fn warpers(name: &str) -> Warpers {
    let fields: Vec<&str> = name.trim_end_matches(".probs").split('_').collect();
    let [t, k, p, "keep1"] = fields[..] else { panic!("{name}") };
    Warpers { temperature: t[1..].parse().unwrap(), top_k: k[1..].parse().ok(), top_p: p[1..].parse().ok() }
}

#[test]
fn ties_at_the_kth_value_are_all_kept() {
    let warpers = Warpers { temperature: 1.0, top_k: Some(2), top_p: None };
    let mut scores = [1.0, 3.0, 2.0, 2.0, 0.0];
    warpers.apply(&mut scores);
    assert_eq!(scores, [f32::NEG_INFINITY, 3.0, 2.0, 2.0, f32::NEG_INFINITY]);
}

#[test]
fn top_p_keeps_the_token_that_crosses() {
    // 0.5, 0.3, 0.2: 0.5 alone does not reach 0.6, so the second crosses.
    let warpers = Warpers { temperature: 1.0, top_k: None, top_p: Some(0.6) };
    let mut scores = [0.3_f32.ln(), 0.2_f32.ln(), 0.5_f32.ln()];
    warpers.apply(&mut scores);
    assert_eq!(scores.map(|score| score > f32::NEG_INFINITY), [true, false, true]);
}

#[test]
fn greedy_takes_the_best_and_stops_at_the_end_or_the_limit() {
    let mut search = Search::new(&parameters(Strategy::Greedy), IDS);
    let step = search.step(&mut [0.0, 0.0, 1.0, 5.0]);
    assert_eq!(step, Step { ids: vec![3], next: Next::Rows(vec![Row { parent: 0, token: 3 }]) });
    let step = search.step(&mut [0.0, 0.0, 1.0, 0.5]);
    assert_eq!(step, Step { ids: vec![2], next: Next::End { complete: true, score: None } });

    let limited = TextParameters { max_new_tokens: 1, ..parameters(Strategy::Greedy) };
    let step = Search::new(&limited, IDS).step(&mut [0.0, 0.0, 1.0, 5.0]);
    assert_eq!(step, Step { ids: vec![3], next: Next::End { complete: false, score: None } });
}

#[test]
fn the_unseen_first_id_counts_for_length_and_repetition() {
    // One id counts before anything is generated: min_length 1 does not bind, 2 does.
    let end_first = |min_length| {
        let parameters = TextParameters { min_length, ..parameters(Strategy::Greedy) };
        Search::new(&parameters, IDS).step(&mut [0.0, 0.0, 9.0, 1.0]).ids
    };
    assert_eq!((end_first(1), end_first(2)), (vec![2], vec![3]));
    let parameters = TextParameters { repetition_penalty: 2.0, ..parameters(Strategy::Greedy) };
    assert_eq!(Search::new(&parameters, IDS).step(&mut [0.0, 3.0, 0.0, 2.0]).ids, [3]);
}

#[test]
fn sampling_is_counted_by_position() {
    // Fixed for all time: a resumed request must meet the same numbers on another replica.
    let numbers: Vec<f64> = (0..3).map(|position| uniform(7, position)).collect();
    let mut generator = ChaCha12Rng::seed_from_u64(7);
    let drawn: Vec<f64> = (0..3).map(|_| generator.random()).collect();
    assert_eq!(numbers, drawn);
    assert_ne!(uniform(7, 0), uniform(8, 0));

    let warpers = Warpers { temperature: 0.8, top_k: Some(20), top_p: Some(0.95) };
    let sample = |seed| run(&parameters(Strategy::Sample { warpers, seed }), 50, 3).0;
    assert_eq!(sample(11), sample(11));
    assert!((0..20).any(|seed| sample(seed) != sample(11)));
}

#[test]
fn draws_follow_the_distribution() {
    let scores = [0.1_f32.ln(), f32::NEG_INFINITY, 0.6_f32.ln(), 0.3_f32.ln()];
    let mut counts = [0.0_f64; 4];
    for position in 0..4000 {
        counts[draw(&scores, uniform(5, position)) as usize] += 1.0 / 4000.0;
    }
    for (count, expected) in counts.iter().zip([0.1, 0.0, 0.6, 0.3]) {
        assert!((count - expected).abs() < 0.03, "{counts:?}");
    }
    assert_eq!((draw(&scores, 0.0), draw(&scores, 1.0 - f64::EPSILON)), (0, 3));
}

#[test]
fn a_beam_search_ends_when_nothing_better_can_follow() {
    // After [3] the end is far likelier than anything: with penalty 0 the sum decides.
    let mut search = Search::new(&parameters(beam(2, 0.0)), IDS);
    let Next::Rows(rows) = search.step(&mut [0.0, 0.0, 0.5, 6.0, 5.0, -1.0]).next else {
        panic!("too early")
    };
    assert_eq!(rows, [Row { parent: 0, token: 3 }, Row { parent: 0, token: 4 }]);
    let certain = [-9.0, -9.0, 9.0, -9.0, -9.0, -9.0];
    // Both beams end. The estimate still counts the end itself as something that could go on.
    let step = search.step(&mut [certain, certain].concat());
    assert!(matches!(step.next, Next::Rows(_)), "{step:?}");
    let step = search.step(&mut [certain, certain].concat());
    let Next::End { complete: true, score: Some(score) } = step.next else { panic!("{step:?}") };
    assert_eq!(step.ids, [3, 2]);
    assert!((-0.4..0.0).contains(&score), "{score}");
}

#[test]
fn an_end_ranked_below_the_beams_is_forgotten() {
    let mut search = Search::new(&parameters(beam(2, 0.0)), IDS);
    search.step(&mut [0.0, 0.0, -9.0, 6.0, 5.0, -1.0]);
    // The first beam ends or goes on, the second ends: third of the candidates, while a beam is still to be filled.
    let first = [-9.0, -9.0, 5.0, 4.8, -9.0, -9.0];
    let second = [-9.0, -9.0, 9.0, -9.0, -9.0, -9.0];
    let step = search.step(&mut [first, second].concat());
    assert!(matches!(step.next, Next::Rows(_)), "{step:?}");
    // Had both ends been kept, nothing could beat them now.
    let unlikely_end = [0.0, 0.0, -9.0, 0.0, 0.0, 0.0];
    let step = search.step(&mut [unlikely_end, unlikely_end].concat());
    assert!(matches!(step.next, Next::Rows(_)), "{step:?}");
}

#[test]
fn beam_search_equals_a_literal_one() {
    let mut ended = [0, 0];
    for salt in 0..300_u64 {
        let num_beams = 1 + (salt % 5) as usize;
        let strategy = beam(num_beams, [-1.0, 0.0, 1.0, 2.0][(salt % 4) as usize]);
        let parameters = TextParameters {
            max_new_tokens: 1 + (salt % 9) as usize,
            min_length: (salt % 7) as usize,
            repetition_penalty: [1.0, 1.3, 0.8][(salt % 3) as usize],
            strategy,
        };
        let (ids, Next::End { complete, score }) = run(&parameters, 12, salt) else { unreachable!() };
        let (literal_ids, literal_score) = literal::beam_search(&parameters, 12, salt);
        assert_eq!(ids, literal_ids, "salt {salt}");
        let score = score.unwrap();
        assert!(
            (score - literal_score).abs() < 1e-5 * literal_score.abs().max(1.0),
            "{score} {literal_score}"
        );
        ended[usize::from(complete)] += 1;
    }
    assert!(ended.iter().all(|&count| count > 20), "both ways of ending are met: {ended:?}");
}

/// The published algorithm, written out with all beams from the start, -1e9 and full sorts.
mod literal {
    use super::*;

    pub(super) fn beam_search(parameters: &TextParameters, vocabulary: usize, salt: u64) -> (Vec<u32>, f64) {
        let Strategy::Beam { num_beams, length_penalty } = parameters.strategy else { unreachable!() };
        let max_length = parameters.max_new_tokens + 1;
        let mut ids: Vec<Vec<u32>> = vec![vec![IDS.begin]; num_beams];
        let mut sums = vec![-1e9_f32; num_beams];
        sums[0] = 0.0;
        let mut hypotheses: Vec<(f64, Vec<u32>)> = Vec::new();
        let add = |hypotheses: &mut Vec<(f64, Vec<u32>)>, sum: f32, ids: &[u32]| {
            let score = f64::from(sum) / (ids.len() as f64).powf(length_penalty);
            let worst = hypotheses.iter().map(|(score, _)| *score).fold(1e9, f64::min);
            if hypotheses.len() < num_beams || score > worst {
                hypotheses.push((score, ids.to_vec()));
                if hypotheses.len() > num_beams {
                    let oldest_worst = hypotheses.iter().position(|(score, _)| *score == worst).unwrap();
                    hypotheses.remove(oldest_worst);
                }
            }
        };
        let mut done = false;
        while !done && ids[0].len() < max_length {
            let mut all: Vec<(f32, usize, u32)> = Vec::new();
            for beam in 0..num_beams {
                let scores = processed(parameters, &ids[beam], vocabulary, salt);
                all.extend(scores.iter().enumerate().map(|(token, s)| (s + sums[beam], beam, token as u32)));
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut next: Vec<(f32, Vec<u32>)> = Vec::new();
            for (rank, &(sum, beam, token)) in all[..2 * num_beams].iter().enumerate() {
                if token == IDS.end {
                    if rank < num_beams {
                        add(&mut hypotheses, sum, &ids[beam]);
                    }
                } else {
                    next.push((sum, [&ids[beam][..], &[token]].concat()));
                }
                if next.len() == num_beams {
                    break;
                }
            }
            (sums, ids) = next.into_iter().unzip();
            let worst = hypotheses.iter().map(|(score, _)| *score).fold(1e9, f64::min);
            let attainable = f64::from(all[0].0) / (ids[0].len() as f64).powf(length_penalty);
            done = hypotheses.len() == num_beams && worst >= attainable;
        }
        if !done {
            for beam in 0..num_beams {
                add(&mut hypotheses, sums[beam], &ids[beam]);
            }
        }
        hypotheses.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (score, mut best) = hypotheses.pop().unwrap();
        if best.len() < max_length {
            best.push(IDS.end);
        }
        (best[1..].to_vec(), score)
    }

    fn processed(parameters: &TextParameters, ids: &[u32], vocabulary: usize, salt: u64) -> Vec<f32> {
        let logits = logits(&ids[1..], vocabulary, salt);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut scores: Vec<f32> = logits.iter().map(|&logit| logit - sum.ln() as f32).collect();
        for (id, score) in scores.iter_mut().enumerate() {
            if ids.contains(&(id as u32)) {
                *score *= if *score < 0.0 {
                    parameters.repetition_penalty
                } else {
                    1.0 / parameters.repetition_penalty
                };
            }
        }
        if ids.len() < parameters.min_length {
            scores[IDS.end as usize] = f32::NEG_INFINITY;
        }
        scores
    }
}
