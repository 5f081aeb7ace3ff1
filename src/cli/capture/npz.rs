//! A capture as .npz: `numpy.load(FILE)["blocks.0.attn.hook_pattern"]`.
//!
//! Floats are f32 whatever type they travelled in (numpy has no bf16), f64 and integers stay as they are. A sparse tensor NAME is four
//! arrays: `NAME.shape`, `NAME.counts` (per row), `NAME.indices` and `NAME.values` (rows after each other). Beside the tensors:
//! `token_ids` (pos), `token_offsets` (pos, 2) (bytes of the text), and `meta`, the rest as UTF-8 bytes of JSON:
//! `json.loads(f["meta"].tobytes())`.

use std::io::Cursor;

use ndarray::{Array1, Array2, ArrayD, IxDyn};
use ndarray_npy::{NpzWriter, WritableElement};

use super::json;
use crate::{
    cli::{
        assemble::{Captured, Data, Named},
        error::CliError,
    },
    tensor::{DType, Tensor},
};

type Archive = NpzWriter<Cursor<Vec<u8>>>;

/// The file's bytes.
pub(super) fn bytes(captured: &Captured) -> Result<Vec<u8>, CliError> {
    let mut archive = NpzWriter::new(Cursor::new(Vec::new()));
    fill(&mut archive, captured).map_err(CliError::new)?;
    let done = archive.finish().map_err(|e| CliError::new(e.to_string()))?;
    Ok(done.into_inner())
}

fn fill(archive: &mut Archive, captured: &Captured) -> Result<(), String> {
    for named in &captured.tensors {
        match &named.data {
            Data::Dense(tensor) => add(archive, &named.name, tensor)?,
            Data::Sparse(sparse) => {
                let part = |what: &str| format!("{}.{what}", named.name);
                let shape = Array1::from_iter(sparse.shape.iter().map(|d| *d as u64));
                put(archive, &part("shape"), &shape.into_dyn())?;
                put(
                    archive,
                    &part("counts"),
                    &Array1::from(sparse.counts.clone()).into_dyn(),
                )?;
                put(
                    archive,
                    &part("indices"),
                    &Array1::from(sparse.indices.clone()).into_dyn(),
                )?;
                add(archive, &part("values"), &sparse.values)?;
            }
        }
    }
    let tokens = &captured.header.tokens;
    let ids = Array1::from_iter(tokens.iter().map(|t| i64::from(t.id)));
    put(archive, "token_ids", &ids.into_dyn())?;
    let offsets = Array2::from_shape_fn((tokens.len(), 2), |(i, end)| {
        i64::from(if end == 0 {
            tokens[i].start
        } else {
            tokens[i].end
        })
    });
    put(archive, "token_offsets", &offsets.into_dyn())?;
    let mut meta = json::facts(captured);
    meta["axes"] = captured
        .tensors
        .iter()
        .map(|t: &Named| (t.name.clone(), serde_json::Value::from(t.axes.clone())))
        .collect();
    let meta = Array1::from(meta.to_string().into_bytes());
    put(archive, "meta", &meta.into_dyn())
}

fn put<T: WritableElement>(
    archive: &mut Archive,
    name: &str,
    array: &ArrayD<T>,
) -> Result<(), String> {
    archive
        .add_array(name, array)
        .map_err(|e| format!("array \"{name}\" cannot be written: {e}"))
}

fn add(archive: &mut Archive, name: &str, tensor: &Tensor) -> Result<(), String> {
    match tensor.dtype() {
        DType::F32 | DType::F16 | DType::Bf16 => {
            let values = tensor.to_f32().map_err(|e| e.to_string())?.into_owned();
            put(archive, name, &shaped(tensor, values)?)
        }
        DType::F64 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, f64::from_le_bytes))?,
        ),
        DType::I8 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, i8::from_le_bytes))?,
        ),
        DType::I16 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, i16::from_le_bytes))?,
        ),
        DType::I32 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, i32::from_le_bytes))?,
        ),
        DType::I64 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, i64::from_le_bytes))?,
        ),
        DType::U8 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, u8::from_le_bytes))?,
        ),
        DType::U16 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, u16::from_le_bytes))?,
        ),
        DType::U32 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, u32::from_le_bytes))?,
        ),
        DType::U64 => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, u64::from_le_bytes))?,
        ),
        DType::Bool => put(
            archive,
            name,
            &shaped(tensor, elements(tensor, |[b]: [u8; 1]| b != 0))?,
        ),
    }
}

/// The elements, decoded one by one.
fn elements<T, const N: usize>(tensor: &Tensor, decode: fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = tensor.bytes().as_chunks::<N>();
    chunks.iter().map(|c| decode(*c)).collect()
}

fn shaped<T>(tensor: &Tensor, values: Vec<T>) -> Result<ArrayD<T>, String> {
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).map_err(|e| e.to_string())
}
