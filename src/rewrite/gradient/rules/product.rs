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

/// Of any number of operands: the result and the other operands give the gradient of one, `y, others -> own`. A letter that only the
/// operand has was summed over, and its gradient is the same all along it.
pub(super) fn einsum(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let operands: Vec<ValueId> = node.reads().collect();
    let (terms, result) = letters(t, node, &operands, y)?;
    for (slot, x) in operands.iter().enumerate() {
        if !t.wants(*x) {
            continue;
        }
        let own = &terms[slot];
        let mut read = vec![(g, &result)];
        read.extend(
            (operands.iter().zip(&terms).enumerate())
                .filter(|(other, _)| *other != slot)
                .map(|(_, (v, term))| (*v, term)),
        );
        let known = |c: &char| read.iter().any(|(_, term)| term.contains(*c));
        let left: String = own.chars().filter(known).collect();
        let inputs: Vec<ValueId> = read.iter().map(|(v, _)| *v).collect();
        let terms: Vec<&str> = read.iter().map(|(_, term)| term.as_str()).collect();
        let equation = Attribute::string("equation", &format!("{}->{left}", terms.join(",")));
        let summed: Vec<i64> = (0i64..)
            .zip(own.chars())
            .filter(|(_, c)| !known(c))
            .map(|(axis, _)| axis)
            .collect();
        let mut gradient = t.with("Einsum", &inputs, vec![equation]);
        if !summed.is_empty() {
            let kept = t.unsqueeze(gradient, &summed);
            let shape = t.op("Shape", &[*x]);
            gradient = t.op("Expand", &[kept, shape]);
        }
        t.give(*x, gradient);
    }
    Ok(())
}

/// The letters of each operand and of the result, with letters of their own for what an ellipsis stands for.
fn letters(
    t: &Tape<'_>,
    node: &Node,
    operands: &[ValueId],
    y: ValueId,
) -> Result<(Vec<String>, String), String> {
    let equation = node.string("equation").ok_or("it has no equation")?;
    let equation: String = equation.split_whitespace().collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != operands.len() {
        return Err("its equation has another number of operands".to_owned());
    }
    let implicit = || {
        // What stands once, in alphabetical order, behind the ellipsis.
        let count = |c: char| left.chars().filter(|l| *l == c).count();
        let mut once: Vec<char> = left.chars().collect();
        once.retain(|c| c.is_ascii_alphabetic() && count(*c) == 1);
        once.sort_unstable();
        let ellipsis = if left.contains("...") { "..." } else { "" };
        format!("{ellipsis}{}", once.into_iter().collect::<String>())
    };
    let right = right.map_or_else(implicit, str::to_owned);
    let fresh: Vec<char> = ('A'..='Z')
        .chain('a'..='z')
        .filter(|c| !equation.contains(*c))
        .collect();
    let plain = |term: &str, value: ValueId| -> Result<String, String> {
        let axes = t.rank_or_scalar(value);
        let named = term.chars().filter(char::is_ascii_alphabetic).count();
        let more = axes
            .checked_sub(named)
            .ok_or("its equation has too many letters")?;
        // An ellipsis is right-aligned: the last axes of all of them belong together.
        let names = fresh.get(..more).ok_or("it has too many axes")?;
        let names: String = names.iter().rev().collect();
        let term = term.replace("...", &names);
        let mut sorted: Vec<char> = term.chars().collect();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != axes || term.chars().count() != axes {
            return Err("its equation takes a diagonal".to_owned());
        }
        Ok(term)
    };
    let named: Vec<String> = terms
        .iter()
        .zip(operands)
        .map(|(term, value)| plain(term, *value))
        .collect::<Result<_, _>>()?;
    let result = plain(&right, y)?;
    // An extent of one would have been stretched, and its gradient be a sum.
    for (term, value) in named.iter().zip(operands) {
        for (axis, letter) in term.chars().enumerate() {
            let place = result.chars().position(|c| c == letter);
            if place.is_some_and(|p| !t.same_extent((*value, axis), (y, p))) {
                return Err("one of its operands is stretched".to_owned());
            }
        }
    }
    Ok((named, result))
}
