//! Every gradient rule against central differences of its operator, run by the runtime.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/one_node.rs"]
mod one_node;
mod support;

use std::collections::HashMap;

use introspectd::{
    ipc::spec::Rules,
    onnx::{Attribute, Patch, Writer},
    rewrite::gradient::{Shapes, backward},
    tensor::Tensor,
};
use one_node::{Case, Fed, In, Seeded, Weight, bools, longs};
use proptest::prelude::*;
use support::Runner;

/// Against a central difference, relative to the largest entry.
const GRADIENT: f64 = 1e-3;
/// Half the step of the differences.
const STEP: f32 = 4e-3;

/// Differentiates the first output of a node with respect to every float that is fed, both ways.
fn holds(case: &Case, opset: u8) {
    let what = format!("{} at opset {opset}", case.op);
    let (model, fed) = case.model(opset);
    let forward = Runner::new(&model).unwrap_or_else(|e| panic!("{what}: {e}"));
    let answer = forward.run(&fed).unwrap_or_else(|e| panic!("{what}: {e}"));
    let output = model.graph.outputs()[0].value;
    let made = &answer[model.graph.name(output)];
    let seed = Seeded::new(77).floats(made.shape());

    let mut run: HashMap<_, _> = fed
        .iter()
        .map(|(name, t)| (model.graph.value(name).unwrap(), t.shape().to_vec()))
        .collect();
    for (name, tensor) in &answer {
        run.insert(model.graph.value(name).unwrap(), tensor.shape().to_vec());
    }
    let shapes = Shapes::measured(&model.graph, vec![run]);
    let floats: Vec<&(String, Tensor)> = fed.iter().filter(|(_, t)| t.dtype().is_float()).collect();
    let points: Vec<_> = floats
        .iter()
        .map(|(name, _)| model.graph.value(name).unwrap())
        .collect();
    let mut writer = Writer::new(Patch::new(&model.graph, "gradient"), model.opset());
    let dims = vec![introspectd::onnx::Dim::Unknown; made.shape().len()];
    let seeded = writer.patch.input("seed", made.dtype(), dims).unwrap();
    let gradients = backward(
        &mut writer,
        &shapes,
        (output, seeded),
        &points,
        Rules::Gradient,
    )
    .unwrap_or_else(|e| panic!("{what}: {e}"));
    for (at, gradient) in gradients.iter().enumerate() {
        let gradient = gradient.unwrap_or_else(|| panic!("{what}: input {at} has no gradient"));
        writer.patch.tap(gradient, &format!("d{at}")).unwrap();
    }
    let graph = writer
        .patch
        .apply()
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let backward = Runner::new(&model.with_graph(graph)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut with_seed = fed.clone();
    let as_made = seed.cast_float(made.dtype()).unwrap();
    with_seed.push(("seed".to_owned(), as_made));
    let found = backward
        .run(&with_seed)
        .unwrap_or_else(|e| panic!("{what}: {e}"));

    let seed = seed.to_f32().unwrap().into_owned();
    let sum = |fed: &[(String, Tensor)]| -> f64 {
        let answer = forward.run(fed).unwrap();
        let y = answer[model.graph.name(output)]
            .to_f32()
            .unwrap()
            .into_owned();
        y.iter()
            .zip(&seed)
            .map(|(y, s)| f64::from(*y) * f64::from(*s))
            .sum()
    };
    for (at, (name, tensor)) in floats.iter().enumerate() {
        let exact = &found[&format!("d{at}")];
        assert_eq!(exact.shape(), tensor.shape(), "{what}: {name}");
        let exact = exact.to_f32().unwrap().into_owned();
        let values = tensor.to_f32().unwrap().into_owned();
        let numeric: Vec<f64> = (0..values.len())
            .map(|i| {
                let moved = |by: f32| {
                    let mut values = values.clone();
                    values[i] += by;
                    let mut fed = fed.clone();
                    let place = fed.iter_mut().find(|(n, _)| n == name).unwrap();
                    place.1 = Tensor::from_f32(tensor.shape().to_vec(), &values).unwrap();
                    sum(&fed)
                };
                (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)
            })
            .collect();
        let largest = numeric.iter().fold(1e-2f64, |m, v| m.max(v.abs()));
        for (i, (a, b)) in exact.iter().zip(&numeric).enumerate() {
            let off = (f64::from(*a) - b).abs() / largest;
            assert!(
                off < GRADIENT,
                "{what}: {name}[{i}]: {a} by rule, {b} by difference"
            );
        }
    }
}

/// At operator sets that models are exported with.
fn holds_at(opsets: &[u8], case: &Case) {
    for opset in opsets {
        holds(case, *opset);
    }
}

fn node(op: &'static str, inputs: Vec<In>) -> Case {
    Case::new("", op, inputs)
}

fn fed(seed: u64, shape: &[usize]) -> In {
    Fed(Seeded::new(seed).floats(shape))
}

/// Between 0.5 and 4.5.
fn positive(seed: u64, shape: &[usize]) -> In {
    let values = Seeded::new(seed).floats(shape);
    let values: Vec<f32> = values.to_f32().unwrap().iter().map(|v| v + 2.5).collect();
    Fed(Tensor::from_f32(shape.to_vec(), &values).unwrap())
}

fn list(values: &[i64]) -> In {
    Weight(longs(&[values.len()], values))
}

fn scalar(value: f32) -> In {
    Weight(Tensor::from_f32(vec![], &[value]).unwrap())
}

const USUAL: [u8; 5] = [14, 17, 18, 20, 23];

#[test]
fn elementwise_operators_of_one_input() {
    for op in [
        "Abs",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Neg",
        "Relu",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Tanh",
    ] {
        holds_at(&[14, 23], &node(op, vec![fed(3, &[2, 3, 4])]));
    }
    for op in ["Log", "Reciprocal", "Sqrt"] {
        holds_at(&[14, 23], &node(op, vec![positive(4, &[2, 7])]));
    }
    holds(
        &node("LeakyRelu", vec![fed(3, &[9])]).float("alpha", 0.3),
        17,
    );
    holds(&node("Elu", vec![fed(3, &[9])]).float("alpha", 0.7), 17);
    holds(
        &node("HardSigmoid", vec![fed(3, &[9])]).float("alpha", 0.4),
        17,
    );
    for approximate in ["none", "tanh"] {
        let how = Attribute::string("approximate", approximate);
        holds(&node("Gelu", vec![fed(5, &[3, 8])]).with(how), 20);
    }
    holds_at(
        &[14, 20],
        &node("Clip", vec![fed(6, &[12]), scalar(-0.5), scalar(0.7)]),
    );
    holds_at(
        &[14, 20],
        &node("Clip", vec![fed(6, &[12]), In::None, scalar(0.7)]),
    );
    holds_at(&[14, 20], &node("Clip", vec![fed(6, &[12]), scalar(-0.5)]));
    holds(&node("Cast", vec![fed(6, &[3])]).int("to", 11), 17);
}

#[test]
fn rarer_operators_of_one_input() {
    for op in [
        "Asinh",
        "Atan",
        "Celu",
        "Cosh",
        "Selu",
        "Sinh",
        "Softsign",
        "ThresholdedRelu",
    ] {
        holds_at(&[14, 23], &node(op, vec![fed(3, &[2, 3, 4])]));
    }
    holds_at(&[18, 23], &node("Mish", vec![fed(3, &[2, 3, 4])]));
    // Within the unit interval, and above one.
    let small: Vec<f32> = (0..9).map(|i| 0.2 * (i as f32 - 4.0)).collect();
    let small = Fed(Tensor::from_f32(vec![9], &small).unwrap());
    for op in ["Acos", "Asin", "Atanh", "Tan"] {
        holds(&node(op, vec![small.clone()]), 17);
    }
    let above: Vec<f32> = (0..9).map(|i| 1.5 + 0.2 * i as f32).collect();
    holds(
        &node(
            "Acosh",
            vec![Fed(Tensor::from_f32(vec![9], &above).unwrap())],
        ),
        17,
    );
    holds(&node("Celu", vec![fed(3, &[9])]).float("alpha", 0.6), 17);
    holds(
        &node("Selu", vec![fed(3, &[9])])
            .float("alpha", 0.6)
            .float("gamma", 1.3),
        17,
    );
    let slope = Weight(Seeded::new(5).floats(&[3, 1]));
    holds_at(&[14, 20], &node("PRelu", vec![fed(3, &[2, 3, 4]), slope]));
}

#[test]
fn sums_and_means_of_many_inputs() {
    for op in ["Sum", "Mean"] {
        let inputs = vec![fed(1, &[2, 3]), fed(2, &[3]), fed(3, &[2, 1])];
        holds_at(&[14, 23], &node(op, inputs));
    }
}

#[test]
fn rarer_layouts() {
    let x = || fed(8, &[2, 3, 4]);
    holds_at(&USUAL, &node("Pad", vec![x(), list(&[0, 1, 2, 1, 0, 1])]));
    // Taken away in place of added.
    holds_at(&USUAL, &node("Pad", vec![x(), list(&[0, -1, 0, 0, 1, -2])]));
    holds_at(&USUAL, &node("Tile", vec![x(), list(&[2, 1, 3])]));
}

#[test]
fn rarer_picks() {
    let index = Weight(longs(&[3, 2], &[0, 2, 1, 0, 0, 2]));
    holds_at(
        &[17, 18, 20],
        &node("GatherND", vec![fed(9, &[2, 3, 4]), index]),
    );
    let index = Weight(longs(&[2, 3], &[0, 1, 3, 2, 0, 1]));
    let case = node(
        "ScatterElements",
        vec![fed(9, &[2, 4]), index, fed(10, &[2, 3])],
    );
    holds_at(&[14, 18, 20], &case.int("axis", 1));
    let index = Weight(longs(&[2, 1], &[2, 0]));
    let case = node("ScatterND", vec![fed(9, &[3, 4]), index, fed(10, &[2, 4])]);
    holds_at(&[14, 18, 20], &case);
}

#[test]
fn rarer_reductions() {
    let x = || positive(11, &[2, 3, 4]);
    for op in ["ReduceL1", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"] {
        for keep in [0, 1] {
            let along = Attribute::ints("axes", &[-1]);
            holds(&node(op, vec![x()]).with(along).int("keepdims", keep), 17);
            holds(&node(op, vec![x(), list(&[1])]).int("keepdims", keep), 20);
        }
    }
    for (exclusive, reverse) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let case = node("CumSum", vec![fed(1, &[3, 4]), Weight(longs(&[], &[1]))]);
        holds_at(
            &[14, 20],
            &case.int("exclusive", exclusive).int("reverse", reverse),
        );
    }
}

#[test]
fn windows() {
    let weight = |shape: &[usize]| Weight(Seeded::new(3).floats(shape));
    let image = || fed(1, &[2, 4, 7, 6]);
    for (strides, pads, dilations, group) in [
        ([1, 1], [0, 0, 0, 0], [1, 1], 1),
        ([2, 3], [1, 0, 1, 2], [1, 1], 1),
        ([1, 2], [2, 1, 1, 1], [2, 1], 2),
        ([3, 3], [0, 0, 0, 0], [1, 1], 4),
    ] {
        let channels = 4 / group as usize;
        let case = node(
            "Conv",
            vec![image(), weight(&[4, channels, 2, 3]), weight(&[4])],
        )
        .with(Attribute::ints("strides", &strides))
        .with(Attribute::ints("pads", &pads))
        .with(Attribute::ints("dilations", &dilations))
        .int("group", group);
        holds_at(&[14, 20], &case);
    }
    for how in ["SAME_UPPER", "SAME_LOWER", "VALID"] {
        let case = node("Conv", vec![image(), weight(&[3, 4, 2, 3])])
            .with(Attribute::ints("strides", &[2, 2]))
            .with(Attribute::string("auto_pad", how));
        holds(&case, 17);
    }
    // Of sequences.
    let case = node("Conv", vec![fed(1, &[2, 3, 9]), weight(&[5, 3, 3])]);
    holds_at(&[14, 20], &case.with(Attribute::ints("pads", &[1, 1])));
    let case = node(
        "ConvTranspose",
        vec![fed(1, &[2, 3, 4, 3]), weight(&[3, 2, 2, 3])],
    );
    holds(&case.with(Attribute::ints("strides", &[2, 2])), 17);

    let kernel = || Attribute::ints("kernel_shape", &[2, 3]);
    let strides = || Attribute::ints("strides", &[2, 2]);
    for op in ["AveragePool", "MaxPool"] {
        let case = node(op, vec![fed(2, &[1, 2, 6, 7])])
            .with(kernel())
            .with(strides());
        holds_at(&[17, 20], &case);
        holds(
            &case.clone().with(Attribute::ints("pads", &[1, 1, 1, 1])),
            17,
        );
    }
    let case = node("AveragePool", vec![fed(2, &[1, 2, 6, 7])])
        .with(kernel())
        .with(strides());
    let case = case
        .with(Attribute::ints("pads", &[1, 1, 1, 1]))
        .int("count_include_pad", 1);
    holds(&case, 17);
    holds(&node("GlobalAveragePool", vec![fed(2, &[2, 3, 4, 5])]), 17);
}

#[test]
fn norms_over_channels() {
    let weight = |seed, n: usize| Weight(Seeded::new(seed).floats(&[n]));
    let shifted = |seed| match positive(seed, &[4]) {
        Fed(t) => Weight(t),
        other => other,
    };
    let batch = vec![
        fed(1, &[2, 4, 5]),
        weight(2, 4),
        weight(3, 4),
        weight(4, 4),
        shifted(5),
    ];
    holds_at(&[14, 20], &node("BatchNormalization", batch));
    let instance = vec![fed(1, &[2, 4, 5]), weight(2, 4), weight(3, 4)];
    holds_at(&[14, 20], &node("InstanceNormalization", instance));
    let group = vec![fed(1, &[2, 4, 5]), weight(2, 4), weight(3, 4)];
    holds(&node("GroupNormalization", group).int("num_groups", 2), 21);
    let case = node("LpNormalization", vec![fed(1, &[2, 3, 4])]);
    holds(&case.int("axis", 1), 17);
}

#[test]
fn elementwise_operators_of_two_inputs() {
    for op in ["Add", "Sub", "Mul"] {
        holds_at(&[14, 23], &node(op, vec![fed(1, &[2, 3]), fed(2, &[2, 3])]));
        holds(&node(op, vec![fed(1, &[2, 3]), scalar(1.5)]), 17);
    }
    holds_at(
        &[14, 23],
        &node("Div", vec![fed(1, &[2, 3]), positive(2, &[2, 3])]),
    );
    for op in ["Max", "Min"] {
        holds_at(
            &[14, 23],
            &node(op, vec![fed(1, &[2, 3]), fed(2, &[3]), fed(3, &[2, 1])]),
        );
    }
    for exponent in [2.0, 3.0, 0.5, -1.5] {
        holds_at(
            &[14, 23],
            &node("Pow", vec![positive(7, &[5]), scalar(exponent)]),
        );
    }
    holds(
        &node("Pow", vec![fed(7, &[5]), Weight(longs(&[], &[3]))]),
        17,
    );
    let mask = Weight(bools(&[3], &[1, 0, 1]));
    holds_at(
        &[14, 23],
        &node(
            "Where",
            vec![mask.clone(), fed(1, &[2, 3]), fed(2, &[2, 1])],
        ),
    );
    holds(
        &node("Where", vec![mask, fed(1, &[2, 3]), scalar(-9.0)]),
        17,
    );
}

#[test]
fn layouts() {
    let x = || fed(8, &[2, 3, 4]);
    holds_at(&USUAL, &node("Reshape", vec![x(), list(&[4, -1])]));
    holds_at(&USUAL, &node("Flatten", vec![x()]).int("axis", 2));
    holds_at(&USUAL, &node("Transpose", vec![x()]));
    holds_at(
        &USUAL,
        &node("Transpose", vec![x()]).with(Attribute::ints("perm", &[1, 2, 0])),
    );
    holds_at(&USUAL, &node("Unsqueeze", vec![x(), list(&[1, -1])]));
    holds_at(
        &USUAL,
        &node("Squeeze", vec![fed(8, &[2, 1, 3, 1]), list(&[1, 3])]),
    );
    holds_at(
        &USUAL,
        &node("Expand", vec![fed(8, &[3, 1]), list(&[2, 3, 4])]),
    );
    holds_at(
        &USUAL,
        &node(
            "Concat",
            vec![fed(1, &[2, 3]), fed(2, &[2, 2]), fed(3, &[2, 1])],
        )
        .int("axis", -1),
    );
    holds_at(
        &USUAL,
        &node("Concat", vec![fed(1, &[2, 3]), fed(2, &[1, 3])]).int("axis", 0),
    );
    holds_at(
        &USUAL,
        &node("Split", vec![x(), list(&[1, 3])])
            .int("axis", -1)
            .outputs(&[true, false]),
    );
    holds_at(
        &USUAL,
        &node("Split", vec![x(), list(&[2, 1])])
            .int("axis", 1)
            .outputs(&[true, false]),
    );
}

#[test]
fn picks() {
    let x = || fed(9, &[3, 4, 5]);
    for axis in [0, 1, -1] {
        holds_at(
            &USUAL,
            &node("Gather", vec![x(), Weight(longs(&[], &[1]))]).int("axis", axis),
        );
        holds_at(
            &USUAL,
            &node("Gather", vec![x(), list(&[2, 0, 2])]).int("axis", axis),
        );
        holds_at(
            &USUAL,
            &node("Gather", vec![x(), Weight(longs(&[2, 2], &[2, -1, 0, 2]))]).int("axis", axis),
        );
    }
    let index = Weight(longs(&[2, 3], &[0, 2, 2, 1, 0, -1]));
    holds_at(
        &[17, 18, 20, 23],
        &node("GatherElements", vec![fed(9, &[2, 3]), index]).int("axis", 1),
    );
    let end = i64::MAX;
    holds_at(
        &USUAL,
        &node("Slice", vec![x(), list(&[1]), list(&[3]), list(&[1])]),
    );
    holds_at(
        &USUAL,
        &node(
            "Slice",
            vec![x(), list(&[-2, 0]), list(&[end, 2]), list(&[-1, 0])],
        ),
    );
    holds_at(
        &USUAL,
        &node(
            "Slice",
            vec![x(), list(&[1]), list(&[end]), list(&[2]), list(&[2])],
        ),
    );
    holds_at(
        &USUAL,
        &node(
            "Slice",
            vec![x(), list(&[-1]), list(&[i64::MIN]), list(&[1]), list(&[-1])],
        ),
    );
    holds_at(
        &USUAL,
        &node("Trilu", vec![fed(9, &[2, 3, 3])]).int("upper", 0),
    );
}

#[test]
fn products() {
    holds_at(
        &USUAL,
        &node("MatMul", vec![fed(1, &[2, 3]), fed(2, &[3, 4])]),
    );
    holds_at(
        &USUAL,
        &node("MatMul", vec![fed(1, &[2, 2, 3, 2]), fed(2, &[2, 2, 2, 3])]),
    );
    holds_at(
        &USUAL,
        &node("MatMul", vec![fed(1, &[2, 2, 3, 2]), fed(2, &[2, 1, 2, 3])]),
    );
    holds_at(
        &USUAL,
        &node("MatMul", vec![fed(1, &[2, 3]), fed(2, &[2, 3, 4])]),
    );
    let weight = || Weight(Seeded::new(3).floats(&[3, 4]));
    holds_at(&USUAL, &node("MatMul", vec![fed(1, &[2, 2, 3]), weight()]));
    holds_at(
        &USUAL,
        &node(
            "MatMul",
            vec![Weight(Seeded::new(3).floats(&[2, 2])), fed(1, &[3, 2, 4])],
        ),
    );
    for (a, b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let turned = |shape: [usize; 2], turn| {
            if turn == 1 {
                [shape[1], shape[0]]
            } else {
                shape
            }
        };
        let inputs = vec![
            fed(1, &turned([2, 3], a)),
            fed(2, &turned([3, 4], b)),
            fed(3, &[4]),
        ];
        let case = node("Gemm", inputs).int("transA", a).int("transB", b);
        holds_at(&USUAL, &case.float("alpha", 0.5).float("beta", 1.5));
    }
    for equation in ["bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd"] {
        let k = if equation.starts_with("bhqd") {
            [2, 2, 4, 3]
        } else {
            [2, 2, 3, 2]
        };
        let case = node("Einsum", vec![fed(1, &[2, 2, 3, 3]), fed(2, &k)]);
        holds_at(&USUAL, &case.with(Attribute::string("equation", equation)));
    }
}

#[test]
fn reductions() {
    let x = || fed(11, &[2, 3, 4]);
    for op in [
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceL2",
        "ReduceSumSquare",
    ] {
        for keep in [0, 1] {
            holds_at(
                &[14, 17],
                &node(op, vec![x()])
                    .with(Attribute::ints("axes", &[-1]))
                    .int("keepdims", keep),
            );
            holds_at(
                &[18, 23],
                &node(op, vec![x(), list(&[1, -1])]).int("keepdims", keep),
            );
            holds_at(&USUAL, &node(op, vec![x()]).int("keepdims", keep));
        }
    }
    for keep in [0, 1] {
        holds_at(
            &USUAL,
            &node("ReduceSum", vec![x(), list(&[0, 2])]).int("keepdims", keep),
        );
        holds_at(&USUAL, &node("ReduceSum", vec![x()]).int("keepdims", keep));
    }
}

#[test]
fn norms_and_softmaxes() {
    for axis in [-1, 1] {
        for op in ["Softmax", "LogSoftmax"] {
            holds_at(
                &USUAL,
                &node(op, vec![fed(12, &[2, 3, 4])]).int("axis", axis),
            );
            // Then it ran over all axes from its axis on.
            holds(&node(op, vec![fed(12, &[2, 3, 4])]).int("axis", axis), 12);
        }
    }
    let weights = |shape: &[usize]| [1, 2].map(|seed| Weight(Seeded::new(seed).floats(shape)));
    let [scale, bias] = weights(&[4]);
    holds_at(
        &[17, 23],
        &node(
            "LayerNormalization",
            vec![fed(13, &[2, 3, 4]), scale.clone(), bias.clone()],
        ),
    );
    holds(
        &node(
            "LayerNormalization",
            vec![fed(13, &[2, 3, 4]), scale.clone()],
        )
        .float("epsilon", 0.1),
        17,
    );
    let [wide, wide_bias] = weights(&[3, 4]);
    holds(
        &node(
            "LayerNormalization",
            vec![fed(13, &[2, 3, 4]), wide, wide_bias],
        )
        .int("axis", 1),
        17,
    );
    holds(
        &node("RMSNormalization", vec![fed(13, &[2, 3, 4]), scale]).float("epsilon", 0.1),
        23,
    );
    holds(
        &node(
            "SimplifiedLayerNormalization",
            vec![fed(13, &[2, 3, 4]), bias],
        )
        .float("epsilon", 0.1),
        17,
    );
}

#[test]
fn rotary_positions() {
    for interleaved in [0, 1] {
        let angles = [5, 6].map(|seed| Weight(Seeded::new(seed).floats(&[2, 3, 2])));
        let [cosine, sine] = angles;
        let case = node(
            "RotaryEmbedding",
            vec![fed(14, &[2, 2, 3, 4]), cosine, sine],
        );
        holds(&case.int("interleaved", interleaved), 23);
    }
}

#[test]
fn what_has_no_rule_is_named() {
    let (model, _) = node("Det", vec![fed(1, &[3, 3])]).model(17);
    let output = model.graph.outputs()[0].value;
    let point = model.graph.value("in0").unwrap();
    let mut writer = Writer::new(Patch::new(&model.graph, "gradient"), 17);
    let shapes = Shapes::measured(&model.graph, Vec::new());
    let error = backward(
        &mut writer,
        &shapes,
        (output, output),
        &[point],
        Rules::Gradient,
    )
    .unwrap_err();
    assert_eq!(
        (&*error.operator, &*error.reason),
        ("Det", "it has no rule")
    );
    assert!(error.to_string().contains("finite differences"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn broadcasting_is_undone(
        wide in prop::collection::vec(2usize..4, 1..4), ones in prop::collection::vec(any::<bool>(), 2..8),
        lacks in (0usize..3, 0usize..3), op in 0usize..4,
    ) {
        // Each operand has the wide shape with some extents of one, and lacks some leading axes; together they span it.
        let narrow = |lacks: usize, ones: &[bool], keep: &[bool]| -> Vec<usize> {
            let lacks = lacks.min(wide.len() - 1);
            wide.iter().enumerate().skip(lacks)
                .map(|(i, n)| if ones[i % ones.len()] && !keep[i % keep.len()] { 1 } else { *n })
                .collect()
        };
        let none = vec![false];
        let a = narrow(lacks.0, &ones, &none);
        let inverse: Vec<bool> = ones.iter().map(|o| !o).collect();
        let b = narrow(lacks.1, &inverse, &none);
        let op = ["Add", "Sub", "Mul", "Div"][op];
        holds(&node(op, vec![fed(1, &a), positive(2, &b)]), 17);
    }

    #[test]
    fn products_of_any_leading_axes(
        lead in prop::collection::vec(1usize..3, 0..3), (m, k, n) in (1usize..4, 1usize..4, 1usize..4), which in 0usize..3,
    ) {
        let with = |lead: &[usize], last: [usize; 2]| [lead, &last[..]].concat();
        let ones = vec![1; lead.len()];
        let (left, right) = match which {
            0 => (&lead[..], &lead[..]),
            1 => (&lead[..], &ones[..]),
            _ => (&ones[..], &lead[..]),
        };
        holds(&node("MatMul", vec![fed(1, &with(left, [m, k])), fed(2, &with(right, [k, n]))]), 17);
    }
}
