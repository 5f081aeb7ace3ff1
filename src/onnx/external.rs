//! The bytes of tensors, wherever they stand: in the message, or in another file of the model's folder.
//!
//! Weights stay where they are and remember it ([`Origin`]). Tensors of attributes, subgraphs and sparse weights are brought into
//! their message (still without copying), so that nothing downstream opens a file. Every file is opened once, and hashed through
//! the descriptor that is used.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{
    Folder, Limits, OnnxError, check, constant, folder,
    graph::{Data, Initializer, Origin},
    proto::{TensorProto, dtype_of},
};

/// Number of `data_location` for data in another file.
const EXTERNAL: i32 = 1;

/// A model file in its folder.
pub(super) struct Place {
    pub(super) folder: Folder,
    /// Name in the folder.
    pub(super) file: String,
    /// Path relative to the folder's base, for [`Origin`].
    pub(super) path: Arc<str>,
}

/// The files that the tensors of one model come from.
pub(super) struct TensorFiles<'a> {
    model: Bytes,
    place: Option<Place>,
    limits: &'a Limits,
    /// By the name that the model uses: the bytes, and the path relative to the folder's base.
    files: BTreeMap<String, (Bytes, Arc<str>)>,
    total: u128,
}

impl<'a> TensorFiles<'a> {
    pub(super) fn new(model: Bytes, place: Option<Place>, limits: &'a Limits) -> Self {
        Self {
            model,
            place,
            limits,
            files: BTreeMap::new(),
            total: 0,
        }
    }

    /// A weight of the graph.
    pub(super) fn initializer(&mut self, mut t: TensorProto) -> Result<Initializer, OnnxError> {
        let origin = self.bring(&mut t)?;
        let dims = check::dims(&t).map_err(|why| OnnxError::invalid(place(&t), why))?;
        let (element, known) = (t.data_type, dtype_of(t.data_type).is_some());
        let data = if known || !t.raw_data.is_empty() {
            let origin = origin.or_else(|| self.inside_model(&t.raw_data));
            let bytes = if t.raw_data.is_empty() {
                constant::listed(&t)
            } else {
                t.raw_data
            };
            Data::Dense { bytes, origin }
        } else {
            Data::Opaque(Arc::new(t))
        };
        Ok(Initializer {
            element,
            dims,
            data,
        })
    }

    /// Brings the data of a tensor into its message, checks them against its shape, and tells where they stood.
    pub(super) fn bring(&mut self, t: &mut TensorProto) -> Result<Option<Origin>, OnnxError> {
        let origin = match t.data_location {
            // Entries without the flag are left over from a conversion; the runtime passes over them too.
            0 => None,
            EXTERNAL => Some(self.external(t)?),
            other => {
                let why = format!("its data are in the unknown location {other}");
                return Err(OnnxError::invalid(place(t), why));
            }
        };
        t.data_location = 0;
        t.external_data = Vec::new();
        let needed = check::data(t).and_then(|()| check::data_bytes(t));
        let needed = needed.map_err(|why| OnnxError::invalid(place(t), why))?;
        self.total = self.total.saturating_add(needed.unwrap_or(0));
        if self.total > u128::from(self.limits.weight_bytes) {
            return Err(OnnxError::Limit {
                what: "the bytes of all weights",
                limit: self.limits.weight_bytes,
            });
        }
        Ok(origin)
    }

    /// Makes `raw_data` the part of another file that the tensor names.
    fn external(&mut self, t: &mut TensorProto) -> Result<Origin, OnnxError> {
        let invalid = |why: String| OnnxError::invalid(place(t), why);
        let mut entries = HashMap::new();
        for e in &t.external_data {
            if entries.insert(e.key.as_str(), e.value.as_str()).is_some() {
                return Err(invalid(format!("says \"{}\" twice", e.key)));
            }
        }
        let number = |key: &str| {
            let parsed = entries.get(key).map(|v| v.parse::<u64>());
            let bad = |_| invalid(format!("\"{key}\" is not a number of bytes"));
            parsed.transpose().map_err(bad)
        };
        let location = entries
            .get("location")
            .ok_or_else(|| invalid("names no file for its data".to_owned()))?;
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?;
        let needed = check::data_bytes(t)
            .map_err(&invalid)?
            .ok_or_else(|| invalid("strings cannot stand in another file".to_owned()))?;
        if length.is_some_and(|n| u128::from(n) != needed) {
            let why = format!("its shape needs {needed} bytes, it names {length:?}");
            return Err(invalid(why));
        }
        let Some(here) = &self.place else {
            return Err(invalid(
                "its data stand in another file, and this model has no folder".to_owned(),
            ));
        };
        let name = folder::plain(location.as_ref())?
            .to_string_lossy()
            .into_owned();
        let (bytes, path) = match self.files.get(&name) {
            Some(known) => known.clone(),
            None if name == here.file => (self.model.clone(), here.path.clone()),
            None => {
                let (bytes, path) = here.folder.map_with_path(&name, self.limits.file_bytes)?;
                let opened = (bytes, Arc::from(path));
                self.files.insert(name.clone(), opened.clone());
                opened
            }
        };
        let start = usize::try_from(offset).ok();
        let end = usize::try_from(u128::from(offset).saturating_add(needed)).ok();
        let (Some(start), Some(end)) = (start, end.filter(|e| *e <= bytes.len())) else {
            let why = format!(
                "its data would end at byte {} of \"{name}\", which has {}",
                u128::from(offset).saturating_add(needed),
                bytes.len()
            );
            return Err(invalid(why));
        };
        if !t.raw_data.is_empty() {
            return Err(invalid("has its data in two places".to_owned()));
        }
        t.raw_data = bytes.slice(start..end);
        Ok(Origin { file: path, offset })
    }

    /// Where a slice of the model file stands in it.
    fn inside_model(&self, slice: &Bytes) -> Option<Origin> {
        let here = self.place.as_ref()?;
        let offset = (slice.as_ptr() as usize).checked_sub(self.model.as_ptr() as usize)?;
        let inside = !slice.is_empty() && offset.checked_add(slice.len())? <= self.model.len();
        inside.then(|| Origin {
            file: here.path.clone(),
            offset: offset as u64,
        })
    }

    /// SHA-256 of the model file; with external data, of that and of the name and SHA-256 of each further file, by name.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let model: [u8; 32] = Sha256::digest(&self.model).into();
        if self.files.is_empty() {
            return model;
        }
        let mut whole = Sha256::new_with_prefix(model);
        for (name, (bytes, _)) in &self.files {
            whole.update((name.len() as u64).to_le_bytes());
            whole.update(name.as_bytes());
            whole.update(Sha256::digest(bytes));
        }
        whole.finalize().into()
    }
}

fn place(t: &TensorProto) -> String {
    format!("tensor \"{}\"", t.name)
}
