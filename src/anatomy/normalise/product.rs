//! Matrix products with a transpose, a factor, a bias or an activation fused in.

use super::{
    activation,
    emit::{Emit, Needs},
};
use crate::onnx::{Attribute, Node, ValueId};

/// `FusedMatMul` and its older name `TransposeMatMul`: `alpha A B`, each operand transposed as its flags say.
pub(super) fn fused_matmul(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let alpha = node.float("alpha").unwrap_or(1.0);
    let dtype = e.dtype(node.need(0)?)?;
    let left = operand(e, node, 0, "transBatchA", "transA")?;
    let right = operand(e, node, 1, "transBatchB", "transB")?;
    let made = e.wanted(node, 0);
    if alpha == 1.0 {
        e.end(made, "MatMul", &[left, right]);
        return Ok(());
    }
    let product = e.op("MatMul", &[left, right]);
    let alpha = e.number(alpha, dtype);
    e.end(made, "Mul", &[product, alpha]);
    Ok(())
}

/// An operand after its transposes. The batch flag moves the first axis behind the batch axes; then the other one
/// swaps the last two. Vectors are not transposed.
fn operand(
    e: &mut Emit<'_>,
    node: &Node,
    slot: usize,
    batch: &str,
    last: &str,
) -> Result<ValueId, String> {
    let value = node.need(slot)?;
    let set = |name| node.int(name).unwrap_or(0) != 0;
    if !set(batch) && !set(last) {
        return Ok(value);
    }
    let rank = e.rank(value)?;
    if rank < 2 {
        return Ok(value);
    }
    let mut perm: Vec<i64> = (0..rank as i64).collect();
    if set(batch) {
        perm[..rank - 1].rotate_left(1);
    }
    if set(last) {
        perm.swap(rank - 2, rank - 1);
    }
    Ok(e.transpose(value, &perm))
}

/// `FusedGemm`: `Gemm` and an activation.
pub(super) fn fused_gemm(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let name = node.string("activation").unwrap_or_default();
    // The activation's own attributes, under the names that it has as an operator.
    let own: &[(&str, &str)] = match name {
        "Relu" | "Tanh" | "Sigmoid" | "Softplus" | "Softsign" => &[],
        "LeakyRelu" | "Elu" | "ThresholdedRelu" => &[("activation_alpha", "alpha")],
        "HardSigmoid" => &[("activation_alpha", "alpha"), ("activation_beta", "beta")],
        "Selu" => &[("activation_alpha", "alpha"), ("activation_gamma", "gamma")],
        other => {
            return Err(format!(
                "its activation \"{other}\" is no standard operator"
            ));
        }
    };
    let attributes = ["transA", "transB"]
        .into_iter()
        .filter_map(|a| Some(Attribute::int(a, node.int(a)?)))
        .chain(
            ["alpha", "beta"]
                .into_iter()
                .filter_map(|a| Some(Attribute::float(a, node.float(a)?))),
        )
        .collect();
    let product = e.make(None, "Gemm", &node.inputs, attributes);
    let own = own
        .iter()
        .filter_map(|(from, to)| Some(Attribute::float(to, node.float(from)?)))
        .collect();
    let made = e.wanted(node, 0);
    e.make(made, name, &[Some(product)], own);
    Ok(())
}

/// `GemmFastGelu`: a product, a bias, the fast Gelu.
pub(super) fn gemm_fast_gelu(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (x, weight) = (node.need(0)?, node.need(1)?);
    let dtype = e.dtype(weight).or_else(|_| e.dtype(x))?;
    let mut product = e.op("MatMul", &[x, weight]);
    if let Some(bias) = node.input(2) {
        product = e.op("Add", &[product, bias]);
    }
    activation::write_fast_gelu(e, e.wanted(node, 0), product, dtype);
    Ok(())
}

/// `BiasAdd`: `x + bias + skip`.
pub(super) fn bias_add(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (x, bias, skip) = (node.need(0)?, node.need(1)?, node.need(2)?);
    let projected = e.op("Add", &[x, bias]);
    let made = e.wanted(node, 0);
    e.end(made, "Add", &[projected, skip]);
    Ok(())
}
