//! One attention, measured: which axis is which, which value is which, and whether the numbers agree.

use ndarray::{ArrayD, IxDyn};

use super::{
    lab::{Lab, Placed, batch_target, difference, fixed, proportion, target},
    product::{ProductAxes, product_axes},
};
use crate::{
    anatomy::{
        attention::{AttentionTrace, ScoreTrace},
        layout::{Layout, Step, Target},
    },
    onnx::ValueId,
};

/// How query heads share key and value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Heads 0..g read the first, and so on: `repeat_interleave`.
    Grouped,
    /// Heads read them in turn: `tile`.
    Interleaved,
}

/// An attention with its hook points placed; what could not be placed carries the reason.
#[derive(Debug)]
pub(super) struct AttentionRead {
    /// `rows, head, query, key`.
    pub(super) pattern: Placed,
    pub(super) scores: Result<Placed, String>,
    /// `rows, pos, kv_head, d_head`.
    pub(super) v: Result<Placed, String>,
    /// `rows, pos, head, d_head`.
    pub(super) z: Result<Placed, String>,
    pub(super) q: Result<Placed, String>,
    pub(super) k: Result<Placed, String>,
    /// What enters the product when it is not `q` itself: after rotation or norm.
    pub(super) rot_q: Option<Placed>,
    pub(super) rot_k: Option<Placed>,
    pub(super) heads: usize,
    pub(super) kv_heads: Option<usize>,
    pub(super) d_head: Option<usize>,
    /// Positions that ask, in every run.
    pub(super) queries: Vec<usize>,
    /// Rows of the attention are windows, not rows of the batch.
    pub(super) windowed: bool,
    /// Nothing looks ahead, in any run.
    pub(super) causal: bool,
    /// Largest distance of a row's sum from one, over rows that see anything.
    pub(super) row_sum_error: f64,
    /// The pattern is a part of the softmax's output: a sink was cut off.
    pub(super) cut: bool,
    /// Distance between pattern times values and z.
    pub(super) mix_error: Option<f64>,
}

/// Reads one attention; an error when not even the pattern can be placed.
pub(super) fn read_attention(lab: &Lab<'_>, a: &AttentionTrace) -> Result<AttentionRead, String> {
    let frame = Frame::of(lab, a)?;
    let pattern = frame.pattern.clone();
    let scores = read_scores(lab, a, &frame);
    let mixed = read_values(lab, a, &frame);
    let asked = match &a.score {
        Ok(score) => read_queries(lab, a, score, &frame),
        Err(why) => Err(why.clone()),
    };
    let (v, z, v_heads, mix_error) = match mixed {
        Ok(m) => (Ok(m.v), Ok(m.z), Some(m.v_heads), Some(m.error)),
        Err(why) => (Err(why.clone()), Err(why), None, None),
    };
    let (q, k, rot_q, rot_k) = match asked {
        Ok(asked) => (asked.q, asked.k, asked.rot_q, asked.rot_k),
        Err(why) => (Err(why.clone()), Err(why), None, None),
    };
    let d_head = z.as_ref().ok().and_then(|z| z.dims()[3]);
    let (row_sum_error, causal) = rows(&pattern);
    let softmax_keys = lab.shapes(a.softmax.output);
    let cut = softmax_keys.is_some_and(|s| {
        s.iter()
            .zip(&pattern.runs)
            .any(|(s, p)| s.iter().product::<usize>() > p.len())
    });
    Ok(AttentionRead {
        scores,
        v,
        z,
        q,
        k,
        rot_q,
        rot_k,
        heads: frame.heads,
        kv_heads: v_heads,
        d_head,
        queries: frame.queries,
        windowed: frame.windowed,
        causal,
        row_sum_error,
        cut,
        mix_error,
        pattern,
    })
}

/// What the pattern's product says about axes.
struct Frame {
    axes: ProductAxes,
    /// Rows of the attention in every run: the batch, or windows of it.
    rows: Vec<usize>,
    heads: usize,
    queries: Vec<usize>,
    keys: Vec<usize>,
    windowed: bool,
    pattern: Placed,
    value: ValueId,
    output: ValueId,
}

impl Frame {
    fn of(lab: &Lab<'_>, a: &AttentionTrace) -> Result<Frame, String> {
        let operand = *a.pattern.last().ok_or("the pattern is no value")?;
        let (value, output) = (a.value[0], a.z[0]);
        let shapes = |v| {
            lab.shapes(v)
                .ok_or_else(|| "the trials did not show it".to_owned())
        };
        let (p, v, o) = (shapes(operand)?, shapes(value), shapes(output)?);
        // The values of a cross-attention may be an input.
        let v_rank = v.map_or(p[0].len(), |v| v[0].len());
        let node = lab.model.graph.node(a.product);
        let axes = if a.pattern_left {
            product_axes(node, p[0].len(), v_rank, o[0].len())
        } else {
            product_axes(node, v_rank, p[0].len(), o[0].len())
        }
        .ok_or("its product with the values sums over no single axis")?;
        let (query, key) = if a.pattern_left {
            (axes.left_free, axes.left_summed)
        } else {
            (axes.right_free, axes.right_summed)
        };
        let along = |axis: usize| -> Vec<usize> { p.iter().map(|s| s[axis]).collect() };
        let (queries, keys) = (along(query), along(key));
        let lead: Vec<usize> = (0..p[0].len())
            .filter(|i| *i != query && *i != key)
            .collect();
        let batches = lab.batches();
        let folded: Vec<usize> = p
            .iter()
            .map(|s| lead.iter().map(|i| s[*i]).product())
            .collect();
        let per_row = constant(&folded, &batches).ok_or(
            "its leading axes do not follow the batch: the attention may run over other axes",
        )?;
        // Rows of windows: the first axis holds several windows of every row, and heads stand apart.
        let windows = match lead[..] {
            [first, _, ..] => constant(&along(first), &batches)
                .filter(|n| *n > 1 && batches.iter().any(|b| *b > 1)),
            _ => None,
        };
        let (rows, heads) = match windows {
            Some(n) => (along(lead[0]), per_row / n),
            None => (batches, per_row),
        };
        let windowed = windows.is_some();
        let targets = [
            batch_target(rows.clone()),
            fixed(heads, rows.len()),
            target(queries.clone()),
            target(keys.clone()),
        ];
        let pattern = lab
            .placements(operand, &targets)
            .into_iter()
            .find(|placed| maps(lab, placed, query, 2) && maps(lab, placed, key, 3))
            .ok_or("its axes cannot be told apart")?;
        Ok(Frame {
            axes,
            rows,
            heads,
            queries,
            keys,
            windowed,
            pattern,
            value,
            output,
        })
    }

    fn rows_target(&self) -> Target {
        batch_target(self.rows.clone())
    }

    fn runs(&self) -> usize {
        self.rows.len()
    }
}

/// `whole[i] / part[i]`, when it is the same everywhere.
fn constant(whole: &[usize], part: &[usize]) -> Option<usize> {
    let mut quotients = whole
        .iter()
        .zip(part)
        .map(|(w, p)| (*p > 0 && w.is_multiple_of(*p)).then(|| w / p));
    let first = quotients.next()??;
    quotients.all(|q| q == Some(first)).then_some(first)
}

/// Whether the layout brings a raw axis to a canonical one whole.
fn maps(lab: &Lab<'_>, placed: &Placed, raw: usize, canonical: usize) -> bool {
    let run = placed.runs.len() - 1;
    let Some(shapes) = lab.shapes(placed.value) else {
        return false;
    };
    let numbered = ArrayD::from_shape_fn(IxDyn(shapes[run]), |i| i[raw] as f32);
    placed
        .layout
        .apply(&numbered, lab.batches()[run])
        .is_some_and(|c| c.indexed_iter().all(|(i, v)| i[canonical] as f32 == *v))
}

// ------------------------------------------------------------------------------------------------ pattern

/// The largest error of a row's sum, and whether nothing looks ahead.
fn rows(pattern: &Placed) -> (f64, bool) {
    let mut error = 0f64;
    let mut causal = true;
    for run in &pattern.runs {
        let [_, _, queries, keys] = run.shape()[..] else {
            return (f64::INFINITY, false);
        };
        for lane in run.lanes(ndarray::Axis(3)) {
            let sum: f64 = lane.iter().map(|x| f64::from(*x)).sum();
            // A row that may look nowhere is guarded to zero.
            if lane.iter().any(|x| *x != 0.0) {
                error = error.max((sum - 1.0).abs());
            }
        }
        causal &= queries > 1
            && keys >= queries
            && run
                .indexed_iter()
                .all(|(i, p)| i[3] <= i[2] + (keys - queries) || *p == 0.0);
    }
    (error, causal)
}

/// The value whose softmax the pattern is.
fn read_scores(lab: &Lab<'_>, a: &AttentionTrace, frame: &Frame) -> Result<Placed, String> {
    let mut candidates = vec![a.softmax.scores];
    if let Ok(score) = &a.score {
        candidates.extend(score.path.iter().rev().filter(|v| **v != a.softmax.scores));
    }
    let targets = [
        frame.rows_target(),
        fixed(frame.heads, frame.runs()),
        target(frame.queries.clone()),
        target(frame.keys.clone()),
    ];
    let wanted = normalised(frame.pattern.compared(), false);
    let mut nearest = f64::INFINITY;
    for value in candidates {
        for placed in lab.placements(value, &targets) {
            let error = unmasked_difference(&normalised(placed.compared(), true), &wanted);
            if error <= lab.tolerance(&[&placed]).0.max(1e-3) {
                return Ok(placed);
            }
            nearest = nearest.min(error);
        }
    }
    Err(if nearest.is_finite() {
        format!("softmax of the scores is off the pattern by {nearest:.1e}")
    } else {
        "its axes cannot be told apart".to_owned()
    })
}

/// Rows normalised to sum one: of scores by softmax, of probabilities by division.
fn normalised(of: &ArrayD<f32>, scores: bool) -> ArrayD<f32> {
    let mut all = of.clone();
    for mut lane in all.lanes_mut(ndarray::Axis(3)) {
        if scores {
            let top = lane.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            lane.mapv_inplace(|x| {
                if top.is_finite() {
                    (x - top).exp()
                } else {
                    0.0
                }
            });
        }
        let sum: f32 = lane.sum();
        if sum > 0.0 {
            lane.mapv_inplace(|x| x / sum);
        }
    }
    all
}

/// Difference over the rows in which the pattern sees anything: where all is masked, a guard may zero the row.
fn unmasked_difference(a: &ArrayD<f32>, pattern: &ArrayD<f32>) -> f64 {
    if a.shape() != pattern.shape() {
        return f64::INFINITY;
    }
    let mut masked = a.clone();
    for (mut x, p) in masked
        .lanes_mut(ndarray::Axis(3))
        .into_iter()
        .zip(pattern.lanes(ndarray::Axis(3)))
    {
        if p.iter().all(|v| *v == 0.0) {
            x.fill(0.0);
        }
    }
    difference(&masked, pattern)
}

// ------------------------------------------------------------------------------------------------ values

struct Mixed {
    v: Placed,
    z: Placed,
    v_heads: usize,
    error: f64,
}

/// Values and z, such that pattern times values is z.
fn read_values(lab: &Lab<'_>, a: &AttentionTrace, frame: &Frame) -> Result<Mixed, String> {
    let (value_free, out_free) = if a.pattern_left {
        (frame.axes.right_free, frame.axes.out_right)
    } else {
        (frame.axes.left_free, frame.axes.out_left)
    };
    let shapes = lab
        .shapes(frame.value)
        .ok_or("the values are an input or a constant")?;
    let widths: Vec<usize> = shapes.iter().map(|s| s[value_free]).collect();
    let d_head = constant(&widths, &vec![1; widths.len()]).ok_or("the width of a head varies")?;
    let heads = heads_of(&shapes, &frame.rows, &frame.keys, d_head)
        .ok_or("the values have no whole number of heads")?;
    let operands: Vec<Placed> = lab
        .placements(
            frame.value,
            &[
                frame.rows_target(),
                target(frame.keys.clone()),
                fixed(heads, frame.runs()),
                fixed(d_head, frame.runs()),
            ],
        )
        .into_iter()
        .filter(|p| maps(lab, p, value_free, 3))
        .collect();
    let z_targets = [
        frame.rows_target(),
        target(frame.queries.clone()),
        fixed(frame.heads, frame.runs()),
        fixed(d_head, frame.runs()),
    ];
    let outputs: Vec<Placed> = lab
        .placements(frame.output, &z_targets)
        .into_iter()
        .filter(|p| maps(lab, p, out_free, 3))
        .collect();
    let mut nearest = f64::INFINITY;
    for operand in &operands {
        for sharing in [Sharing::Grouped, Sharing::Interleaved] {
            let mixed = mix(frame.pattern.compared(), operand.compared(), sharing);
            for z in &outputs {
                let error = difference(&mixed, z.compared());
                nearest = nearest.min(error);
                if error > lab.tolerance(&[operand, z]).0 {
                    continue;
                }
                let (v, v_heads) = unrepeated(lab, a, frame, operand, heads, d_head);
                let error = worst_mix(frame, operand, z, sharing);
                return Ok(Mixed {
                    v,
                    z: z.clone(),
                    v_heads,
                    error,
                });
            }
        }
    }
    Err(if nearest.is_finite() {
        format!("pattern times values is off z by {nearest:.1e}")
    } else {
        "the axes of values and z cannot be told apart".to_owned()
    })
}

fn worst_mix(frame: &Frame, operand: &Placed, z: &Placed, sharing: Sharing) -> f64 {
    frame
        .pattern
        .runs
        .iter()
        .zip(&operand.runs)
        .zip(&z.runs)
        .map(|((p, v), z)| difference(&mix(p, v, sharing), z))
        .fold(0.0, f64::max)
}

/// Heads in a value that holds rows x positions x heads x width.
fn heads_of(
    shapes: &[&[usize]],
    rows: &[usize],
    positions: &[usize],
    width: usize,
) -> Option<usize> {
    let totals: Vec<usize> = shapes.iter().map(|s| s.iter().product()).collect();
    let parts: Vec<usize> = rows
        .iter()
        .zip(positions)
        .map(|(r, p)| r * p * width)
        .collect();
    constant(&totals, &parts).filter(|h| *h > 0)
}

/// Which head of the fewer a head reads.
fn shared(head: usize, heads: usize, fewer: usize, sharing: Sharing) -> usize {
    match sharing {
        Sharing::Grouped => head / (heads / fewer).max(1),
        Sharing::Interleaved => head % fewer,
    }
}

/// `z[r,q,h,d] = sum_k p[r,h,q,k] v[r,k,h',d]`.
fn mix(p: &ArrayD<f32>, v: &ArrayD<f32>, sharing: Sharing) -> ArrayD<f32> {
    let [rows, heads, queries, keys] = p.shape()[..] else {
        return ArrayD::zeros(IxDyn(&[0]));
    };
    let [v_rows, v_keys, fewer, width] = v.shape()[..] else {
        return ArrayD::zeros(IxDyn(&[0]));
    };
    if v_rows != rows || v_keys != keys || fewer == 0 || heads % fewer != 0 {
        return ArrayD::zeros(IxDyn(&[0]));
    }
    let mut z = ArrayD::zeros(IxDyn(&[rows, queries, heads, width]));
    let (Some(p), Some(v)) = (p.as_slice(), v.as_slice()) else {
        return z;
    };
    let out = z.as_slice_mut().expect("a new array is contiguous");
    for r in 0..rows {
        for h in 0..heads {
            let other = shared(h, heads, fewer, sharing);
            for q in 0..queries {
                let to = ((r * queries + q) * heads + h) * width;
                for k in 0..keys {
                    let weight = p[((r * heads + h) * queries + q) * keys + k];
                    let from = ((r * keys + k) * fewer + other) * width;
                    for d in 0..width {
                        out[to + d] += weight * v[from + d];
                    }
                }
            }
        }
    }
    z
}

/// The values before heads were repeated: of the operand's dominators, the nearest with the fewest heads that gives
/// the operand again.
fn unrepeated(
    lab: &Lab<'_>,
    a: &AttentionTrace,
    frame: &Frame,
    operand: &Placed,
    heads: usize,
    d_head: usize,
) -> (Placed, usize) {
    let mut best = (operand.clone(), heads);
    for value in a.value.iter().skip(1) {
        let Some(found) = fewer_heads(lab, *value, frame, operand, (heads, d_head)) else {
            continue;
        };
        if found.1 < best.1 {
            best = found;
        }
    }
    best
}

/// A value as the operand with heads repeated, if it is that.
fn fewer_heads(
    lab: &Lab<'_>,
    value: ValueId,
    frame: &Frame,
    operand: &Placed,
    (heads, d_head): (usize, usize),
) -> Option<(Placed, usize)> {
    let shapes = lab.shapes(value)?;
    let own = heads_of(&shapes, &frame.rows, &frame.keys, d_head)?;
    if own >= heads || !heads.is_multiple_of(own) {
        return None;
    }
    let targets = [
        frame.rows_target(),
        target(frame.keys.clone()),
        fixed(own, frame.runs()),
        fixed(d_head, frame.runs()),
    ];
    lab.placements(value, &targets).into_iter().find_map(|p| {
        [Sharing::Grouped, Sharing::Interleaved]
            .into_iter()
            .any(|s| difference(&repeat(p.compared(), heads, s), operand.compared()) < 1e-6)
            .then_some((p, own))
    })
}

/// `rows, pos, fewer, width` with heads repeated.
fn repeat(of: &ArrayD<f32>, heads: usize, sharing: Sharing) -> ArrayD<f32> {
    let shape = of.shape();
    let fewer = shape[2];
    ArrayD::from_shape_fn(IxDyn(&[shape[0], shape[1], heads, shape[3]]), |i| {
        of[[i[0], i[1], shared(i[2], heads, fewer, sharing), i[3]]]
    })
}

// ------------------------------------------------------------------------------------------------ queries and keys

struct Asked {
    q: Result<Placed, String>,
    k: Result<Placed, String>,
    rot_q: Option<Placed>,
    rot_k: Option<Placed>,
}

/// Queries and keys, such that their product is the raw score.
fn read_queries(
    lab: &Lab<'_>,
    a: &AttentionTrace,
    score: &ScoreTrace,
    frame: &Frame,
) -> Result<Asked, String> {
    let (left, right, out) = (score.left[0], score.right[0], score.path[0]);
    let unseen = || "the trials did not show its operands".to_owned();
    let (l, r, o) = (
        lab.shapes(left).ok_or_else(unseen)?,
        lab.shapes(right).ok_or_else(unseen)?,
        lab.shapes(out).ok_or_else(unseen)?,
    );
    let node = lab.model.graph.node(score.node);
    let axes = product_axes(node, l[0].len(), r[0].len(), o[0].len())
        .ok_or("the product of queries and keys sums over no single axis")?;
    let mut way = score.path.clone();
    way.extend(&a.pattern);
    let (query_axis, key_axis) = if a.pattern_left {
        (frame.axes.left_free, frame.axes.left_summed)
    } else {
        (frame.axes.right_free, frame.axes.right_summed)
    };
    let left_lands = lab.follow(&way, axes.out_left);
    let right_lands = lab.follow(&way, axes.out_right);
    let left_is_query = match (left_lands, right_lands) {
        (Some(l), _) if l == query_axis => true,
        (_, Some(r)) if r == key_axis => true,
        (Some(l), _) if l == key_axis => false,
        (_, Some(r)) if r == query_axis => false,
        _ => return Err("its operands cannot be told apart: axes are lost on the way".to_owned()),
    };
    let (query, key, query_sum, key_sum, out_query, out_key) = if left_is_query {
        (
            &score.left,
            &score.right,
            axes.left_summed,
            axes.right_summed,
            axes.out_left,
            axes.out_right,
        )
    } else {
        (
            &score.right,
            &score.left,
            axes.right_summed,
            axes.left_summed,
            axes.out_right,
            axes.out_left,
        )
    };
    let width = |shapes: Vec<&[usize]>, axis: usize| {
        let widths: Vec<usize> = shapes.iter().map(|s| s[axis]).collect();
        constant(&widths, &vec![1; widths.len()])
    };
    let d = width(lab.shapes(query[0]).ok_or_else(unseen)?, query_sum)
        .ok_or("the width of a head varies")?;
    let place = |value: ValueId, positions: &[usize], axis: usize| -> Vec<Placed> {
        let Some(heads) = lab
            .shapes(value)
            .and_then(|s| heads_of(&s, &frame.rows, positions, d))
        else {
            return Vec::new();
        };
        lab.placements(
            value,
            &[
                frame.rows_target(),
                target(positions.to_vec()),
                fixed(heads, frame.runs()),
                fixed(d, frame.runs()),
            ],
        )
        .into_iter()
        .filter(|p| maps(lab, p, axis, 3))
        .collect()
    };
    let queries = place(query[0], &frame.queries, query_sum);
    let keys = place(key[0], &frame.keys, key_sum);
    let raw: Vec<Placed> = lab
        .placements(
            out,
            &[
                frame.rows_target(),
                fixed(frame.heads, frame.runs()),
                target(frame.queries.clone()),
                target(frame.keys.clone()),
            ],
        )
        .into_iter()
        .filter(|p| maps(lab, p, out_query, 2) && maps(lab, p, out_key, 3))
        .collect();
    let mut nearest = f64::INFINITY;
    for q in &queries {
        for k in &keys {
            for sharing in [Sharing::Grouped, Sharing::Interleaved] {
                let scores = ask(q.compared(), k.compared(), frame.heads, sharing);
                for s in &raw {
                    let factor = gemm_factor(lab, score);
                    let error = difference(&scores.mapv(|x| x * factor), s.compared());
                    nearest = nearest.min(error);
                    if error <= lab.tolerance(&[q, k]).0 {
                        let side = |chain: &[ValueId], operand: &Placed, positions: &[usize]| {
                            before(lab, chain, operand, frame, positions, d)
                        };
                        let (q_own, rot_q) = side(query, q, &frame.queries);
                        let (k_own, rot_k) = side(key, k, &frame.keys);
                        return Ok(Asked {
                            q: Ok(q_own),
                            k: Ok(k_own),
                            rot_q,
                            rot_k,
                        });
                    }
                }
            }
        }
    }
    Err(if nearest.is_finite() {
        format!("queries times keys is off the raw scores by {nearest:.1e}")
    } else {
        "the axes of queries and keys cannot be told apart".to_owned()
    })
}

fn gemm_factor(lab: &Lab<'_>, score: &ScoreTrace) -> f32 {
    lab.model
        .graph
        .node(score.node)
        .float("alpha")
        .unwrap_or(1.0)
}

/// `s[r,h,q,k] = sum_d q[r,q,h',d] k[r,k,h'',d]`.
fn ask(q: &ArrayD<f32>, k: &ArrayD<f32>, heads: usize, sharing: Sharing) -> ArrayD<f32> {
    let ([rows, queries, q_heads, width], [k_rows, keys, k_heads, k_width]) =
        (&q.shape()[..4], &k.shape()[..4])
    else {
        return ArrayD::zeros(IxDyn(&[0]));
    };
    let fits = rows == k_rows
        && width == k_width
        && *q_heads > 0
        && *k_heads > 0
        && heads.is_multiple_of(*q_heads)
        && heads.is_multiple_of(*k_heads);
    if !fits {
        return ArrayD::zeros(IxDyn(&[0]));
    }
    ArrayD::from_shape_fn(IxDyn(&[*rows, heads, *queries, *keys]), |i| {
        let (qh, kh) = (
            shared(i[1], heads, *q_heads, sharing),
            shared(i[1], heads, *k_heads, sharing),
        );
        (0..*width)
            .map(|d| q[[i[0], i[2], qh, d]] * k[[i[0], i[3], kh, d]])
            .sum()
    })
}

/// What the projection gave, and what enters the product when that is something else.
///
/// Of the operand's dominators, those proportional to it (heads repeated, scaled) are the operand in another guise; those
/// further up with as many numbers per position and another content come before a rotation or a norm.
fn before(
    lab: &Lab<'_>,
    chain: &[ValueId],
    operand: &Placed,
    frame: &Frame,
    positions: &[usize],
    width: usize,
) -> (Placed, Option<Placed>) {
    let heads = operand.compared().shape()[2];
    let mut same = operand.clone();
    let mut earlier: Option<Placed> = None;
    for value in chain.iter().skip(1) {
        let Some(own) = lab
            .shapes(*value)
            .and_then(|s| heads_of(&s, &frame.rows, positions, width))
            .filter(|own| heads.is_multiple_of(*own))
        else {
            continue;
        };
        let placed = lab.placements(
            *value,
            &[
                frame.rows_target(),
                target(positions.to_vec()),
                fixed(own, frame.runs()),
                fixed(width, frame.runs()),
            ],
        );
        if earlier.is_none()
            && let Some(p) = placed.iter().find(|p| {
                [Sharing::Grouped, Sharing::Interleaved]
                    .into_iter()
                    .any(|s| {
                        proportion(&repeat(p.compared(), heads, s), operand.compared()).1 < 1e-5
                    })
            })
        {
            same = p.clone();
            continue;
        }
        if own != same.compared().shape()[2] {
            continue;
        }
        let reference = earlier.as_ref().unwrap_or(&same);
        let pick = placed
            .iter()
            .find(|p| difference(p.compared(), reference.compared()) < 1e-6)
            .or_else(|| placed.iter().find(|p| keeps_lengths(p, &same)))
            .or_else(|| placed.iter().find(|p| p.layout == same.layout))
            .or_else(|| placed.iter().find(|p| splits_heads_outside(p)));
        if let Some(p) = pick {
            earlier = Some(p.clone());
        }
    }
    match earlier {
        Some(own) => (own, Some(same)),
        None => (same, None),
    }
}

/// Whether every head vector is as long as in the other: a rotation lies between.
fn keeps_lengths(a: &Placed, b: &Placed) -> bool {
    let lengths = |p: &Placed| p.compared().map_axis(ndarray::Axis(3), |v| v.dot(&v));
    proportion(&lengths(a).into_dyn(), &lengths(b).into_dyn()).1 < 1e-4
}

/// Merged heads stand head by head, as every projection writes them.
fn splits_heads_outside(p: &Placed) -> bool {
    !p.layout
        .steps
        .iter()
        .any(|s| matches!(s, Step::Transpose(perm) if perm.last() != Some(&(perm.len() - 1))))
        || p.layout == Layout::identity()
}
