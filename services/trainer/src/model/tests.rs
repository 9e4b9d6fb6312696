use super::*;

/// Of all parts together, as the project has decided: 32 MB in bfloat16.
const PARAMETERS_MAX: usize = 16_000_000;

#[test]
fn nano_has_at_most_16_million_parameters() {
    let model = Model::new(&nano(), 0, Device::Cpu).unwrap();
    let variables = model.variables();
    let of = |prefix: &str| {
        count(variables.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, tensor)| tensor))
    };
    let parts = ["visual.", "decoder.", "project_", "unet.", "vae."].map(of);
    assert!(count(variables.values()) <= PARAMETERS_MAX, "{parts:?}");
    assert_eq!(parts.iter().sum::<usize>(), count(variables.values()), "every weight belongs to a part");
}

#[test]
fn training_begins_with_finite_values_of_about_1() {
    tch::set_num_threads(1);
    let _no_grad = tch::no_grad_guard();
    let model = Model::new(&nano(), 3, Device::Cpu).unwrap();
    let deviation = |tensor: &Tensor| tensor.std(false).double_value(&[]);
    let pixels =
        Tensor::from_slice(&emu2_decoder::noise::standard_normal(1, 2 * 3 * 64 * 64)).view([2, 3, 64, 64]);
    let embeddings = model.tower.encode_image(&pixels, model.n_query());
    assert_eq!(embeddings.size(), [2, 16, 192]);
    assert!((0.3..3.0).contains(&deviation(&embeddings)), "{}", deviation(&embeddings));
    let x = model.llm.project_up(&embeddings);
    assert!((0.1..3.0).contains(&deviation(&x)), "{}", deviation(&x));
    let logits = model.llm.logits(&model.llm.forward_whole(&x));
    assert!((0.05..2.0).contains(&deviation(&logits)), "{}", deviation(&logits));
    let latents = model.vae.encoder.forward(&pixels);
    assert_eq!(latents.mean.size(), [2, 4, 16, 16]);
    let decoded = model.vae.decoder.forward(&latents.mean);
    assert!((0.01..3.0).contains(&deviation(&decoded)), "{}", deviation(&decoded));
    let ids = Tensor::zeros([2, 6], (Kind::Float, Device::Cpu));
    let noise = model.unet.forward(&latents.mean, &Tensor::from_slice(&[1_i64, 999]), &embeddings, &ids);
    assert!((0.001..3.0).contains(&deviation(&noise)), "{}", deviation(&noise));
}

#[test]
fn what_is_trained_is_named() {
    let model = Model::new(&nano(), 0, Device::Cpu).unwrap();
    let trained = model.train(&["visual.".to_owned(), "project_up.".to_owned()]).unwrap();
    assert!(trained.keys().all(|name| name.starts_with("visual.") || name == "project_up.weight"));
    for (name, tensor) in model.variables() {
        assert_eq!(tensor.requires_grad(), trained.contains_key(&name), "{name}");
    }
    let error = model.train(&["vusual.".to_owned()]).unwrap_err().to_string();
    assert!(error.contains("`vusual.`"), "{error}");
    let stranger = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    assert!(model.restore([("unet.stranger", &stranger)]).unwrap_err().to_string().contains("unet.stranger"));
    let error = format!("{:#}", model.restore([("project_up.weight", &stranger)]).unwrap_err());
    assert!(error.contains("`project_up.weight`: must be [256, 192], is [1]"), "{error}");
}

#[test]
fn a_narrow_model_knows_what_it_was_rounded_from() {
    let [wide, narrow] = [(); 2].map(|()| Model::new(&nano(), 0, Device::Cpu).unwrap());
    let narrow = narrow.computing_in(Kind::BFloat16).unwrap();
    assert_eq!((wide.master_weights().len(), narrow.kind()), (0, Kind::BFloat16));
    let variables = narrow.variables();
    for (name, value) in wide.variables() {
        assert_eq!(narrow.master_weights()[&name], value, "{name}");
        assert_eq!(variables[&name], value.to_kind(Kind::BFloat16), "{name}");
    }
    let name = "project_up.weight";
    let values = wide.variables()[name].ones_like() * 0.1;
    narrow.restore([(name, &values)]).unwrap();
    assert_eq!(narrow.master_weights()[name], values);
}
