//! Rotary positions: each pair of a head's coordinates turns by an angle that grows with the position.
//!
//! ```text
//!   x ─┬─────────────────────────▶ Mul(cos) ─┐
//!      └▶ turn: (a, b) -> (-b, a) ▶ Mul(sin) ─┴▶ Add
//! ```
//! Pairs are halves of a head apart, or neighbours (`interleaved`). A table narrower than half a head leaves the rest of
//! the head as it is.

use super::emit::{Emit, Needs};
use crate::{
    onnx::{END, Node, ValueId},
    tensor::DType,
};

/// A table of cosines or sines has a row per position and a column per pair.
pub(super) struct Tables {
    pub(super) cos: ValueId,
    pub(super) sin: ValueId,
    pub(super) interleaved: bool,
}

impl Tables {
    /// Width of what turns.
    pub(super) fn width(&self, e: &Emit<'_>) -> Result<i64, String> {
        let pairs = e.fact(self.cos).last.or(e.fact(self.sin).last);
        pairs
            .map(|n| 2 * n)
            .ok_or_else(|| format!("the width of \"{}\" is not known", e.name(self.cos)))
    }

    /// Rows of both tables for these positions, wide as what turns. The axis that heads broadcast over is added at `axis`.
    pub(super) fn rows(&self, e: &mut Emit<'_>, positions: ValueId, axis: i64) -> Angles {
        let mut row = |table| {
            let row = e.gather(table, positions);
            let row = e.unsqueeze(row, &[axis]);
            if self.interleaved {
                pair_up(e, row, row)
            } else {
                e.concat(&[row, row], -1)
            }
        };
        Angles {
            cos: row(self.cos),
            sin: row(self.sin),
            interleaved: self.interleaved,
        }
    }
}

/// Cosine and sine of every coordinate.
pub(super) struct Angles {
    cos: ValueId,
    sin: ValueId,
    interleaved: bool,
}

/// Turns the first `width` coordinates of the last axis. `whole`: there are no others. `x` has four axes.
pub(super) fn rotate(
    e: &mut Emit<'_>,
    x: ValueId,
    angles: &Angles,
    width: i64,
    whole: bool,
) -> ValueId {
    let part = if whole { x } else { e.slice(x, -1, 0, width) };
    let turned = if angles.interleaved {
        let (first, second) = (e.every_second(part, 0), e.every_second(part, 1));
        let second = e.op("Neg", &[second]);
        pair_up(e, second, first)
    } else {
        let first = e.slice(part, -1, 0, width / 2);
        let second = e.slice(part, -1, width / 2, END);
        let second = e.op("Neg", &[second]);
        e.concat(&[second, first], -1)
    };
    let straight = e.op("Mul", &[part, angles.cos]);
    let across = e.op("Mul", &[turned, angles.sin]);
    let rotated = e.op("Add", &[straight, across]);
    if whole {
        return rotated;
    }
    let rest = e.slice(x, -1, width, END);
    e.concat(&[rotated, rest], -1)
}

/// `a0, b0, a1, b1, ..` along the last of four axes.
fn pair_up(e: &mut Emit<'_>, a: ValueId, b: ValueId) -> ValueId {
    let pair = [a, b].map(|x| e.unsqueeze(x, &[4]));
    let pairs = e.concat(&pair, 4);
    e.reshape(pairs, &[0, 0, 0, -1])
}

/// `com.microsoft.RotaryEmbedding`.
pub(super) fn embedding(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (x, positions) = (node.need(0)?, node.need(1)?);
    if node.int("is_packed_batching").unwrap_or(0) != 0 {
        return Err("its rows are packed without padding".to_owned());
    }
    if node.float("scale").is_some_and(|s| s != 1.0) {
        return Err("its attribute \"scale\" is one that the CPU kernel does not heed".to_owned());
    }
    let tables = Tables {
        cos: node.need(2)?,
        sin: node.need(3)?,
        interleaved: node.int("interleaved").unwrap_or(0) != 0,
    };
    let width = tables.width(e)?;
    let partial = node.int("rotary_embedding_dim").unwrap_or(0) > 0;
    let folded = match e.rank(x)? {
        3 => true,
        4 => false,
        rank => return Err(format!("its input has {rank} axes, neither three nor four")),
    };
    // (batch, position), or (1, position) from the first position on.
    let positions = match e.rank(positions)? {
        1 => {
            let length = e.extent(x, if folded { 1 } else { 2 });
            let count = e.range(length);
            let wide = e.cast(positions, DType::I64);
            let places = e.op("Add", &[count, wide]);
            e.unsqueeze(places, &[0])
        }
        _ => positions,
    };
    let made = e.wanted(node, 0);
    if folded {
        let heads = if partial {
            e.reshape(x, &[0, 0, super::scores::heads(node, "num_heads")?, -1])
        } else {
            e.reshape(x, &[0, 0, -1, width])
        };
        let angles = tables.rows(e, positions, 2);
        let rotated = rotate(e, heads, &angles, width, !partial);
        e.reshape_to(made, rotated, &[0, 0, -1]);
    } else {
        let angles = tables.rows(e, positions, 1);
        let rotated = rotate(e, x, &angles, width, !partial);
        e.alias(made, rotated);
    }
    Ok(())
}
