//! A model's inputs from an .npz file, such as `numpy.savez("inputs.npz", pixel_values=x)` writes it.

use std::{fs::File, path::Path};

use bytemuck::Pod;
use bytes::Bytes;
use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::{NpzReader, ReadableElement};

use crate::{
    cli::error::CliError,
    service::wire::introspect::{self as wire, DType, NamedTensors},
};

/// Reads every array of the file.
pub(super) fn read(path: &Path) -> Result<NamedTensors, CliError> {
    let tensors = arrays(path).map_err(|why| {
        CliError::new(format!("cannot read inputs from {why}"))
            .advise("write it with numpy.savez(\"inputs.npz\", NAME=ARRAY, ...), not compressed")
    })?;
    Ok(NamedTensors { tensors })
}

/// Every array of a file.
///
/// # Errors
/// The file, and what is wrong with it.
pub(in crate::cli) fn arrays(path: &Path) -> Result<Vec<wire::Tensor>, String> {
    let refuse = |why: String| format!("\"{}\": {why}", path.display());
    let file = File::open(path).map_err(|e| refuse(e.to_string()))?;
    let mut archive = NpzReader::new(file).map_err(|e| refuse(e.to_string()))?;
    let names = archive.names().map_err(|e| refuse(e.to_string()))?;
    if names.is_empty() {
        return Err(refuse("there is no array in it".into()));
    }
    names
        .iter()
        .map(|name| {
            array(&mut archive, name).map_err(|why| refuse(format!("array \"{name}\": {why}")))
        })
        .collect()
}

/// An array of whatever type it has, if it is one that models take.
fn array(archive: &mut NpzReader<File>, name: &str) -> Result<wire::Tensor, String> {
    if let Some(bools) = typed::<bool>(archive, name)? {
        let bytes: Vec<u8> = bools.iter().map(|b| u8::from(*b)).collect();
        return Ok(tensor(name, DType::Bool, bools.shape(), bytes.into()));
    }
    let found = numbers::<f32>(archive, name, DType::F32)
        .or_else(|| numbers::<i64>(archive, name, DType::I64))
        .or_else(|| numbers::<f64>(archive, name, DType::F64))
        .or_else(|| numbers::<i32>(archive, name, DType::I32))
        .or_else(|| numbers::<u8>(archive, name, DType::U8))
        .or_else(|| numbers::<i8>(archive, name, DType::I8))
        .or_else(|| numbers::<i16>(archive, name, DType::I16))
        .or_else(|| numbers::<u16>(archive, name, DType::U16))
        .or_else(|| numbers::<u32>(archive, name, DType::U32))
        .or_else(|| numbers::<u64>(archive, name, DType::U64));
    found.ok_or_else(|| {
        "its type is none that models take; convert it, for example to float32".into()
    })
}

fn numbers<T: ReadableElement + Pod>(
    archive: &mut NpzReader<File>,
    name: &str,
    dtype: DType,
) -> Option<wire::Tensor> {
    let array = typed::<T>(archive, name).ok()??;
    let values: Vec<T> = array.iter().copied().collect(); // row-major, whatever the file's order
    let bytes = Bytes::copy_from_slice(bytemuck::cast_slice(&values));
    Some(tensor(name, dtype, array.shape(), bytes))
}

/// Nothing when the array is of another type.
fn typed<T: ReadableElement>(
    archive: &mut NpzReader<File>,
    name: &str,
) -> Result<Option<ArrayD<T>>, String> {
    use ndarray_npy::{ReadNpyError, ReadNpzError};
    match archive.by_name::<OwnedRepr<T>, IxDyn>(name) {
        Ok(array) => Ok(Some(array)),
        Err(ReadNpzError::Npy(ReadNpyError::WrongDescriptor(_))) => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

fn tensor(name: &str, dtype: DType, shape: &[usize], data: Bytes) -> wire::Tensor {
    wire::Tensor {
        name: name.to_owned(),
        axes: Vec::new(),
        dtype: dtype.into(),
        shape: shape.iter().map(|d| *d as u64).collect(),
        offset: 0,
        data,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use ndarray_npy::NpzWriter;

    use super::*;

    #[test]
    fn arrays_keep_their_type_and_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inputs.npz");
        let mut npz = NpzWriter::new(File::create(&path).unwrap());
        npz.add_array("x", &array![[1.0f32, 2.0]]).unwrap();
        npz.add_array("ids", &array![[1i64, 2, 3]]).unwrap();
        npz.add_array("mask", &array![[true, false]]).unwrap();
        npz.finish().unwrap();
        let read = read(&path).unwrap().tensors;
        let facts: Vec<_> = read
            .iter()
            .map(|t| (t.name.as_str(), t.dtype(), t.shape.clone(), t.data.len()))
            .collect();
        assert_eq!(
            facts,
            [
                ("x", DType::F32, vec![1, 2], 8),
                ("ids", DType::I64, vec![1, 3], 24),
                ("mask", DType::Bool, vec![1, 2], 2),
            ]
        );
    }

    #[test]
    fn what_is_no_npz_is_an_error_with_advice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inputs.npz");
        std::fs::write(&path, b"PK not really").unwrap();
        assert!(format!("{:?}", read(&path).unwrap_err()).contains("numpy.savez"));
        assert!(read(Path::new("no/such/file.npz")).is_err());
    }
}
