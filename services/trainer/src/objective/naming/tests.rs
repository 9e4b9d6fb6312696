//! What the loss of naming counts.

use super::*;
use crate::model::nano;

#[test]
fn boxes_count_where_something_is_named() {
    let _no_grad = tch::no_grad_guard();
    let model = Model::new(&nano(), 0, Device::Cpu).unwrap();
    let queries = i64::from(model.n_query());
    let float = (Kind::Float, Device::Cpu);
    // Of zeros: every box is predicted as 0, 0, 0, 0.
    let head = |classes: i64| Linear {
        weight: Tensor::zeros([classes, model.tower.config.width], float),
        bias: Some(Tensor::zeros([classes], float)),
    };
    let heads = NamingHeads { names: head(3), boxes: head(4), background: head(2), count: head(2) };
    let pixels = Tensor::zeros([2, 3, 64, 64], float);
    let zeros = |count| Tensor::zeros([count], (Kind::Int64, Device::Cpu));
    let error = |queries_named: &[i64]| {
        let boxes = Tensor::full([2 * queries, 4], 9.0, float);
        let named = Tensor::zeros([2 * queries], (Kind::Bool, Device::Cpu));
        for &query in queries_named {
            boxes.get(query).copy_(&Tensor::from_slice(&[0.0_f32, 0.2, 0.4, 0.2]));
            let _ = named.get(query).fill_(1);
        }
        let targets = NamingTargets {
            names: zeros(2 * queries),
            boxes,
            named,
            backgrounds: zeros(2),
            counts: zeros(2),
        };
        let parts = naming_loss(&model, &heads, &pixels, &targets).parts;
        parts.iter().find(|(name, _)| *name == "box_error").unwrap().1.double_value(&[])
    };
    assert!((error(&[0, 5, 17]) - 0.2).abs() < 1e-6, "{}", error(&[0, 5, 17]));
    assert_eq!(error(&[]), 0.0);
}
