//! From structure and measurements to hook points.
//!
//! Nothing is reported that the trials did not confirm: a pattern is placed when its product says which axis is which,
//! values when pattern times values is z, scores when their softmax is the pattern, queries and keys when their product is
//! the raw score, a final norm when it is one. What fails is left out, with the reason.

mod aliases;
mod attention;
mod head;
mod lab;
mod positions;
mod product;
mod stream;

use attention::{AttentionRead, read_attention};
use lab::{Lab, Placed};
use stream::{Streamed, norm_along, stream, sum_error};

use super::{
    certificate,
    hooks::{Anatomy, HookPoint},
    inputs::InputTrace,
    layers::LayerTrace,
    picture,
    trace::Trace,
    trials::Trials,
};
use crate::{
    ipc::info::{Axis, Check, Dims, InputRole, Missing},
    onnx::{Dim, Model, ValueId},
};

/// Reads the anatomy of a model off its structure and its trials.
pub fn read(model: &Model, trace: &Trace, trials: &Trials) -> Anatomy {
    let lab = Lab {
        model,
        trace,
        trials,
    };
    let attentions: Vec<Result<AttentionRead, String>> = trace
        .attentions
        .iter()
        .map(|a| read_attention(&lab, a))
        .collect();
    let mut found = Found::default();
    let mut dims = Dims {
        layers: trace.layers.len(),
        vocab: trace.vocabulary,
        ..Dims::default()
    };
    let by_layer = positions(trace, &attentions);
    // Positions that hold for all of the stream.
    let positions = match by_layer.split_first() {
        Some((Some(first), rest)) if rest.iter().all(|p| p.as_ref() == Some(first)) => {
            Some(first.clone())
        }
        _ => None,
    };
    for (at, layer) in trace.layers.iter().enumerate() {
        read_layer(
            &lab,
            &mut found,
            &mut dims,
            &LayerView {
                at,
                layer,
                positions: by_layer[at].as_deref(),
                attention: layer.attention.map(|i| &attentions[i]),
                cross: layer.cross.as_ref().map(|c| &attentions[c.attention]),
            },
        );
    }
    read_ends(
        &lab,
        &mut found,
        &mut dims,
        by_layer.last().and_then(Option::as_deref),
    );
    aliases::hugging_face(&lab, &mut found, &attentions);
    aliases::short_forms(&mut found);
    let causal = !attentions.is_empty()
        && trace
            .layers
            .iter()
            .filter_map(|l| l.attention)
            .all(|i| attentions[i].as_ref().is_ok_and(|a| a.causal));
    let outputs = head::outputs(&lab, &dims, positions.as_deref());
    let task = head::task(&lab, &outputs, &dims, causal);
    head::logits(&lab, &mut found, &outputs, task);
    let pads = head::pads(&lab, &found, &outputs);
    head::named_outputs(&lab, &mut found);
    for rejected in &trace.rejected {
        found.notes.push(format!(
            "the softmax \"{}\" is no attention of a layer: {}",
            model.graph.name(rejected.softmax),
            rejected.reason
        ));
    }
    if let Some(softmax) = trace.interrupted {
        found.lack(
            &format!("blocks.{}.hook_resid_pre", trace.layers.len()),
            &format!(
                "the attention around \"{}\" lies in no residual block, so the layers from there on cannot be told apart \
                 and numbered",
                model.graph.name(softmax)
            ),
        );
    } else if trace.layers.is_empty() {
        found.lack(
            "blocks.0.attn.hook_pattern",
            if trace.start.is_none() {
                "no input selects rows of a table or flows to an output as data"
            } else if trace.rejected.is_empty() {
                "no softmax lies on the way from the input to the output"
            } else {
                "no softmax on the way to the output is an attention within a residual block"
            },
        );
    }
    let only = |sizes: Vec<usize>, two: bool| {
        let first = *sizes.first()?;
        (two && sizes.iter().all(|n| *n == first)).then_some(first)
    };
    let mut inputs = trace.inputs.clone();
    for input in inputs.iter_mut().filter(|i| i.past) {
        for (axis, extent) in [(1, dims.kv_heads), (3, dims.d_head)] {
            if let Some(dim @ (Dim::Named(_) | Dim::Unknown)) = input.dims.get_mut(axis)
                && let Some(extent) = extent.and_then(|n| i64::try_from(n).ok())
            {
                *dim = Dim::Fixed(extent);
            }
        }
    }
    note_another_sequence(&mut found, &inputs);
    let inverted = trials.plan.mask_of_tokens == 0;
    if inverted {
        for input in inputs
            .iter_mut()
            .filter(|i| i.role == InputRole::AttentionMask)
        {
            input.role = InputRole::Other;
            found.notes.push(format!(
                "\"{}\" marks padding, not tokens: it must be given, 0 for tokens",
                input.name
            ));
        }
    }
    let rows_interact = model
        .graph
        .nodes()
        .any(|(_, n)| n.op.starts_with("DynamicQuantize"));
    if rows_interact {
        found.notes.push(
            "rows of a run share the range that they are quantised by, so each request runs by itself"
                .to_owned(),
        );
    }
    let mut anatomy = Anatomy {
        task,
        rows_interact,
        fixed_batch: only(trials.batches(), true),
        fixed_length: only(
            trials.lengths(),
            trace.inputs.iter().any(|i| i.role == InputRole::TokenIds),
        ),
        inputs,
        outputs,
        main_output: trace.output,
        dims,
        hooks: found.hooks,
        missing: found.missing,
        checks: found.checks,
        pads: pads && !inverted,
        notes: found.notes,
        picture: String::new(),
    };
    anatomy.picture = picture::picture(model, trace, &anatomy);
    anatomy
}

/// What reading has gathered so far.
#[derive(Default)]
struct Found {
    hooks: Vec<HookPoint>,
    missing: Vec<Missing>,
    checks: Vec<Check>,
    notes: Vec<String>,
}

impl Found {
    fn lack(&mut self, hook: &str, reason: &str) {
        self.missing.push(Missing {
            hook: hook.to_owned(),
            reason: reason.to_owned(),
        });
    }

    fn add(&mut self, name: String, layer: Option<usize>, placed: &Placed, axes: Vec<Axis>) {
        if self.hooks.iter().any(|h| h.name == name) {
            return;
        }
        self.hooks.push(HookPoint {
            name,
            aliases: Vec::new(),
            layer,
            value: placed.value,
            layout: placed.layout.clone(),
            dims: placed.dims(),
            axes,
            dtype: placed.dtype,
        });
    }

    fn add_streamed(
        &mut self,
        name: String,
        layer: Option<usize>,
        found: Result<Streamed, String>,
    ) -> Option<Placed> {
        match found {
            Ok(s) => {
                self.add(name, layer, &s.placed, s.axes);
                Some(s.placed)
            }
            Err(reason) => {
                self.lack(&name, &reason);
                None
            }
        }
    }

    fn add_placed(
        &mut self,
        name: String,
        layer: usize,
        found: &Result<Placed, String>,
        axes: &[Axis],
    ) {
        match found {
            Ok(placed) => self.add(name, Some(layer), placed, axes.to_vec()),
            Err(reason) => self.lack(&name, reason),
        }
    }

    fn alias(&mut self, name: &str, alias: String) {
        if let Some(hook) = self.hooks.iter_mut().find(|h| h.name == name) {
            hook.aliases.push(alias);
        }
    }

    /// Takes a hook point back: its check failed.
    fn withdraw(&mut self, name: &str, reason: &str) {
        let before = self.hooks.len();
        self.hooks.retain(|h| h.name != name);
        if self.hooks.len() < before {
            self.lack(name, reason);
        }
    }

    /// Notes a check; a failed one withdraws the hook points that it is about.
    fn check(&mut self, check: Check, about: &[String]) {
        if !check.passed {
            let reason = format!(
                "the check \"{}\" failed on {}: {:.1e} where {:.1e} is allowed",
                check.name, check.subject, check.measured, check.tolerance
            );
            for hook in about {
                self.withdraw(hook, &reason);
            }
        }
        self.checks.push(check);
    }
}

/// Says which inputs hold another sequence than the tokens.
fn note_another_sequence(found: &mut Found, inputs: &[InputTrace]) {
    let apart = inputs.iter().filter(|i| i.apart);
    let names: Vec<String> = apart.map(|i| format!("\"{}\"", i.name)).collect();
    let tokens = inputs.iter().find(|i| i.role == InputRole::TokenIds);
    if let (Some(tokens), false) = (tokens, names.is_empty()) {
        found.notes.push(format!(
            "tokens are those of \"{}\"; what belongs to another sequence must be given as tensors, with the tokens as one too: {}",
            tokens.name,
            names.join(", ")
        ));
    }
}

/// Positions of the stream at each layer, in every run: what its attention asks from, unless that runs in windows; for
/// layers without attention what all others agree on.
fn positions(
    trace: &Trace,
    attentions: &[Result<AttentionRead, String>],
) -> Vec<Option<Vec<usize>>> {
    let read = |l: &LayerTrace| attentions[l.attention?].as_ref().ok();
    let mut known: Vec<&[usize]> = trace
        .layers
        .iter()
        .filter_map(|l| read(l).map(|a| &a.queries[..]))
        .collect();
    known.dedup();
    let windowed = trace
        .layers
        .iter()
        .any(|l| read(l).is_some_and(|a| a.windowed));
    trace
        .layers
        .iter()
        .map(|l| match (read(l), &known[..]) {
            (Some(a), _) if !a.windowed && !windowed => Some(a.queries.clone()),
            (None, [all]) if !windowed => Some(all.to_vec()),
            _ => None,
        })
        .collect()
}

struct LayerView<'a> {
    at: usize,
    layer: &'a LayerTrace,
    positions: Option<&'a [usize]>,
    attention: Option<&'a Result<AttentionRead, String>>,
    cross: Option<&'a Result<AttentionRead, String>>,
}

fn read_layer(lab: &Lab<'_>, found: &mut Found, dims: &mut Dims, view: &LayerView<'_>) {
    let l = view.at;
    let name = |inside: &str| format!("blocks.{l}.{inside}");
    let positions = view.positions;
    let see = |value: ValueId| stream(lab, value, positions, Axis::DModel);

    let pre = found.add_streamed(name("hook_resid_pre"), Some(l), see(view.layer.start));
    if dims.d_model.is_none() {
        dims.d_model = pre
            .as_ref()
            .and_then(|p| p.dims().last().copied().flatten());
    }
    match view.attention {
        Some(Ok(a)) => add_attention(lab, found, dims, l, "attn", a),
        Some(Err(reason)) => found.lack(&name("attn.hook_pattern"), reason),
        None => found.lack(
            &name("attn.hook_pattern"),
            "the layer mixes positions without a softmax",
        ),
    }
    match view.cross {
        Some(Ok(a)) => add_attention(lab, found, dims, l, "cross_attn", a),
        Some(Err(reason)) => found.lack(&name("cross_attn.hook_pattern"), reason),
        None => {}
    }

    let attention_out = match &view.layer.attention_out {
        Some(Ok(v)) => found.add_streamed(name("hook_attn_out"), Some(l), see(*v)),
        Some(Err(reason)) => {
            found.lack(&name("hook_attn_out"), reason);
            None
        }
        None => None,
    };
    let crossed = match &view.layer.cross {
        Some(cross) => {
            let out = match &cross.out {
                Ok(v) => see(*v),
                Err(reason) => Err(reason.clone()),
            };
            let out = found.add_streamed(name("hook_cross_attn_out"), Some(l), out);
            let end = match &view.layer.mlp_block {
                Some(_) => see(cross.block.end),
                None => Err("the layer has no perceptron behind an attention".to_owned()),
            };
            let mid = found.add_streamed(name("hook_resid_mid_cross"), Some(l), end);
            out.map(|out| (out, mid))
        }
        None => None,
    };
    let behind = view.layer.mlp_block.is_some() || view.layer.cross.is_some();
    let mid = match &view.layer.attention_block {
        Some(a) if behind && !view.layer.parallel => {
            found.add_streamed(name("hook_resid_mid"), Some(l), see(a.end))
        }
        _ => {
            let reason = match &view.layer.attention_out {
                _ if view.layer.parallel => {
                    "attention and perceptron read the same stream and are added at once"
                }
                Some(Err(reason)) => reason,
                Some(Ok(_)) | None => "the layer has no perceptron behind an attention",
            };
            found.lack(&name("hook_resid_mid"), reason);
            None
        }
    };
    let mlp_out = match &view.layer.mlp {
        Ok(mlp) => {
            for (hook, value) in [("pre", Some(mlp.pre)), ("pre_linear", mlp.pre_linear)] {
                if let Some(value) = value {
                    let seen = stream(lab, value, positions, Axis::DMlp);
                    found.add_streamed(name(&format!("mlp.hook_{hook}")), Some(l), seen);
                }
            }
            let post = mlp
                .post
                .iter()
                .rev()
                .map(|v| stream(lab, *v, positions, Axis::DMlp))
                .find(Result::is_ok)
                .unwrap_or_else(|| Err("its axes cannot be told apart".to_owned()));
            if dims.d_mlp.is_none() {
                dims.d_mlp = post
                    .as_ref()
                    .ok()
                    .and_then(|p| p.placed.dims().last().copied().flatten());
            }
            found.add_streamed(name("mlp.hook_post"), Some(l), post);
            found.add_streamed(name("hook_mlp_out"), Some(l), see(mlp.out))
        }
        Err(reason) => {
            for hook in ["mlp.hook_pre", "mlp.hook_post"] {
                found.lack(&name(hook), reason);
            }
            match &view.layer.mlp_block {
                Some(block) if block.branches.len() == 1 && view.layer.perceptrons < 2 => {
                    found.add_streamed(name("hook_mlp_out"), Some(l), see(block.branches[0]))
                }
                _ => {
                    found.lack(&name("hook_mlp_out"), reason);
                    None
                }
            }
        }
    };
    let post = found.add_streamed(name("hook_resid_post"), Some(l), see(view.layer.end));
    check_sums(
        lab,
        found,
        view,
        &[&pre, &attention_out, &mid, &mlp_out, &post],
        crossed.as_ref(),
    );
}

/// `resid_pre + attn_out = resid_mid`, `resid_mid + cross_attn_out = resid_mid_cross` and `resid_mid + mlp_out = resid_post`, where the
/// architecture has them.
fn check_sums(
    lab: &Lab<'_>,
    found: &mut Found,
    view: &LayerView<'_>,
    placed: &[&Option<Placed>; 5],
    crossed: Option<&(Placed, Option<Placed>)>,
) {
    let l = view.at;
    let name = |inside: &str| format!("blocks.{l}.{inside}");
    let [pre, attention_out, mid, mlp_out, post] = placed;
    let scaled = |block: Option<&super::blocks::Block>| {
        block.is_some_and(|b| {
            let (Some(start), Some(skip)) = (lab.arrays(b.start), lab.arrays(b.skip)) else {
                return true;
            };
            start.iter().zip(&skip).any(|(a, b)| {
                a.len() == b.len()
                    && a.iter()
                        .zip(b)
                        .any(|(x, y)| (x - y).abs() > 1e-3 * y.abs().max(1.0))
            })
        })
    };
    let mut sum = |what: &str, parts: &[&Placed], total: &Placed, about: &[String]| {
        let (tolerance, named) = lab.tolerance(parts);
        found.check(
            certificate::within(
                what,
                sum_error(parts, total),
                tolerance,
                named,
                &format!("blocks.{l}"),
            ),
            about,
        );
    };
    if let (Some((out, mid)), Some(cross)) = (crossed, &view.layer.cross)
        && let Some(total) = mid
            .as_ref()
            .or(post.as_ref().filter(|_| view.layer.mlp_block.is_none()))
        && !scaled(Some(&cross.block))
        && let Ok(start) = stream(lab, cross.block.start, view.positions, Axis::DModel)
    {
        sum(
            certificate::RESID_MID_CROSS,
            &[&start.placed, out],
            total,
            &[name("hook_cross_attn_out")],
        );
    }
    if view.layer.parallel {
        if let (Some(pre), Some(a), Some(m), Some(post)) = (pre, attention_out, mlp_out, post)
            && !scaled(view.layer.attention_block.as_ref())
        {
            sum(
                certificate::RESID_PARALLEL,
                &[pre, a, m],
                post,
                &[name("hook_attn_out"), name("hook_mlp_out")],
            );
        }
        return;
    }
    let starts_here = view
        .layer
        .attention_block
        .as_ref()
        .is_some_and(|b| b.start == view.layer.start);
    if let (Some(pre), Some(a)) = (pre, attention_out)
        && starts_here
        && let Some(total) = mid
            .as_ref()
            .or(post.as_ref().filter(|_| view.layer.mlp_block.is_none()))
        && !scaled(view.layer.attention_block.as_ref())
    {
        sum(
            certificate::RESID_MID,
            &[pre, a],
            total,
            &[name("hook_attn_out")],
        );
    }
    if let (Some(m), Some(post), Some(block)) = (mlp_out, post, &view.layer.mlp_block)
        && block.end == view.layer.end
        && !scaled(view.layer.mlp_block.as_ref())
        && let Ok(start) = stream(lab, block.start, view.positions, Axis::DModel)
    {
        sum(
            certificate::RESID_POST,
            &[&start.placed, m],
            post,
            &[name("hook_mlp_out")],
        );
    }
}

fn add_attention(
    lab: &Lab<'_>,
    found: &mut Found,
    dims: &mut Dims,
    l: usize,
    part: &str,
    a: &AttentionRead,
) {
    let name = |inside: &str| format!("blocks.{l}.{part}.hook_{inside}");
    let rows = if a.windowed {
        Axis::Other("window".to_owned())
    } else {
        Axis::Batch
    };
    // Positions of another sequence are not those of the tokens: no padding of ours lengthens them.
    let keys = |own: Axis| match part {
        "attn" => own,
        _ => Axis::Other("source".to_owned()),
    };
    let square = [rows.clone(), Axis::Head, Axis::Query, keys(Axis::Key)];
    let kv = match a.kv_heads {
        Some(n) if n < a.heads => Axis::KvHead,
        _ => Axis::Head,
    };
    let per_head = [rows.clone(), Axis::Pos, Axis::Head, Axis::DHead];
    let k_heads = |p: &Placed| match p.dims()[2] {
        Some(n) if n < a.heads => Axis::KvHead,
        _ => Axis::Head,
    };
    found.add_placed(name("pattern"), l, &Ok(a.pattern.clone()), &square);
    found.add_placed(name("attn_scores"), l, &a.scores, &square);
    found.add_placed(name("q"), l, &a.q, &per_head);
    let k_axes = a.k.as_ref().map_or(per_head.to_vec(), |k| {
        vec![rows.clone(), keys(Axis::Pos), k_heads(k), Axis::DHead]
    });
    found.add_placed(name("k"), l, &a.k, &k_axes);
    found.add_placed(
        name("v"),
        l,
        &a.v,
        &[rows.clone(), keys(Axis::Pos), kv, Axis::DHead],
    );
    found.add_placed(name("z"), l, &a.z, &per_head);
    for (inside, placed, pos) in [
        ("rot_q", &a.rot_q, Axis::Pos),
        ("rot_k", &a.rot_k, keys(Axis::Pos)),
    ] {
        if let Some(placed) = placed {
            let axes = vec![rows.clone(), pos, k_heads(placed), Axis::DHead];
            found.add(name(inside), Some(l), placed, axes);
        }
    }
    if part == "attn" {
        dims.heads = dims.heads.or(Some(a.heads));
        dims.kv_heads = dims.kv_heads.or(a.kv_heads);
        dims.d_head = dims.d_head.or(a.d_head);
    }
    let subject = format!("blocks.{l}.{part}");
    let (tolerance, named) = lab.tolerance(&[&a.pattern]);
    if a.cut {
        found.notes.push(format!(
            "the rows of {} sum to less than one: a part of the softmax's output is cut off (a sink)",
            name("pattern")
        ));
    } else {
        found.check(
            certificate::within(
                certificate::ROWS,
                a.row_sum_error,
                tolerance,
                named,
                &subject,
            ),
            &[name("pattern")],
        );
    }
    if let Some(error) = a.mix_error {
        found.check(
            certificate::within(certificate::MIX, error, tolerance, named, &subject),
            &[name("v"), name("z")],
        );
    }
}

/// Embedding, what follows the last layer, and the aliases that depend on it.
fn read_ends(lab: &Lab<'_>, found: &mut Found, dims: &mut Dims, positions: Option<&[usize]>) {
    let trace = lab.trace;
    let ids = trace.inputs.iter().any(|i| i.role == InputRole::TokenIds);
    if let Some(embed) = trace.embed {
        let lengths = lab.trials.lengths();
        let positions = if ids { Some(&lengths[..]) } else { positions };
        let seen = stream(lab, embed, positions, Axis::DModel);
        found.add_streamed("hook_embed".to_owned(), None, seen);
        let added = positions.and_then(|positions| positions::embedding(lab, positions));
        let added = added.ok_or_else(|| {
            "nothing that depends on the position alone is added to the tokens before the first layer"
                .to_owned()
        });
        found.add_streamed("hook_pos_embed".to_owned(), None, added);
    }
    let Some(last) = trace.layers.last() else {
        return;
    };
    found.alias("blocks.0.hook_resid_pre", "hook_embed_out".to_owned());
    let see = |value: ValueId| stream(lab, value, positions, Axis::DModel);
    let Ok(end) = see(last.end) else {
        return;
    };
    if dims.d_model.is_none() {
        dims.d_model = end.placed.dims().last().copied().flatten();
    }
    // A norm behind the sum of every layer: TransformerLens reports the sum, Hugging Face what the norm makes of it.
    let mut normalises = false;
    for (at, layer) in trace.layers.iter().enumerate() {
        if let Some(next) = leaves(trace, at)
            && next != layer.end
            && let (Ok(sum), Ok(normed)) = (see(layer.end), see(next))
            && stream::is_norm_of_layer(&sum.placed, &normed.placed)
        {
            normalises = true;
            found.add(
                format!("blocks.{at}.hook_normalized_resid_post"),
                Some(at),
                &normed.placed,
                normed.axes,
            );
        }
    }
    if normalises {
        found.lack(
            "ln_final.hook_normalized",
            "every layer normalises its own output; see hook_normalized_resid_post",
        );
        return;
    }
    // Something else that every layer ends with belongs to all of them.
    if trace.between_layers > 0 {
        end_behind(found, trace, see);
    }
    let way = trace
        .tail
        .get(trace.between_layers + 1..)
        .unwrap_or_default();
    let all: Vec<usize> = positions.map(<[usize]>::to_vec).unwrap_or_default();
    if trace.interrupted.is_some() {
        found.lack("ln_final.hook_normalized", "the last layer was not found");
        return;
    }
    match norm_along(lab, &end.placed, way, &all) {
        Some((_, norm)) => found.add(
            "ln_final.hook_normalized".to_owned(),
            None,
            &norm.placed,
            norm.axes,
        ),
        None => found.lack(
            "ln_final.hook_normalized",
            "no norm of the last layer's output follows it",
        ),
    }
}

/// Moves `hook_resid_post` of every layer behind what the layer makes of its sum: of all or of none.
fn end_behind(found: &mut Found, trace: &Trace, see: impl Fn(ValueId) -> Result<Streamed, String>) {
    let ends: Option<Vec<Streamed>> = (0..trace.layers.len())
        .map(|at| see(leaves(trace, at)?).ok())
        .collect();
    for (at, end) in ends.into_iter().flatten().enumerate() {
        let name = format!("blocks.{at}.hook_resid_post");
        if let Some(hook) = found.hooks.iter_mut().find(|h| h.name == name) {
            hook.value = end.placed.value;
            hook.layout = end.placed.layout.clone();
            hook.dims = end.placed.dims();
            hook.dtype = end.placed.dtype;
            hook.axes = end.axes;
        }
        // These were about the sum.
        let sums = [certificate::RESID_POST, certificate::RESID_PARALLEL];
        let subject = format!("blocks.{at}");
        found
            .checks
            .retain(|c| !sums.contains(&c.name.as_str()) || c.subject != subject);
    }
}

/// What leaves a layer: the sum, or what every layer makes of it before the next one begins.
fn leaves(trace: &Trace, at: usize) -> Option<ValueId> {
    if trace.between_layers == 0 {
        return trace.layers.get(at).map(|l| l.end);
    }
    match trace.layers.get(at + 1) {
        Some(next) => Some(next.start),
        None => trace.tail.get(trace.between_layers).copied(),
    }
}
