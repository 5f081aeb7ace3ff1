//! A small model for the engine's own tests, described only: three layers, 4 heads, text in, two labels out.

use crate::{
    ipc::info::{
        Axis, Certificate, Dims, HookInfo, InputInfo, InputRole, ModelInfo, Task, ValueInfo,
    },
    tensor::DType,
};

fn input(name: &str, role: InputRole) -> InputInfo {
    InputInfo {
        name: name.into(),
        dtype: DType::I64,
        dims: vec![None, None],
        axes: vec![Axis::Batch, Axis::Pos],
        role,
    }
}

fn hook(name: &str, layer: Option<usize>, axes: &[Axis], dims: &[Option<usize>]) -> HookInfo {
    HookInfo {
        name: name.into(),
        aliases: Vec::new(),
        layer,
        value: format!("/{name}"),
        axes: axes.to_vec(),
        dims: dims.to_vec(),
        dtype: DType::F32,
    }
}

/// What the worker would say of it.
pub(crate) fn info() -> ModelInfo {
    let wide = [Axis::Batch, Axis::Pos, Axis::DModel];
    let width = [None, None, Some(16)];
    let mut hooks = vec![
        hook("hook_embed", None, &wide, &width),
        hook("hook_embed_out", None, &wide, &width),
    ];
    for layer in 0..3 {
        for point in ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"] {
            hooks.push(hook(
                &format!("blocks.{layer}.{point}"),
                Some(layer),
                &wide,
                &width,
            ));
        }
        for point in ["attn.hook_pattern", "attn.hook_q"] {
            let axes = [Axis::Batch, Axis::Head, Axis::Query, Axis::Key];
            hooks.push(hook(
                &format!("blocks.{layer}.{point}"),
                Some(layer),
                &axes,
                &[None, Some(4), None, None],
            ));
        }
    }
    ModelInfo {
        name: "small".into(),
        fingerprint: "00".into(),
        task: Task::SequenceClassification,
        inputs: vec![
            input("input_ids", InputRole::TokenIds),
            input("attention_mask", InputRole::AttentionMask),
        ],
        outputs: vec![ValueInfo {
            name: "logits".into(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Label],
            dims: vec![None, Some(2)],
        }],
        main_output: "logits".into(),
        labels: vec!["negative".into(), "positive".into()],
        dims: Dims {
            layers: 3,
            heads: Some(4),
            vocab: Some(100),
            ..Dims::default()
        },
        hooks,
        missing: Vec::new(),
        certificate: Certificate::default(),
        tokenizer: None,
        pads: true,
        fixed_batch: None,
        rows_interact: false,
        fixed_length: None,
        max_tokens: Some(512),
        producer: "test".into(),
        opset: 17,
        notes: Vec::new(),
        runtime: "none".into(),
        provider: "cpu".into(),
        load: Vec::new(),
        picture: String::new(),
    }
}
