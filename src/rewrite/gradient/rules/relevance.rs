//! AttnLRP (Achtibat et al. 2024): relevance for transformers, as other rules for a few operators of the walk backwards.
//!
//! Relevance is what reaches a value times the value, so that an operator without a rule here hands on its gradient: for linear
//! operators that is the epsilon rule with epsilon zero, for a softmax the paper's equation 13. The others:
//!
//! ```text
//!   y = f(x), elementwise, f(0) = 0      g y / x                 identity rule (equation 9)
//!   y = a b, both depend on a point      half the gradient       uniform rule (equation 7)
//!   norms                                g times what is fixed   the deviation counts as a number (see `norm`)
//! ```
//!
//! An export may write an activation or a norm as several operators. A product of two functions of one value is an activation of that value;
//! a factor or divisor that was summed over an axis is the size of a norm.
//!
//! The reference is `lxt` of the authors; `tests/attribution_goldens.rs` holds the numbers against it.

use std::collections::BTreeSet;

use super::{super::tape::Tape, Rule, binary, made, need, only, product};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// Most operators of a written-out activation or size that are looked at.
const MOST: usize = 64;

/// Activations that are zero at zero.
const ACTIVATIONS: [&str; 15] = [
    "Celu",
    "Elu",
    "Erf",
    "Gelu",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "PRelu",
    "Pow",
    "Relu",
    "Selu",
    "Softsign",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
];
/// Other elementwise operators of one input.
const ELEMENTWISE: [&str; 12] = [
    "Abs",
    "Cast",
    "Clip",
    "Exp",
    "HardSigmoid",
    "Identity",
    "Log",
    "Neg",
    "Reciprocal",
    "Sigmoid",
    "Softplus",
    "Sqrt",
];
/// Elementwise operators of more inputs.
const COMBINING: [&str; 7] = ["Add", "Div", "Max", "Min", "Mul", "Sub", "Sum"];
/// Sums over axes.
const SUMS: [&str; 5] = [
    "ReduceL2",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL1",
];

/// The rule of an operator that hands on something else than its gradient.
pub(super) fn of(node: &Node) -> Option<Rule> {
    if !node.domain.is_empty() {
        return None;
    }
    Some(match node.op.as_str() {
        "Mul" => mul,
        "Div" => div,
        "MatMul" => |t, node, given| shared(t, node, given, product::matmul),
        "Gemm" => |t, node, given| shared(t, node, given, product::gemm),
        "Einsum" => |t, node, given| shared(t, node, given, product::einsum),
        op if ACTIVATIONS.contains(&op) => activation,
        _ => return None,
    })
}

/// The identity rule for an operator of one input; a power with an exponent that is not fixed has its own gradient.
fn activation(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let fixed = node.reads().skip(1).all(|v| !t.wants(v));
    if !fixed {
        return Err("more than its first input depends on what is explained".to_owned());
    }
    identity(t, need(node, 0)?, (only(given)?, made(node)?))
}

/// `g y / x`, and `g` where x is zero, as y is.
fn identity(t: &mut Tape<'_>, x: ValueId, (g, y): (ValueId, ValueId)) -> Result<(), String> {
    let dtype = t.dtype(x)?;
    let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
    let still = t.op("Equal", &[x, zero]);
    let divisor = t.op("Where", &[still, one, x]);
    let ratio = t.op("Div", &[y, divisor]);
    let share = t.op("Mul", &[g, ratio]);
    t.give(x, share);
    Ok(())
}

/// A product of numbers: an activation that is written out, a division by the size of a norm, or two of the same right.
fn mul(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (a, b) = (need(node, 0)?, need(node, 1)?);
    if !t.wants(a) || !t.wants(b) {
        return binary::mul(t, node, given);
    }
    if let Some(x) = common(t, a, b) {
        return identity(t, x, (only(given)?, made(node)?));
    }
    let (g, y) = (only(given)?, made(node)?);
    for (x, size) in [(a, b), (b, a)] {
        if is_size(t, size) {
            let share = t.op("Mul", &[g, size]);
            return t.give_narrowed(x, share, y);
        }
    }
    shared(t, node, given, binary::mul)
}

/// A quotient: an activation that is written out, or a division by what counts as a number.
fn div(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (a, b) = (need(node, 0)?, need(node, 1)?);
    if !t.wants(a) || !t.wants(b) {
        return binary::div(t, node, given);
    }
    let (g, y) = (only(given)?, made(node)?);
    if let Some(x) = common(t, a, b) {
        return identity(t, x, (g, y));
    }
    let draft = t.patch.draft();
    let below = draft.producer(b).map(|n| draft.node(n));
    if below.is_some_and(|n| n.is("ReduceSum") && n.input(0) == Some(a)) {
        // A softmax that is written out.
        return binary::div(t, node, given);
    }
    let share = t.op("Div", &[g, b]);
    t.give_narrowed(a, share, y)
}

/// The uniform rule: the gradient divided by the number of factors that depend on a point.
fn shared(t: &mut Tape<'_>, node: &Node, given: Given<'_>, rule: Rule) -> Result<(), String> {
    let factors = if node.op == "Einsum" {
        node.inputs.len()
    } else {
        2
    };
    let moving = (0..factors)
        .filter(|slot| t.wanted_input(node, *slot).is_some())
        .count();
    if moving < 2 {
        return rule(t, node, given);
    }
    let (g, y) = (only(given)?, made(node)?);
    let share = t.scaled(g, (moving as f64).recip(), y)?;
    rule(t, node, &[Some(share)])
}

/// The inputs of an elementwise operator that depend on a point; `None` for any other operator.
fn elementwise(t: &Tape<'_>, value: ValueId) -> Option<Vec<ValueId>> {
    let draft = t.patch.draft();
    let node = draft.node(draft.producer(value)?);
    let known = node.is_any(&ACTIVATIONS) || node.is_any(&ELEMENTWISE) || node.is_any(&COMBINING);
    let inputs: Vec<ValueId> = node.reads().filter(|v| t.wants(*v)).collect();
    (known && !inputs.is_empty()).then_some(inputs)
}

/// Everything that a value is made of by elementwise operators, itself included.
fn parts(t: &Tape<'_>, value: ValueId) -> BTreeSet<ValueId> {
    let (mut found, mut open) = (BTreeSet::from([value]), vec![value]);
    while let Some(next) = open.pop().filter(|_| found.len() < MOST) {
        for input in elementwise(t, next).unwrap_or_default() {
            if found.insert(input) {
                open.push(input);
            }
        }
    }
    found
}

/// A value that both are elementwise functions of, and of nothing else that depends on a point.
fn common(t: &Tape<'_>, a: ValueId, b: ValueId) -> Option<ValueId> {
    let (of_a, of_b) = (parts(t, a), parts(t, b));
    let only_of = |value: ValueId, x: ValueId| {
        let (mut seen, mut open) = (BTreeSet::from([value]), vec![value]);
        while let Some(next) = open.pop() {
            if next == x {
                continue;
            }
            let Some(inputs) = elementwise(t, next).filter(|_| seen.len() < MOST) else {
                return false;
            };
            open.extend(inputs.into_iter().filter(|v| seen.insert(*v)));
        }
        true
    };
    let mut shared = of_a.intersection(&of_b).copied().collect::<Vec<_>>();
    // Any will do, and what was made later is likely to be nearer.
    shared.reverse();
    shared
        .into_iter()
        .find(|x| only_of(a, *x) && only_of(b, *x))
}

/// Whether a value is made, element by element, of sums over axes only.
fn is_size(t: &Tape<'_>, value: ValueId) -> bool {
    let draft = t.patch.draft();
    let leaves: Vec<ValueId> = parts(t, value)
        .into_iter()
        .filter(|v| elementwise(t, *v).is_none())
        .collect();
    !leaves.is_empty()
        && leaves.iter().all(|v| {
            draft
                .producer(*v)
                .is_some_and(|n| draft.node(n).is_any(&SUMS))
        })
}
