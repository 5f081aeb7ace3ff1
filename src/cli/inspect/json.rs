//! A model as JSON, under the names of `introspect.v1.Model`.

use serde_json::{Value, json};

use super::page::dtype;
use crate::{
    cli::models::status,
    service::wire::introspect::{Check, HookPoint, InputRole, Model},
};

/// Everything.
pub(super) fn model(m: &Model) -> Value {
    let dims = m.dims.unwrap_or_default();
    json!({
        "status": m.status.as_ref().map(status),
        "fingerprint": m.fingerprint,
        "task": m.task,
        "inputs": m.inputs.iter().map(|i| json!({
            "name": i.name, "dtype": dtype(i.dtype), "dims": i.dims, "axes": i.axes,
            "role": role(i.role()),
        })).collect::<Vec<_>>(),
        "outputs": m.outputs.iter().map(|o| json!({
            "name": o.name, "dtype": dtype(o.dtype), "dims": o.dims, "axes": o.axes,
        })).collect::<Vec<_>>(),
        "main_output": m.main_output,
        "labels": m.labels,
        "dims": {
            "layers": dims.layers, "heads": dims.heads, "kv_heads": dims.kv_heads,
            "d_model": dims.d_model, "d_head": dims.d_head, "d_mlp": dims.d_mlp,
            "vocab": dims.vocab,
        },
        "hooks": m.hooks.iter().map(hook).collect::<Vec<_>>(),
        "missing": m.missing.iter()
            .map(|x| json!({ "hook": x.hook, "reason": x.reason }))
            .collect::<Vec<_>>(),
        "certificate": m.certificate.as_ref().map(|c| json!({
            "passed": c.passed,
            "checks": c.checks.iter().map(check).collect::<Vec<_>>(),
        })),
        "tokenizer": m.tokenizer.as_ref().map(|t| json!({
            "vocab": t.vocab, "max_tokens": t.max_tokens, "pad_id": t.pad_id,
            "mask_id": t.mask_id, "unk_id": t.unk_id, "special_ids": t.special_ids,
        })),
        "pads": m.pads,
        "fixed_batch": m.fixed_batch,
        "fixed_length": m.fixed_length,
        "max_tokens": m.max_tokens,
        "producer": m.producer,
        "opset": m.opset,
        "runtime": m.runtime,
        "provider": m.provider,
        "notes": m.notes,
        "load_stages": m.load_stages.iter()
            .map(|s| json!({ "name": s.name, "seconds": s.seconds }))
            .collect::<Vec<_>>(),
        "picture": m.picture,
    })
}

fn hook(h: &HookPoint) -> Value {
    json!({
        "name": h.name, "aliases": h.aliases, "layer": h.layer, "value": h.value,
        "axes": h.axes, "dims": h.dims, "dtype": dtype(h.dtype),
    })
}

fn check(c: &Check) -> Value {
    json!({
        "name": c.name, "subject": c.subject, "passed": c.passed, "measured": c.measured,
        "tolerance": c.tolerance, "tolerance_name": c.tolerance_name,
    })
}

fn role(role: InputRole) -> &'static str {
    match role {
        InputRole::Unspecified => "other",
        InputRole::TokenIds => "token_ids",
        InputRole::AttentionMask => "attention_mask",
        InputRole::TypeIds => "type_ids",
        InputRole::PositionIds => "position_ids",
        InputRole::Pixels => "pixels",
        InputRole::Past => "past",
    }
}
