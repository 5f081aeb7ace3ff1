//! Gradients of every committed model against PyTorch's autograd.

#[path = "support/gradient.rs"]
mod gradient;
mod support;

use gradient::{GRADIENT, SEED, differentiated};
use introspectd::tensor::Tensor;
use support::{Runner, dissect, distance, fixtures, open, reference, reference_inputs, unfused};

/// Against PyTorch, relative to the largest entry.
const AGAINST_PYTORCH: f64 = 1e-4;
/// Weights and arithmetic in half precision, against PyTorch in single.
const HALF: f64 = 2e-2;

/// What the reference differentiates: logit 1 of classifiers, logit 7 at position 5 of language models, summed over rows.
fn seed(logits: &Tensor) -> Tensor {
    let shape = logits.shape();
    let row: usize = shape[1..].iter().product();
    let at = match shape {
        [_, _, width] => 5 * width + 7,
        _ => 1,
    };
    let mut values = vec![0.0; shape.iter().product()];
    for place in values.iter_mut().skip(at).step_by(row) {
        *place = 1.0;
    }
    Tensor::from_f32(shape.to_vec(), &values).unwrap()
}

#[test]
fn gradients_are_those_of_pytorch() {
    let mut seen = 0;
    for folder in fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let reference = reference(&folder);
        let Some(expected) = reference.get("grad_embeds") else {
            continue;
        };
        let model = unfused(&open(&folder).unwrap());
        let anatomy = dissect(&model).unwrap();
        let mut inputs = reference_inputs(&model, &reference);
        let made = differentiated(&model, &anatomy, &inputs);
        if name == "bert.int8" {
            let why = made.map(|_| ()).unwrap_err();
            assert!(why.contains("DynamicQuantizeLinear"), "{why}");
            continue;
        }
        let made = made.unwrap_or_else(|e| panic!("{name}: {e}"));
        let seed = seed(&reference["logits"]);
        let dtype = model.graph.outputs()[0].dtype().unwrap();
        inputs.push((SEED.to_owned(), seed.cast_float(dtype).unwrap()));
        let answer = Runner::new(&made).and_then(|r| r.run(&inputs));
        let answer = answer.unwrap_or_else(|e| panic!("{name}: {e}"));
        let off = distance(&answer[GRADIENT], expected);
        let allowed = if name == "bert.half" {
            HALF
        } else {
            AGAINST_PYTORCH
        };
        println!("{name}: {off:.1e}");
        assert!(off < allowed, "{name}: {off}");
        seen += 1;
    }
    assert!(seen > 15, "the fixtures have references: {seen}");
}
