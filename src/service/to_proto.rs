//! From our values to wire types.

use super::wire::introspect as pb;
use crate::{
    engine::StageTimings,
    ipc::info::{Axis, HookInfo, InputInfo, InputRole, ModelInfo, ValueInfo},
    methods::{
        input::Token,
        predict::{At, Candidate, Prediction},
    },
    model::{ModelState, ModelStatus, Skipped},
    tensor::DType,
};

/// Extent on the wire of an axis that varies.
const VARIES: i64 = -1;

pub(super) const fn dtype(dtype: DType) -> pb::DType {
    match dtype {
        DType::F32 => pb::DType::F32,
        DType::F16 => pb::DType::F16,
        DType::Bf16 => pb::DType::Bf16,
        DType::F64 => pb::DType::F64,
        DType::I8 => pb::DType::I8,
        DType::I16 => pb::DType::I16,
        DType::I32 => pb::DType::I32,
        DType::I64 => pb::DType::I64,
        DType::U8 => pb::DType::U8,
        DType::U16 => pb::DType::U16,
        DType::U32 => pb::DType::U32,
        DType::U64 => pb::DType::U64,
        DType::Bool => pb::DType::Bool,
    }
}

pub(super) fn token(token: Token) -> pb::Token {
    pb::Token {
        id: token.id,
        text: token.text,
        start: token.start,
        end: token.end,
        special: token.special,
        sequence: token.sequence,
        word: token.word,
        type_id: token.type_id,
    }
}

pub(super) fn prediction(prediction: Prediction) -> pb::Prediction {
    let candidate = |c: Candidate| pb::Candidate {
        index: c.index,
        label: c.label,
        logit: c.logit,
        probability: c.probability,
    };
    let at = |at: At| pb::PredictionAt {
        position: at.position,
        candidates: at.candidates.into_iter().map(candidate).collect(),
    };
    pb::Prediction {
        task: prediction.task.name().to_owned(),
        at: prediction.at.into_iter().map(at).collect(),
    }
}

pub(super) fn timings(timings: &StageTimings, total: std::time::Duration) -> pb::Timings {
    pb::Timings {
        tokenize_seconds: timings.tokenize.as_secs_f64(),
        queue_seconds: timings.queue.as_secs_f64(),
        build_seconds: timings.build.as_secs_f64(),
        run_seconds: timings.run.as_secs_f64(),
        reduce_seconds: timings.reduce.as_secs_f64(),
        encode_seconds: timings.encode.as_secs_f64(),
        total_seconds: total.as_secs_f64(),
    }
}

pub(super) fn model_status(status: &ModelStatus) -> pb::ModelStatus {
    let (state, reason) = match &status.state {
        ModelState::Unloaded => (pb::ModelState::Unloaded, ""),
        ModelState::Loading => (pb::ModelState::Loading, ""),
        ModelState::Ready => (pb::ModelState::Ready, ""),
        ModelState::Failed { reason } => (pb::ModelState::Failed, reason.as_str()),
        ModelState::Draining => (pb::ModelState::Draining, ""),
        ModelState::Withdrawn { reason } => (pb::ModelState::Withdrawn, reason.as_str()),
    };
    pb::ModelStatus {
        name: status.name.clone(),
        state: state.into(),
        generation: status.generation,
        reason: reason.to_owned(),
        last_error: status.last_error.clone().unwrap_or_default(),
    }
}

pub(super) fn skipped(skipped: Skipped) -> pb::SkippedFolder {
    pb::SkippedFolder {
        name: skipped.name,
        reason: skipped.reason,
    }
}

pub(super) fn model(info: &ModelInfo, status: pb::ModelStatus) -> pb::Model {
    pb::Model {
        status: Some(status),
        fingerprint: info.fingerprint.clone(),
        task: info.task.name().to_owned(),
        inputs: info.inputs.iter().map(input).collect(),
        outputs: info.outputs.iter().map(value).collect(),
        main_output: info.main_output.clone(),
        labels: info.labels.clone(),
        dims: Some(pb::Dims {
            layers: info.dims.layers as u64,
            heads: wide(info.dims.heads),
            kv_heads: wide(info.dims.kv_heads),
            d_model: wide(info.dims.d_model),
            d_head: wide(info.dims.d_head),
            d_mlp: wide(info.dims.d_mlp),
            vocab: wide(info.dims.vocab),
        }),
        hooks: info.hooks.iter().map(hook).collect(),
        missing: info
            .missing
            .iter()
            .map(|m| pb::MissingHook {
                hook: m.hook.clone(),
                reason: m.reason.clone(),
            })
            .collect(),
        certificate: Some(certificate(info)),
        tokenizer: info.tokenizer.as_ref().map(|t| pb::Tokenizer {
            vocab: t.vocab as u64,
            max_tokens: t.max_tokens as u64,
            pad_id: t.pad_id,
            mask_id: t.mask_id,
            unk_id: t.unk_id,
            special_ids: t.special_ids.clone(),
        }),
        pads: info.pads,
        fixed_batch: wide(info.fixed_batch),
        fixed_length: wide(info.fixed_length),
        max_tokens: wide(info.max_tokens),
        producer: info.producer.clone(),
        opset: info.opset,
        runtime: info.runtime.clone(),
        provider: info.provider.clone(),
        notes: info.notes.clone(),
        load_stages: info
            .load
            .iter()
            .map(|s| pb::LoadStage {
                name: s.name.clone(),
                seconds: std::time::Duration::from_millis(s.millis).as_secs_f64(),
            })
            .collect(),
        picture: info.picture.clone(),
    }
}

fn certificate(info: &ModelInfo) -> pb::Certificate {
    let checks = &info.certificate.checks;
    pb::Certificate {
        // Nothing checked is nothing certified.
        passed: !checks.is_empty() && info.certificate.failed().next().is_none(),
        checks: checks
            .iter()
            .map(|c| pb::Check {
                name: c.name.clone(),
                subject: c.subject.clone(),
                passed: c.passed,
                measured: c.measured,
                tolerance: c.tolerance,
                tolerance_name: c.tolerance_name.clone(),
            })
            .collect(),
    }
}

fn input(input: &InputInfo) -> pb::ModelInput {
    let role = match input.role {
        InputRole::TokenIds => pb::InputRole::TokenIds,
        InputRole::AttentionMask => pb::InputRole::AttentionMask,
        InputRole::TypeIds => pb::InputRole::TypeIds,
        InputRole::PositionIds => pb::InputRole::PositionIds,
        InputRole::Pixels => pb::InputRole::Pixels,
        InputRole::Past => pb::InputRole::Past,
        InputRole::Other => pb::InputRole::Unspecified,
    };
    pb::ModelInput {
        name: input.name.clone(),
        dtype: dtype(input.dtype).into(),
        dims: dims(&input.dims),
        axes: axes(&input.axes),
        role: role.into(),
    }
}

fn value(value: &ValueInfo) -> pb::Value {
    pb::Value {
        name: value.name.clone(),
        dtype: dtype(value.dtype).into(),
        axes: axes(&value.axes),
        dims: dims(&value.dims),
    }
}

fn hook(hook: &HookInfo) -> pb::HookPoint {
    pb::HookPoint {
        name: hook.name.clone(),
        aliases: hook.aliases.clone(),
        layer: hook.layer.and_then(|l| u32::try_from(l).ok()),
        value: hook.value.clone(),
        axes: axes(&hook.axes),
        dims: dims(&hook.dims),
        dtype: dtype(hook.dtype).into(),
    }
}

pub(super) fn axes(axes: &[Axis]) -> Vec<String> {
    axes.iter().map(|a| a.name().to_owned()).collect()
}

pub(super) fn dims(dims: &[Option<usize>]) -> Vec<i64> {
    dims.iter()
        .map(|d| d.and_then(|d| i64::try_from(d).ok()).unwrap_or(VARIES))
        .collect()
}

fn wide(n: Option<usize>) -> Option<u64> {
    n.map(|n| n as u64)
}
