//! A model as the worker would describe it, for the tests of this folder.

use crate::{
    ipc::info::{
        Axis, Certificate, Dims, HookInfo, InputInfo, InputRole, Missing, ModelInfo, Task,
        ValueInfo,
    },
    tensor::DType,
};

fn hook(name: String, alias: String, layer: Option<usize>, axes: Vec<Axis>) -> HookInfo {
    HookInfo {
        value: format!("/{name}"),
        dims: axes
            .iter()
            .map(|a| (*a == Axis::Head).then_some(4))
            .collect(),
        aliases: vec![alias],
        dtype: DType::F32,
        name,
        layer,
        axes,
    }
}

/// Two layers of four heads in parallel blocks, a classifier of three labels.
pub(crate) fn info() -> ModelInfo {
    let stream = || vec![Axis::Batch, Axis::Pos, Axis::DModel];
    let pattern = || vec![Axis::Batch, Axis::Head, Axis::Query, Axis::Key];
    let mut hooks = vec![hook("hook_embed".into(), "embed".into(), None, stream())];
    for l in 0..2 {
        let attention = format!("blocks.{l}.attn.hook_pattern");
        hooks.push(hook(
            attention,
            format!("attentions.{l}"),
            Some(l),
            pattern(),
        ));
        let post = format!("blocks.{l}.hook_resid_post");
        hooks.push(hook(
            post,
            format!("hidden_states.{}", l + 1),
            Some(l),
            stream(),
        ));
    }
    ModelInfo {
        name: "small".into(),
        fingerprint: "00".into(),
        task: Task::SequenceClassification,
        inputs: vec![InputInfo {
            name: "input_ids".into(),
            dtype: DType::I64,
            dims: vec![None, None],
            axes: vec![Axis::Batch, Axis::Pos],
            role: InputRole::TokenIds,
        }],
        outputs: vec![ValueInfo {
            name: "logits".into(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Label],
            dims: vec![None, Some(3)],
        }],
        main_output: "logits".into(),
        labels: Vec::new(),
        dims: Dims {
            layers: 2,
            heads: Some(4),
            vocab: Some(100),
            ..Dims::default()
        },
        hooks,
        missing: vec![Missing {
            hook: "blocks.*.hook_resid_mid".into(),
            reason: "attention and MLP are parallel".into(),
        }],
        certificate: Certificate::default(),
        tokenizer: None,
        pads: false,
        fixed_batch: None,
        rows_interact: false,
        fixed_length: None,
        max_tokens: None,
        producer: String::new(),
        opset: 17,
        notes: Vec::new(),
        runtime: String::new(),
        provider: "cpu".into(),
        load: Vec::new(),
        picture: String::new(),
    }
}
