//! Matrix products.

use super::{super::tape::Tape, made, need, only};
use crate::onnx::{Attribute, Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// `dA = g B', dB = A' g`, summed over the axes that were stretched.
pub(super) fn matmul(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let (a, b) = (need(node, 0)?, need(node, 1)?);
    if t.rank(a)? < 2 || t.rank(b)? < 2 {
        return Err("one of its factors is a vector".to_owned());
    }
    if t.wants(a) {
        let weight = t.patch.draft().initializer(b).map(|w| w.dims().to_vec());
        match weight.as_deref() {
            Some([_, columns]) => {
                let columns = i64::try_from(*columns).map_err(|e| e.to_string())?;
                let product = by_weight(t, g, b, columns);
                let product = t.reshape_like(product, a);
                t.give(a, product);
            }
            _ => {
                let transposed = swapped(t, b)?;
                let product = t.op("MatMul", &[g, transposed]);
                give_matrices(t, a, product, y)?;
            }
        }
    }
    if t.wants(b) {
        let transposed = swapped(t, a)?;
        let product = t.op("MatMul", &[transposed, g]);
        give_matrices(t, b, product, y)?;
    }
    Ok(())
}

/// `g W'` as a list of rows, by the flag of a `Gemm`: the weight stays as it is.
fn by_weight(t: &mut Tape<'_>, g: ValueId, weight: ValueId, columns: i64) -> ValueId {
    let rows = t.reshape(g, &[-1, columns]);
    t.with("Gemm", &[rows, weight], vec![Attribute::int("transB", 1)])
}

/// Sums a product over the leading axes along which a factor was stretched.
fn give_matrices(
    t: &mut Tape<'_>,
    factor: ValueId,
    product: ValueId,
    y: ValueId,
) -> Result<(), String> {
    let axes = t.stretched_matrices(factor, y)?;
    if axes.is_empty() {
        t.give(factor, product);
        return Ok(());
    }
    let summed = t.reduce("ReduceSum", product, &axes, true);
    let summed = t.reshape_like(summed, factor);
    t.give(factor, summed);
    Ok(())
}

/// A value with its last two axes swapped. What was made by such a swap is taken from before it.
fn swapped(t: &mut Tape<'_>, value: ValueId) -> Result<ValueId, String> {
    let rank = t.rank(value)?;
    let mut perm: Vec<i64> = (0..rank as i64).collect();
    perm.swap(rank - 1, rank - 2);
    let draft = t.patch.draft();
    let before = draft.producer(value).map(|n| draft.node(n));
    if let Some(node) = before.filter(|n| n.is("Transpose"))
        && node.ints("perm") == Some(&perm[..])
        && let Some(original) = node.input(0)
    {
        return Ok(original);
    }
    Ok(t.transpose(value, &perm))
}

/// Of `Y = alpha A B + beta C`, with A and B possibly transposed: `dA = alpha g B'`, `dB = alpha A' g`, `dC = beta g`.
pub(super) fn gemm(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let (a, b) = (need(node, 0)?, need(node, 1)?);
    let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
    let (trans_a, trans_b) = (flag("transA"), flag("transB"));
    let alpha = node.float("alpha").unwrap_or(1.0);
    let product = |t: &mut Tape<'_>, left, right, flags: [bool; 2]| {
        let attributes = vec![
            Attribute::float("alpha", alpha),
            Attribute::int("transA", i64::from(flags[0])),
            Attribute::int("transB", i64::from(flags[1])),
        ];
        t.with("Gemm", &[left, right], attributes)
    };
    if t.wants(a) {
        let gradient = if trans_a {
            product(t, b, g, [trans_b, true])
        } else {
            product(t, g, b, [false, !trans_b])
        };
        t.give(a, gradient);
    }
    if t.wants(b) {
        let gradient = if trans_b {
            product(t, g, a, [true, trans_a])
        } else {
            product(t, a, g, [!trans_a, false])
        };
        t.give(b, gradient);
    }
    if let Some(c) = t.wanted_input(node, 2) {
        let beta = f64::from(node.float("beta").unwrap_or(1.0));
        let scaled = t.scaled(g, beta, y)?;
        t.give_narrowed(c, scaled, y)?;
    }
    Ok(())
}

/// Of two operands with plain letters, each of which stands in the result or in the other operand: `a, b -> y` gives
/// `dA` by `y, b -> a` and `dB` by `y, a -> b`.
pub(super) fn einsum(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let g = only(given)?;
    let unknown = || "its equation is not one of two operands with plain letters".to_owned();
    let equation: String = node
        .string("equation")
        .ok_or_else(unknown)?
        .split_whitespace()
        .collect();
    let (operands, result) = equation.split_once("->").ok_or_else(unknown)?;
    let (left, right) = operands.split_once(',').ok_or_else(unknown)?;
    let plain = |s: &str| {
        let mut letters: Vec<char> = s.chars().collect();
        letters.sort_unstable();
        letters.dedup();
        letters.len() == s.len() && s.chars().all(|c| c.is_ascii_alphabetic())
    };
    let known = |s: &str, a: &str, b: &str| s.chars().all(|c| a.contains(c) || b.contains(c));
    let parts = [left, right, result];
    if !parts.iter().all(|s| plain(s)) || !known(left, right, result) || !known(right, left, result)
    {
        return Err(unknown());
    }
    for (slot, other, own, others) in [(0, 1, left, right), (1, 0, right, left)] {
        if let Some(x) = t.wanted_input(node, slot) {
            let equation = Attribute::string("equation", &format!("{result},{others}->{own}"));
            let product = t.with("Einsum", &[g, need(node, other)?], vec![equation]);
            t.give(x, product);
        }
    }
    Ok(())
}
