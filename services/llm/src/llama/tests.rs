use emu2_nn::golden::{self, Bench, Golden, Tolerance, assert_close, forward_tolerance};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use tch::IndexOp;

use super::*;

/// The manifest's, in float32.
const LOGITS_TOLERANCE: f64 = 1e-4;
/// Between two orders of the same float32 sums over this tiny model.
const ROUNDING: f64 = 2e-5;

fn model(name: &str, devices: usize) -> Llama {
    model_at(&golden::model_dir(name), devices)
}

fn model_at(path: &std::path::Path, devices: usize) -> Llama {
    let dir = ModelDir::open(path).unwrap();
    let config = dir.section("llama").unwrap();
    Llama::load(&dir, config, 64, &vec![Device::Cpu; devices], Kind::Float).unwrap().0
}

fn line(kv: &mut KvCache, rows: i64) -> Rows<'_> {
    Rows { kv, append: Append::Sequential(rows) }
}

/// The uncached forward of one sequence.
fn whole(model: &Llama, x: &Tensor) -> Tensor {
    let rows = x.size()[0];
    model.forward(x, &mut [line(&mut model.kv_cache(rows), rows)])
}

/// Random rows of embeddings, [tokens, width], of the size that the model's own have.
fn random(model: &Llama, random: &mut ChaCha12Rng, tokens: i64) -> Tensor {
    let ids: Vec<i64> = (0..tokens).map(|_| random.random_range(0..model.config().vocab_size)).collect();
    model.embed(&Tensor::from_slice(&ids))
}

#[test]
fn hidden_states_and_logits_equal_the_official_models() {
    states_and_logits_equal_the_official_models(Bench::of_environment());
}

#[test]
fn hidden_states_and_logits_equal_the_official_models_in_bfloat16() {
    states_and_logits_equal_the_official_models(Bench::BF16);
}

fn states_and_logits_equal_the_official_models(bench: Bench) {
    let dir = ModelDir::open(&golden::model_dir("emu2-base")).unwrap();
    let config = dir.section("llama").unwrap();
    let model = Llama::load(&dir, config, 64, &[bench.device], bench.kind).unwrap().0;
    let golden = golden::file("lm.safetensors");
    let close = |name: &str, got: &Tensor, want: &Tensor, float32| {
        bench.assert_close(name, got, want, Tolerance::new(float32, want));
    };
    for (name, row) in [("lm.single", 0), ("lm.batch", 0), ("lm.batch", 1)] {
        let (x, want) = unpadded(&golden, name, row, 3);
        let hidden = whole(&model, &bench.put(&x));
        close(name, &hidden, &want, forward_tolerance(&want));
        let want = golden.tensor(&format!("{name}.logits")).i(row).slice(0, -x.size()[0], None, 1);
        close(name, &model.logits(&hidden), &want, LOGITS_TOLERANCE);
    }
    // The two rows of the batch in one ragged forward, without their padding.
    let [first, second] = [0, 1].map(|row| unpadded(&golden, "lm.batch", row, 3));
    let (mut a, mut b) = (model.kv_cache(62), model.kv_cache(62));
    let x = bench.put(&Tensor::cat(&[&first.0, &second.0], 0));
    let hidden = model.forward(&x, &mut [line(&mut a, first.0.size()[0]), line(&mut b, second.0.size()[0])]);
    let want = Tensor::cat(&[&first.1, &second.1], 0);
    close("ragged", &hidden, &want, forward_tolerance(&want));
    let last = model.logits(&hidden.i(-1));
    let want = golden.tensor("lm.batch.logits_last_genpos").i(1);
    close("generate()'s positions", &last, &want, LOGITS_TOLERANCE);
}

#[test]
fn logits_over_the_full_vocabulary_equal_the_official_models() {
    let Some(checkpoint) = golden::shared("ckpt/emu2-chat-fullvocab.native.bf16.safetensors") else {
        println!("skipped: the full-vocabulary checkpoint is not beside the project");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(&checkpoint, folder.path().join("model.safetensors")).unwrap();
    let config = checkpoint.with_file_name("emu2-chat-fullvocab.config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    let model = model_at(folder.path(), 1);
    let golden = golden::read(&golden::shared("lm_fullvocab.safetensors").unwrap());
    for (name, row) in [("full.single", 0), ("full.batch", 0), ("full.batch", 1)] {
        let (x, want) = unpadded(&golden, name, row, 2);
        let hidden = whole(&model, &x);
        assert_close(name, &hidden, &want, forward_tolerance(&want));
        let last = golden.tensor(&format!("{name}.logits_last")).i(row);
        assert_close(name, &model.logits(&hidden.i(-1)), &last, LOGITS_TOLERANCE);
    }
}

/// Embeddings and final states of one row of a golden batch, without its left padding.
fn unpadded(golden: &Golden, name: &str, row: i64, layers: usize) -> (Tensor, Tensor) {
    let real = golden.tensor(&format!("{name}.attention_mask")).i(row).sum(Kind::Int64).int64_value(&[]);
    let rows = |tensor: &str| golden.tensor(&format!("{name}.{tensor}")).i(row).slice(0, -real, None, 1);
    (rows("inputs_embeds"), rows(&format!("hidden{layers}")))
}

#[test]
fn prompts_embed_as_the_official_models() {
    let model = model("emu2-base", 1);
    let (golden, vision) = (golden::file("lm.safetensors"), golden::file("vision.safetensors"));
    let images = model.project_up(&vision.tensor("encode_image.nq4"));
    assert_close("project_up", &images, &vision.tensor("project_up"), forward_tolerance(&images));
    let ids = golden.tensor("lm.single.input_ids").i(0);
    let image_id = Vec::<i64>::try_from(&ids).unwrap().into_iter().max().unwrap();
    let x = model.embed(&ids).index_put(&[Some(ids.eq(image_id))], &images.view([-1, 96]), false);
    assert_close("inputs_embeds", &x, &golden.tensor("lm.single.inputs_embeds").i(0), 1e-6);
}

#[test]
fn any_chunks_of_a_prompt_give_the_uncached_states() {
    let model = model("emu2-base", 1);
    let mut numbers = ChaCha12Rng::seed_from_u64(1);
    let x = random(&model, &mut numbers, 40);
    let want = whole(&model, &x);
    for chunks in [vec![1; 40], vec![7, 1, 30, 2], vec![39, 1], vec![1, 39], vec![16, 16, 8]] {
        let mut kv = model.kv_cache(40);
        let mut start = 0;
        let states: Vec<Tensor> = chunks
            .iter()
            .map(|&rows| {
                let chunk = x.narrow(0, start, rows);
                start += rows;
                model.forward(&chunk, &mut [line(&mut kv, rows)])
            })
            .collect();
        assert_close(&format!("{chunks:?}"), &Tensor::cat(&states, 0), &want, ROUNDING);
    }
}

#[test]
fn sequences_in_one_forward_do_not_see_each_other() {
    let model = model("emu2-chat", 1);
    let mut numbers = ChaCha12Rng::seed_from_u64(2);
    let lengths = [5, 1, 23, 12];
    let prompts = lengths.map(|tokens| random(&model, &mut numbers, tokens));
    let alone: Vec<Tensor> = prompts.iter().map(|x| whole(&model, x)).collect();
    let mut caches = lengths.map(|tokens| model.kv_cache(tokens));
    let mut rows: Vec<Rows> = caches.iter_mut().zip(lengths).map(|(kv, rows)| line(kv, rows)).collect();
    let together = model.forward(&Tensor::cat(&prompts, 0), &mut rows);
    assert_close("together", &together, &Tensor::cat(&alone, 0), ROUNDING);
}

#[test]
fn beams_that_share_a_cache_equal_copies_of_their_own() {
    let model = model("emu2-base", 1);
    let mut numbers = ChaCha12Rng::seed_from_u64(3);
    for beams in 1..=5 {
        let prompt = random(&model, &mut numbers, 9);
        // A second sequence decodes beside it, so that spans are mixed.
        let other = random(&model, &mut numbers, 11);
        let (mut kv, mut line_kv) = (model.kv_cache(9 + 8 * beams), model.kv_cache(11));
        let _ = model.forward(&prompt, &mut [line(&mut kv, 9)]);
        let _ = model.forward(&other.narrow(0, 0, 3), &mut [line(&mut line_kv, 3)]);
        let mut paths: Vec<Tensor> = vec![prompt];
        for step in 0..8 {
            let parents: Vec<i64> = (0..beams).map(|_| numbers.random_range(0..paths.len() as i64)).collect();
            let new = random(&model, &mut numbers, beams);
            paths = (0..beams)
                .map(|beam| {
                    Tensor::cat(&[&paths[parents[beam as usize] as usize], &new.narrow(0, beam, 1)], 0)
                })
                .collect();
            let x = Tensor::cat(&[new, other.narrow(0, 3 + step, 1)], 0);
            let branch = Rows { kv: &mut kv, append: Append::Beams(&parents) };
            let states = model.forward(&x, &mut [branch, line(&mut line_kv, 1)]);
            for (beam, path) in paths.iter().enumerate() {
                let copy = whole(&model, path).i(-1);
                assert_close("beam", &states.i(beam as i64), &copy, ROUNDING);
            }
            let copy = whole(&model, &other.narrow(0, 0, 4 + step)).i(-1);
            assert_close("line", &states.i(-1), &copy, ROUNDING);
        }
    }
}

#[test]
fn layers_on_several_devices_give_the_same_states() {
    let (one, two) = (model("emu2-base", 1), model("emu2-base", 2));
    assert!(two.layers.iter().any(|layer| layer.place == 1));
    let x = random(&one, &mut ChaCha12Rng::seed_from_u64(4), 10);
    assert_close("two devices", &whole(&two, &x), &whole(&one, &x), 0.0);
}

#[test]
fn layers_spread_as_upstream_does() {
    let config = LlamaConfig::default();
    assert_eq!(config.layer_parameters(), 535_049_216);
    let outside = 2 * 6656 * 32272 + 6656 + 2 * 6656 * 1792;
    let counts = |devices: usize| {
        let spread = spread_layers(&config, outside, devices);
        assert!(spread.is_sorted());
        (0..devices).map(|place| spread.iter().filter(|&&it| it == place).count()).collect::<Vec<_>>()
    };
    assert_eq!(counts(1), [60]);
    assert_eq!(counts(2), [29, 31]);
    assert_eq!(counts(4), [14, 15, 15, 16]);
    assert_eq!(outside + 60 * config.layer_parameters(), 36_906_513_152 - 4_350_093_568);
    let held = config.spread_parameters(1792, 2);
    assert_eq!(held, [(outside + 29 * 535_049_216) as u64, 31 * 535_049_216]);
}

#[test]
fn a_configuration_that_contradicts_itself_is_refused() {
    let dir = ModelDir::open(&golden::model_dir("emu2-base")).unwrap();
    let base: LlamaConfig = dir.section("llama").unwrap();
    let error = |config: LlamaConfig| {
        Llama::load(&dir, config, 64, &[Device::Cpu], Kind::Float).unwrap_err().to_string()
    };
    let text = error(LlamaConfig { num_attention_heads: 5, ..base.clone() });
    assert!(text.contains("hidden_size must be a multiple"), "{text}");
    let text = error(LlamaConfig { num_hidden_layers: 2, vocab_size: 9, ..base.clone() });
    assert!(text.contains("`decoder.lm.lm_head.weight` must be [9, 96]"), "{text}");
    assert!(text.contains("`decoder.lm.model.layers.2.mlp.up_proj.weight` is not used"), "{text}");
    let text = error(LlamaConfig { num_hidden_layers: 0, ..base });
    assert!(text.contains("num_hidden_layers must be at least 1"), "{text}");
}

#[test]
fn whole_sequences_side_by_side_are_the_cached_forward() {
    let model = model("emu2-base", 2);
    let mut seeded = ChaCha12Rng::seed_from_u64(11);
    let (long, short) = (random(&model, &mut seeded, 21), random(&model, &mut seeded, 13));
    let padded = Tensor::cat(&[&short, &long.narrow(0, 0, 8)], 0);
    let together = model.forward_whole(&Tensor::stack(&[&long, &padded], 0));
    for (row, alone) in [(0, &long), (1, &short)] {
        let want = whole(&model, alone);
        assert_close("a row", &together.i(row).narrow(0, 0, alone.size()[0]), &want, ROUNDING);
    }
}
