//! Operators that stay as they are, with the reason. Nothing here is guessed at: an operator that has no entry is
//! named too.

use crate::onnx::Node;

const PACKED: &str = "it reads rows packed without padding, whose scores have no batch axis";
const STEP: &str = "it makes one step of decoding over a cache";
const SPARSE: &str = "it attends to a window or to blocks, so no full pattern exists";
const QUANTISED_ATTENTION: &str =
    "it attends in integer arithmetic, which standard operators do not repeat";
const QUANTISED: &str = "its weights are quantised, and standard operators would need them in full";
const RECURRENT: &str = "it keeps a recurrent state and has no attention pattern";
const LOOP: &str = "it runs a whole loop of decoding";
const EXPERTS: &str = "it routes tokens to experts inside one operator";
const UNCHECKED: &str =
    "ONNX Runtime has no CPU kernel that the standard operators could be checked against";
const LAYOUT: &str = "it works on a blocked memory layout of one processor: save the model at a lower optimisation level";
const CONVOLUTION: &str =
    "it is a convolution with its activation, and no part of a transformer block";

/// Operators with a reason of their own.
const REASONS: &[(&str, &[&str])] = &[
    (
        PACKED,
        &[
            "PackedAttention",
            "PackedMultiHeadAttention",
            "PagedAttention",
            "RemovePadding",
            "RestorePadding",
            "GatherPacked",
        ],
    ),
    (
        STEP,
        &[
            "DecoderMaskedMultiHeadAttention",
            "DecoderMaskedSelfAttention",
            "DecoderAttention",
        ],
    ),
    (
        SPARSE,
        &[
            "LongformerAttention",
            "SparseAttention",
            "SparsePagedAttention",
            "DynamicSparseAttention",
        ],
    ),
    (
        QUANTISED_ATTENTION,
        &[
            "QAttention",
            "QOrderedAttention",
            "QOrderedLongformerAttention",
            "QEmbedLayerNormalization",
        ],
    ),
    (
        QUANTISED,
        &[
            "MatMulNBits",
            "MatMulBnb4",
            "MatMulFpQ4",
            "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat",
            "QGemm",
            "QLinearAdd",
            "QLinearMul",
            "QLinearConcat",
            "QLinearSoftmax",
            "QLinearSigmoid",
            "QLinearReduceMean",
            "QOrderedMatMul",
            "QOrderedGelu",
            "QOrderedLayerNormalization",
            "QuantizeLinear",
            "DequantizeLinear",
            "GatherBlockQuantized",
            "MatMulInteger16",
            "MatMulNBitsMlp",
            "MatMulNBitsQkv",
            "MatMulNBitsQLoRA",
        ],
    ),
    (
        RECURRENT,
        &[
            "LinearAttention",
            "LinearAttentionGate",
            "GatedDeltaNet",
            "CausalConvWithState",
            "AttnLSTM",
            "DynamicQuantizeLSTM",
        ],
    ),
    (
        LOOP,
        &[
            "BeamSearch",
            "GreedySearch",
            "Sampling",
            "WhisperBeamSearch",
        ],
    ),
    (EXPERTS, &["MoE", "QMoE", "MoEPacked"]),
    (
        UNCHECKED,
        &[
            "BiasSoftmax",
            "RelativePositionBias",
            "GatedRelativePositionBias",
            "SwiGLU",
            "FusedMatMulActivation",
            "GemmaRotaryEmbedding",
            "RMSNormRotary",
            "GatedRMSNorm",
        ],
    ),
    (CONVOLUTION, &["FusedConv", "NhwcFusedConv", "NhwcConv"]),
];

/// Why a node of another domain than the standard one stays.
pub(super) fn reason(node: &Node) -> String {
    if matches!(
        node.domain.as_str(),
        "com.microsoft.nchwc" | "com.ms.internal.nhwc"
    ) {
        return LAYOUT.to_owned();
    }
    let known = REASONS
        .iter()
        .find(|(_, ops)| node.domain == super::RUNTIME_DOMAIN && ops.contains(&node.op.as_str()));
    match known {
        Some((why, _)) => (*why).to_owned(),
        None => format!(
            "no rule is known for the operator \"{}\" of the domain \"{}\"",
            node.op, node.domain
        ),
    }
}
