//! Which axes of the operands of a product mean what.

use crate::onnx::Node;

/// Axes of a product of two operands that sums over one axis of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProductAxes {
    pub(super) left_free: usize,
    pub(super) left_summed: usize,
    pub(super) right_free: usize,
    pub(super) right_summed: usize,
    /// Where the left operand's free axis stands in the result.
    pub(super) out_left: usize,
    /// Where the right operand's free axis stands in the result.
    pub(super) out_right: usize,
}

/// Axes of a `MatMul`, `Gemm` or two-operand `Einsum`, given the ranks of operands and result.
pub(super) fn product_axes(
    node: &Node,
    left: usize,
    right: usize,
    out: usize,
) -> Option<ProductAxes> {
    if node.is("Einsum") {
        return einsum_axes(node.string("equation")?, left, right, out);
    }
    if left < 2 || right < 2 || out < 2 {
        return None;
    }
    let turned = |name: &str| node.int(name).unwrap_or(0) != 0;
    let (left_turned, right_turned) = (turned("transA"), turned("transB"));
    let pair = |rank: usize, turned: bool| {
        if turned {
            (rank - 1, rank - 2)
        } else {
            (rank - 2, rank - 1)
        }
    };
    let (left_free, left_summed) = pair(left, left_turned);
    let (right_summed, right_free) = pair(right, right_turned);
    Some(ProductAxes {
        left_free,
        left_summed,
        right_free,
        right_summed,
        out_left: out - 2,
        out_right: out - 1,
    })
}

fn einsum_axes(equation: &str, left: usize, right: usize, out: usize) -> Option<ProductAxes> {
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let (operands, result) = equation.split_once("->")?;
    let (a, b) = operands.split_once(',')?;
    // Leading axes behind an ellipsis are shared; spell them with letters that equations cannot hold.
    let spell = |text: &str, rank: usize| -> Option<Vec<char>> {
        let named = text.replace("...", "");
        if !text.contains("...") {
            return (named.len() == rank).then(|| named.chars().collect());
        }
        let hidden = rank.checked_sub(named.len())?;
        let digits = (0..hidden).rev().map(|i| char::from_digit(i as u32, 36));
        let at = text.find("...")?;
        let mut all: Vec<char> = named[..at].chars().collect();
        all.extend(digits.collect::<Option<Vec<_>>>()?);
        all.extend(named[at..].chars());
        Some(all)
    };
    let (a, b, c) = (spell(a, left)?, spell(b, right)?, spell(result, out)?);
    let only = |found: Vec<char>| match found[..] {
        [one] => Some(one),
        _ => None,
    };
    let summed = only(
        a.iter()
            .filter(|l| b.contains(l) && !c.contains(l))
            .copied()
            .collect(),
    )?;
    let left_free = only(
        a.iter()
            .filter(|l| !b.contains(l) && c.contains(l))
            .copied()
            .collect(),
    )?;
    let right_free = only(
        b.iter()
            .filter(|l| !a.contains(l) && c.contains(l))
            .copied()
            .collect(),
    )?;
    let at = |letters: &[char], letter: char| letters.iter().position(|l| *l == letter);
    Some(ProductAxes {
        left_free: at(&a, left_free)?,
        left_summed: at(&a, summed)?,
        right_free: at(&b, right_free)?,
        right_summed: at(&b, summed)?,
        out_left: at(&c, left_free)?,
        out_right: at(&c, right_free)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equation_names_its_axes() {
        let axes = einsum_axes("bhqd,bhkd->bhqk", 4, 4, 4).unwrap();
        assert_eq!((axes.left_free, axes.left_summed), (2, 3));
        assert_eq!((axes.right_free, axes.right_summed), (2, 3));
        assert_eq!((axes.out_left, axes.out_right), (2, 3));
    }

    #[test]
    fn heads_may_stand_last() {
        let axes = einsum_axes("ibnd,jbnd->bnij", 4, 4, 4).unwrap();
        assert_eq!((axes.left_free, axes.right_free), (0, 0));
        assert_eq!((axes.out_left, axes.out_right), (2, 3));
    }

    #[test]
    fn an_ellipsis_stands_for_shared_axes() {
        let axes = einsum_axes("...qd,...kd->...qk", 4, 4, 4).unwrap();
        assert_eq!(
            (axes.left_free, axes.right_summed, axes.out_right),
            (2, 3, 3)
        );
    }

    #[test]
    fn sums_over_two_axes_or_none_are_no_attention_product() {
        assert_eq!(einsum_axes("bqhd,bkhd->bqk", 4, 4, 3), None);
        assert_eq!(einsum_axes("bq,bk->bqk", 2, 2, 3), None);
        assert_eq!(einsum_axes("bqd,dk->bqk", 3, 3, 3), None, "ranks must fit");
    }
}
