//! Tuned lenses (Belrose et al. 2023): an affine map for each state, before it is read by the head.
//!
//! ```text
//!   h -> h + A_l h + b_l
//! ```
//!
//! A file holds `{l}.weight` `[d_model, d_model]` (rows are outputs) and `{l}.bias` `[d_model]` for state `l`, as the translators of the authors'
//! `tuned-lens` are named; states without an entry are read as they are, and so is the last one, which is the model's own. Type F32, F16 or BF16.
//!
//! ```text
//!   lenses/
//!     NAME.safetensors
//! ```
//!
//! Nothing in a file is code. Its header is bounded and checked before anything else is read, and one layer is in memory at a time.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use ndarray::ArrayView2;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::stream::States;
use crate::{
    engine::EngineError,
    methods::probe::store::{check_name_of, missing, open_regular, why},
    tensor::{DType, Tensor},
};

/// Largest header of a file.
const HEADER_LIMIT: u64 = 4 << 20;
/// Widest map: its numbers are in memory at once.
const WIDTH_LIMIT: usize = 16_384;
const ENDING: &str = ".safetensors";
/// Bytes that tell the length of the header.
const LENGTH: u64 = 8;

/// A file of maps, open.
#[derive(Debug)]
pub struct Tuned {
    /// Its name.
    pub name: String,
    file: File,
    header: Metadata,
    /// Where the tensors begin.
    begins: u64,
}

/// Whether a name can be a tuned lens's.
///
/// # Errors
/// Why not, with the field.
pub fn check_name(name: &str, field: &str) -> Result<(), EngineError> {
    check_name_of("a tuned lens", name, field)
}

/// Where the tuned lenses of a model are: beneath a configured folder, or beside the model.
pub fn folder(configured: Option<&Path>, model: &str, beside: &Path) -> PathBuf {
    match configured {
        Some(folder) => folder.join(model),
        None => beside.join("lenses"),
    }
}

impl Tuned {
    /// Opens a file of a folder and checks what it says of itself.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::DataLoss`] for a file that does not add up.
    pub fn open(folder: &Path, name: &str) -> Result<Self, EngineError> {
        check_name(name, "tuned")?;
        let path = folder.join(format!("{name}{ENDING}"));
        let absent = || {
            EngineError::not_found(format!(
                "there is no tuned lens \"{name}\": put it into the folder \"lenses\" of the model as {name}{ENDING}"
            ))
        };
        let mut file = open_regular(&path).map_err(|e| {
            if missing(&e) {
                absent()
            } else {
                broken(name, &why(&e))
            }
        })?;
        let read = |e: io::Error| broken(name, &e.kind().to_string());
        let length = file.metadata().map_err(read)?.len();
        let mut size = [0; LENGTH as usize];
        file.read_exact(&mut size).map_err(read)?;
        let size = u64::from_le_bytes(size);
        if size > HEADER_LIMIT {
            return Err(broken(
                name,
                "it is no safetensors file, or its header is too large",
            ));
        }
        let mut header = vec![0; usize::try_from(size).unwrap_or_default()];
        file.read_exact(&mut header).map_err(read)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|e| broken(name, &e.to_string()))?;
        let begins = LENGTH + size;
        if begins.checked_add(header.data_len() as u64) != Some(length) {
            return Err(broken(
                name,
                "its header tells of more or fewer bytes than there are",
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            file,
            header,
            begins,
        })
    }

    /// Maps every state but the last.
    ///
    /// # Errors
    /// [`EngineError::DataLoss`] for a file of other extents, or with numbers that are not finite; [`EngineError::FailedPrecondition`] for one that is
    /// of another model.
    pub(super) fn apply(&self, states: &mut States) -> Result<usize, EngineError> {
        let width = states.width;
        let last = states.values.len().saturating_sub(1);
        if width > WIDTH_LIMIT {
            return Err(EngineError::precondition(format!(
                "the stream is {width} wide: tuned lenses are read up to {WIDTH_LIMIT}"
            )));
        }
        let mut names = self.header.offset_keys();
        names.sort();
        for name in names {
            let known = name.split_once('.').is_some_and(|(layer, part)| {
                layer.parse().is_ok_and(|l: usize| l < last) && matches!(part, "weight" | "bias")
            });
            if !known {
                return Err(EngineError::precondition(format!(
                    "tuned lens \"{}\" has \"{}\", and this model takes 0.weight, 0.bias to {}.weight, {}.bias: is it of another model?",
                    self.name,
                    crate::engine::error::clean(&name),
                    last.saturating_sub(1),
                    last.saturating_sub(1)
                )));
            }
        }
        let mut mapped = 0;
        for (layer, state) in states.values.iter_mut().take(last).enumerate() {
            let weight = self.numbers(&format!("{layer}.weight"), &[width, width])?;
            let bias = self.numbers(&format!("{layer}.bias"), &[width])?;
            if weight.is_none() && bias.is_none() {
                continue;
            }
            mapped += 1;
            let h = ArrayView2::from_shape((states.positions, width), &state[..])
                .map_err(EngineError::internal)?;
            let mut out = h.to_owned();
            if let Some(weight) = weight {
                let map = ArrayView2::from_shape((width, width), &weight[..])
                    .map_err(EngineError::internal)?;
                out += &h.dot(&map.t());
            }
            if let Some(bias) = bias {
                out += &ndarray::ArrayView1::from(&bias[..]);
            }
            *state = out.into_iter().collect();
        }
        if mapped == 0 {
            return Err(broken(&self.name, "it maps no layer"));
        }
        Ok(mapped)
    }

    /// The numbers of a tensor, if it is there.
    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, EngineError> {
        let Some(info) = self.header.info(name) else {
            return Ok(None);
        };
        if info.shape != shape {
            return Err(EngineError::precondition(format!(
                "\"{name}\" of tuned lens \"{}\" has the shape {:?} where {shape:?} fits the stream: is it of another model?",
                self.name, info.shape
            )));
        }
        let tensor = self.tensor(name, info)?;
        let values = tensor.to_f32().map_err(EngineError::internal)?.into_owned();
        if values.iter().any(|v| !v.is_finite()) {
            let why = format!("\"{name}\" holds a number that is not finite");
            return Err(broken(&self.name, &why));
        }
        Ok(Some(values))
    }

    fn tensor(&self, name: &str, info: &TensorInfo) -> Result<Tensor, EngineError> {
        let types = [
            (Dtype::F32, DType::F32),
            (Dtype::F16, DType::F16),
            (Dtype::BF16, DType::Bf16),
        ];
        let known = types.into_iter().find(|(theirs, _)| *theirs == info.dtype);
        let (_, dtype) = known.ok_or_else(|| {
            let why = format!("\"{name}\" is not of type F32, F16 or BF16");
            broken(&self.name, &why)
        })?;
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to.saturating_sub(from)];
        self.file
            .read_exact_at(&mut bytes, self.begins + from as u64)
            .map_err(|e| broken(&self.name, &e.kind().to_string()))?;
        Tensor::new(dtype, info.shape.clone(), Bytes::from(bytes))
            .map_err(|e| broken(&self.name, &e.to_string()))
    }
}

fn broken(name: &str, why: &str) -> EngineError {
    EngineError::DataLoss {
        message: crate::engine::error::clean(&format!(
            "tuned lens \"{name}\" cannot be read: {why}; bring it anew"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use safetensors::tensor::TensorView;

    use super::*;

    fn states() -> States {
        States {
            positions: 2,
            width: 2,
            values: vec![vec![1.0, 2.0, 3.0, 4.0]; 3],
            scores: Vec::new(),
        }
    }

    fn file(folder: &Path, parts: &[(&str, &[usize], &[f32])]) {
        let bytes: Vec<Vec<u8>> = parts
            .iter()
            .map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let views: BTreeMap<&str, TensorView<'_>> = parts
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), b)| {
                let view = TensorView::new(Dtype::F32, shape.to_vec(), b).unwrap();
                (*name, view)
            })
            .collect();
        let all = safetensors::serialize(views, None).unwrap();
        fs::write(folder.join("a.safetensors"), all).unwrap();
    }

    #[test]
    fn a_state_is_moved_by_its_map_and_the_last_stays() {
        let folder = tempfile::tempdir().unwrap();
        // Rows are outputs: the first output takes the second input.
        file(
            folder.path(),
            &[
                ("0.weight", &[2, 2], &[0.0, 1.0, 0.0, 0.0]),
                ("0.bias", &[2], &[0.0, 10.0]),
            ],
        );
        let mut states = states();
        let tuned = Tuned::open(folder.path(), "a").unwrap();
        assert_eq!(tuned.apply(&mut states).unwrap(), 1);
        assert_eq!(states.values[0], [3.0, 12.0, 7.0, 14.0]);
        assert_eq!(states.values[1], states.values[2]);
    }

    #[test]
    fn files_that_do_not_add_up_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let opened = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Tuned::open(folder.path(), "a")
        };
        for bytes in [&b""[..], b"\x80\x02}q\x00.", &u64::MAX.to_le_bytes()] {
            let error = opened(bytes).unwrap_err();
            assert!(matches!(error, EngineError::DataLoss { .. }), "{error}");
        }
        file(folder.path(), &[("0.bias", &[2], &[f32::NAN, 0.0])]);
        let whole = fs::read(&path).unwrap();
        assert!(opened(&whole[..whole.len() - 1]).is_err(), "cut off");
        let tuned = opened(&whole).unwrap();
        let error = tuned.apply(&mut states()).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
    }

    #[test]
    fn maps_of_another_model_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&str, &[usize]); 3] =
            [("0.weight", &[3, 3]), ("2.bias", &[2]), ("weight", &[2, 2])];
        for (name, shape) in cases {
            let values = vec![0.0; shape.iter().product()];
            file(folder.path(), &[(name, shape, &values)]);
            let tuned = Tuned::open(folder.path(), "a").unwrap();
            let error = tuned.apply(&mut states()).unwrap_err();
            assert!(error.to_string().contains("another model"), "{error}");
        }
    }

    #[test]
    fn no_name_leaves_the_folder() {
        for name in ["", "../a", "a/b", ".a", "a\0"] {
            assert!(Tuned::open(Path::new("/"), name).is_err(), "{name:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/zero", folder.path().join("b.safetensors")).unwrap();
        let pipe = folder.path().join("p.safetensors");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        for name in ["b", "p"] {
            let error = Tuned::open(folder.path(), name).unwrap_err();
            assert!(error.to_string().contains("no regular file"), "{error}");
        }
        let missing = Tuned::open(folder.path(), "c").unwrap_err();
        assert!(matches!(missing, EngineError::NotFound { .. }));
    }
}
