//! Weights shared by every session of a model: mapped once, packed once.
//!
//! The recipe, measured on ONNX Runtime 1.32 (BERT-base: the first session takes 705 MB, each further one 18 MB): the graph is
//! given from memory with its large weights as references into the model's own file, the session is told the model's folder, every
//! such weight is handed over by `with_initializer` as a view of the mapped file, and all sessions share one `PrepackedWeights`.
//!
//! The one place of this module tree with `unsafe`.
#![allow(unsafe_code)]

use std::{collections::HashMap, ptr::NonNull, sync::Arc};

use bytes::Bytes;
use half::{bf16, f16};
use ort::{
    AsPointer as _,
    memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType},
    session::builder::PrepackedWeights,
    value::{DynValue, PrimitiveTensorElementType, Shape, TensorRefMut},
};

use crate::{
    onnx::{Graph, Weights as Encoding},
    tensor::{DType, Tensor},
};

/// Smallest weight that is worth sharing; smaller ones are copied into each graph.
const SHARED_FROM: usize = 4096;

/// How graphs are encoded so that their large weights are shared.
pub(super) const ENCODING: Encoding = Encoding::ByReference {
    from_bytes: SHARED_FROM,
};

/// The weights of one model, as the runtime takes them.
pub(super) struct SharedWeights {
    values: HashMap<String, Arc<DynValue>>,
    packed: PrepackedWeights,
    /// Keeps the mapped files alive. Declared after `values`, so dropped after them.
    _files: Vec<Bytes>,
}

impl SharedWeights {
    /// Wraps every weight of the graph that its encoding refers to.
    pub(super) fn new(graph: &Graph) -> ort::Result<Self> {
        let (mut values, mut files) = (HashMap::new(), Vec::new());
        for (name, weight) in graph.initializers() {
            let Some(tensor) = weight.tensor().filter(|_| ENCODING.refers(weight)) else {
                continue;
            };
            if let Some(value) = view(&tensor)? {
                values.insert(name.to_owned(), Arc::new(value));
                files.push(tensor.into_bytes());
            }
        }
        Ok(Self {
            values,
            packed: PrepackedWeights::new(),
            _files: files,
        })
    }

    /// The weights of a graph that shares this model's, by name.
    pub(super) fn of(&self, graph: &Graph) -> impl Iterator<Item = (String, Arc<DynValue>)> {
        graph
            .initializers()
            .filter(|(_, weight)| ENCODING.refers(weight))
            .filter_map(|(name, _)| Some((name.to_owned(), self.values.get(name)?.clone())))
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// What the sessions packed.
    pub(super) fn packed(&self) -> &PrepackedWeights {
        &self.packed
    }
}

/// A tensor of the runtime over bytes that it does not own.
fn view(tensor: &Tensor) -> ort::Result<Option<DynValue>> {
    match tensor.dtype() {
        DType::F32 => typed::<f32>(tensor),
        DType::F16 => typed::<f16>(tensor),
        DType::Bf16 => typed::<bf16>(tensor),
        DType::F64 => typed::<f64>(tensor),
        DType::I8 => typed::<i8>(tensor),
        DType::I16 => typed::<i16>(tensor),
        DType::I32 => typed::<i32>(tensor),
        DType::I64 => typed::<i64>(tensor),
        DType::U8 => typed::<u8>(tensor),
        DType::U16 => typed::<u16>(tensor),
        DType::U32 => typed::<u32>(tensor),
        DType::U64 => typed::<u64>(tensor),
        DType::Bool => typed::<bool>(tensor),
    }
}

fn typed<T: PrimitiveTensorElementType + std::fmt::Debug + 'static>(
    tensor: &Tensor,
) -> ort::Result<Option<DynValue>> {
    let info = MemoryInfo::new(
        AllocationDevice::CPU,
        0,
        AllocatorType::Device,
        MemoryType::Default,
    )?;
    let shape = Shape::new(tensor.shape().iter().map(|d| *d as i64));
    let data = tensor.bytes().as_ptr().cast_mut().cast();
    // SAFETY: the pointer is valid for the tensor's bytes (an invariant of `Tensor`), which `SharedWeights` keeps alive longer than the value. The
    // runtime only reads initializers, as it does with the files that it maps itself.
    let borrowed: TensorRefMut<'static, T> = unsafe { TensorRefMut::from_raw(info, data, shape)? };
    let Some(pointer) = NonNull::new(borrowed.ptr().cast_mut()) else {
        return Ok(None);
    };
    // A borrowed tensor cannot be shared, an owned value can; the handle passes from one to the other. What is forgotten
    // is the small Rust-side record of the borrowed tensor, once per weight.
    std::mem::forget(borrowed);
    // SAFETY: the pointer is a live handle that nothing else releases any more.
    Ok(Some(unsafe { DynValue::from_ptr(pointer, None) }))
}
