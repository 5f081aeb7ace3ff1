//! A model as a page of text.

use std::fmt::Write as _;

use crate::{
    cli::{
        models::state_name,
        out::{self, Paint, clean},
    },
    service::wire::introspect::{Check, HookPoint, InputRole, MissingHook, Model},
};

/// Everything, the important first.
pub(super) fn page(model: &Model) -> String {
    let paint = Paint::of_stdout();
    let mut text = String::new();
    head(&mut text, model, paint);
    heading(&mut text, paint, "Inputs and outputs");
    text.push_str(&ports(model));
    heading(&mut text, paint, "Anatomy");
    text.push_str(clean(&model.picture).trim_end());
    text.push('\n');
    heading(
        &mut text,
        paint,
        &format!("Hook points ({})", model.hooks.len()),
    );
    text.push_str(&hooks(model));
    if !model.missing.is_empty() {
        heading(&mut text, paint, "Missing");
        text.push_str(&missing(&model.missing));
    }
    if let Some(certificate) = &model.certificate {
        let held = certificate.checks.iter().filter(|c| c.passed).count();
        let title = format!(
            "Certificate: {held} of {} checks held",
            certificate.checks.len()
        );
        heading(&mut text, paint, &title);
        text.push_str(&checks(&certificate.checks, paint));
    }
    if !model.notes.is_empty() {
        heading(&mut text, paint, "Notes");
        for note in &model.notes {
            let _ = writeln!(text, " - {}", clean(note));
        }
    }
    heading(&mut text, paint, "Load");
    text.push_str(&out::table(
        &["stage", "time"],
        model
            .load_stages
            .iter()
            .map(|s| vec![s.name.clone(), out::seconds(s.seconds)]),
    ));
    text
}

fn heading(text: &mut String, paint: Paint, title: &str) {
    let _ = writeln!(text, "\n{}", paint.bold(title));
}

fn head(text: &mut String, model: &Model, paint: Paint) {
    let status = model.status.clone().unwrap_or_default();
    let _ = writeln!(
        text,
        "{}  {}, generation {}",
        paint.bold(&clean(&status.name)),
        state_name(status.state()),
        status.generation
    );
    let mut fact = |name: &str, value: String| {
        let _ = writeln!(text, "  {:<12} {}", name, clean(&value));
    };
    fact("task", model.task.clone());
    if !model.labels.is_empty() {
        fact("labels", some(&model.labels, 12));
    }
    fact("sizes", sizes(model));
    fact("main output", model.main_output.clone());
    if let Some(tokenizer) = &model.tokenizer {
        fact(
            "tokenizer",
            format!(
                "{} tokens, at most {} of an input",
                tokenizer.vocab, tokenizer.max_tokens
            ),
        );
    } else {
        fact("tokenizer", "none: give token ids or tensors".into());
    }
    let batching = match (model.fixed_batch, model.fixed_length, model.pads) {
        (Some(n), Some(l), _) => format!("the file fixes a batch of {n} and a length of {l}"),
        (Some(n), None, _) => format!("the file fixes a batch of {n}"),
        (None, Some(l), _) => format!("the file fixes a length of {l}"),
        (None, None, true) => "inputs of different length share runs".into(),
        (None, None, false) => "inputs of equal length share runs".into(),
    };
    fact("batching", batching);
    fact("file", format!("opset {}, {}", model.opset, model.producer));
    fact(
        "runs on",
        format!("ONNX Runtime {}, {}", model.runtime, model.provider),
    );
    fact("fingerprint", model.fingerprint.clone());
}

fn some(all: &[String], most: usize) -> String {
    let mut text = all[..all.len().min(most)].join(", ");
    if all.len() > most {
        let _ = write!(text, ", ... ({} in all)", all.len());
    }
    text
}

fn sizes(model: &Model) -> String {
    let dims = model.dims.unwrap_or_default();
    let mut parts = vec![format!("{} layers", dims.layers)];
    for (name, value) in [
        ("heads", dims.heads),
        (
            "key and value heads",
            dims.kv_heads.filter(|n| Some(*n) != dims.heads),
        ),
        ("d_model", dims.d_model),
        ("d_head", dims.d_head),
        ("d_mlp", dims.d_mlp),
        ("vocabulary", dims.vocab),
    ] {
        if let Some(n) = value {
            parts.push(format!("{name} {n}"));
        }
    }
    parts.join(", ")
}

fn ports(model: &Model) -> String {
    let inputs = model.inputs.iter().map(|i| {
        vec![
            "input".to_owned(),
            i.name.clone(),
            dtype(i.dtype),
            extents(&i.dims, &i.axes),
            role(i.role()).to_owned(),
        ]
    });
    let outputs = model.outputs.iter().map(|o| {
        vec![
            "output".to_owned(),
            o.name.clone(),
            dtype(o.dtype),
            extents(&o.dims, &o.axes),
            String::new(),
        ]
    });
    out::table(
        &["", "name", "type", "shape", "role"],
        inputs.chain(outputs),
    )
}

fn role(role: InputRole) -> &'static str {
    match role {
        InputRole::Unspecified => "must be given as a tensor",
        InputRole::TokenIds => "token ids",
        InputRole::AttentionMask => "attention mask",
        InputRole::TypeIds => "segments",
        InputRole::PositionIds => "positions",
        InputRole::Pixels => "pixels",
        InputRole::Past => "past, may be empty",
    }
}

pub(super) fn dtype(number: i32) -> String {
    u32::try_from(number)
        .ok()
        .and_then(|n| crate::tensor::DType::try_from(n).ok())
        .map_or("?".to_owned(), |d| d.to_string())
}

/// Extents where they are fixed, the name of the axis where they vary.
fn extents(dims: &[i64], axes: &[String]) -> String {
    let parts: Vec<String> = dims
        .iter()
        .enumerate()
        .map(|(i, d)| match (axes.get(i), *d) {
            (Some(axis), n) if n < 0 => axis.clone(),
            (None, n) if n < 0 => "?".into(),
            (Some(axis), n) => format!("{axis} {n}"),
            (None, n) => n.to_string(),
        })
        .collect();
    format!("[{}]", parts.join(", "))
}

/// Hook points that differ in their layer alone, as one.
#[derive(PartialEq)]
struct Family {
    name: String,
    aliases: String,
    extents: String,
    dtype: String,
}

/// The table of hook points, a line for each kind.
fn hooks(model: &Model) -> String {
    let mut families: Vec<(Family, Vec<u32>)> = Vec::new();
    for hook in &model.hooks {
        let family = family(hook);
        let place = families.iter_mut().find(|(f, _)| *f == family);
        match (place, hook.layer) {
            (Some((_, layers)), Some(layer)) => layers.push(layer),
            _ => families.push((family, hook.layer.into_iter().collect())),
        }
    }
    out::table(
        &["name", "also", "layers", "shape", "type"],
        families
            .into_iter()
            .map(|(f, layers)| vec![f.name, f.aliases, ranges(&layers), f.extents, f.dtype]),
    )
}

fn family(hook: &HookPoint) -> Family {
    let general = |name: &str| match hook.layer {
        Some(layer) => without_layer(name, layer),
        None => name.to_owned(),
    };
    let aliases: Vec<String> = hook.aliases.iter().map(|a| general(a)).collect();
    Family {
        name: general(&hook.name),
        aliases: aliases.join(", "),
        extents: extents(&hook.dims, &hook.axes),
        dtype: dtype(hook.dtype),
    }
}

/// The first number between dots that is the layer (or, for hidden states, the one after it) as a letter.
fn without_layer(name: &str, layer: u32) -> String {
    let mut done = false;
    name.split('.')
        .map(|part| match part.parse::<u32>() {
            Ok(n) if !done && n == layer => {
                done = true;
                "L".to_owned()
            }
            Ok(n) if !done && layer.checked_add(1) == Some(n) => {
                done = true;
                "L+1".to_owned()
            }
            Ok(_) | Err(_) => part.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(".")
}

/// `0-3, 5` for 0, 1, 2, 3, 5.
fn ranges(numbers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for n in numbers {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*n) => *last = *n,
            _ => runs.push((*n, *n)),
        }
    }
    let text: Vec<String> = runs
        .iter()
        .map(|(a, b)| {
            if a == b {
                a.to_string()
            } else {
                format!("{a}-{b}")
            }
        })
        .collect();
    text.join(", ")
}

/// Every hook point with all its names.
pub(super) fn every_hook(model: &Model) -> String {
    out::table(
        &["name", "also", "value in the file", "shape", "type"],
        model.hooks.iter().map(|h| {
            vec![
                h.name.clone(),
                h.aliases.join(", "),
                h.value.clone(),
                extents(&h.dims, &h.axes),
                dtype(h.dtype),
            ]
        }),
    )
}

fn missing(missing: &[MissingHook]) -> String {
    out::table(
        &["hook point", "why"],
        missing
            .iter()
            .map(|m| vec![m.hook.clone(), m.reason.clone()]),
    )
}

/// The checks, those that failed first, those that held by their name with the worst of them.
fn checks(checks: &[Check], paint: Paint) -> String {
    let mut text = String::new();
    let failed: Vec<&Check> = checks.iter().filter(|c| !c.passed).collect();
    if !failed.is_empty() {
        let _ = writeln!(
            text,
            "{}",
            paint.bad("failed; the hook points concerned are withdrawn:")
        );
        let heading = ["check", "subject", "measured", "allowed"];
        text.push_str(&out::table(
            &heading,
            failed.iter().map(|c| {
                vec![
                    c.name.clone(),
                    c.subject.clone(),
                    format!("{:.1e}", c.measured),
                    allowed(c),
                ]
            }),
        ));
    }
    let mut worst: Vec<(&Check, usize)> = Vec::new();
    for check in checks.iter().filter(|c| c.passed) {
        let kind = worst
            .iter_mut()
            .find(|(w, _)| w.name == check.name && w.tolerance_name == check.tolerance_name);
        match kind {
            Some((w, count)) => {
                *count += 1;
                if check.measured > w.measured {
                    *w = check;
                }
            }
            None => worst.push((check, 1)),
        }
    }
    if !worst.is_empty() {
        let heading = ["check", "held", "worst", "at", "allowed"];
        text.push_str(&out::table(
            &heading,
            worst.iter().map(|(c, count)| {
                vec![
                    c.name.clone(),
                    count.to_string(),
                    format!("{:.1e}", c.measured),
                    c.subject.clone(),
                    allowed(c),
                ]
            }),
        ));
    }
    text
}

fn allowed(c: &Check) -> String {
    format!("{} ({:.0e})", c.tolerance_name, c.tolerance)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(name: &str, aliases: &[&str], layer: Option<u32>) -> HookPoint {
        HookPoint {
            name: name.into(),
            aliases: aliases.iter().map(|a| (*a).to_owned()).collect(),
            layer,
            ..Default::default()
        }
    }

    #[test]
    fn hook_points_of_all_layers_are_one_line() {
        let layer = |l: u32| {
            hook(
                &format!("blocks.{l}.hook_resid_post"),
                &[
                    &format!("hidden_states.{}", l + 1),
                    &format!("resid_post.{l}"),
                ],
                Some(l),
            )
        };
        let model = Model {
            hooks: vec![hook("hook_embed", &[], None), layer(0), layer(1), layer(3)],
            ..Default::default()
        };
        let text = hooks(&model);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("blocks.L.hook_resid_post"), "{text}");
        assert!(text.contains("hidden_states.L+1, resid_post.L"), "{text}");
        assert!(text.contains("0-1, 3"), "{text}");
    }

    #[test]
    fn a_failed_check_stands_on_its_own_line_and_held_ones_together() {
        let check = |subject: &str, passed, measured| Check {
            name: "pattern rows sum to one".into(),
            subject: subject.into(),
            passed,
            measured,
            tolerance: 1e-4,
            tolerance_name: "Rewritten".into(),
        };
        let all = [
            check("a", true, 1e-7),
            check("b", true, 3e-6),
            check("c", false, 0.5),
        ];
        let text = checks(&all, Paint::of_stdout());
        assert!(text.contains("5.0e-1"), "{text}");
        let held = text.lines().last().unwrap();
        assert!(
            held.contains(" 2 ") && held.contains("3.0e-6") && held.contains(" b "),
            "{text}"
        );
    }

    #[test]
    fn varying_extents_show_their_meaning() {
        let axes = ["batch", "pos", "d_model"].map(String::from);
        assert_eq!(extents(&[-1, -1, 128], &axes), "[batch, pos, d_model 128]");
        assert_eq!(extents(&[-1, 3], &[]), "[?, 3]");
    }
}
