//! PyTorch's numbers of a fixture, by rows without their padding.

use std::{collections::BTreeMap, fs::File, path::Path};

use ndarray::{ArrayD, Axis, Slice};
use ndarray_npy::NpzReader;

/// See the module.
pub struct Golden {
    arrays: BTreeMap<String, ArrayD<f32>>,
    tokens: Vec<Vec<u32>>,
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/models")
            .join(name)
            .join("reference.npz");
        let mut file = NpzReader::new(File::open(path).unwrap()).unwrap();
        let ids: ArrayD<i64> = file.by_name("in_input_ids").unwrap();
        let mask: Option<ArrayD<i64>> = file.by_name("in_attention_mask").ok();
        let tokens = ids
            .outer_iter()
            .enumerate()
            .map(|(row, ids)| {
                let kept = |at: usize| mask.as_ref().is_none_or(|m| m[[row, at]] == 1);
                let ids = ids.iter().enumerate();
                ids.filter(|(at, _)| kept(*at))
                    .map(|(_, id)| u32::try_from(*id).unwrap())
                    .collect()
            })
            .collect();
        let names: Vec<String> = file.names().unwrap();
        let mut arrays = BTreeMap::new();
        for name in names {
            if let Ok(array) = file.by_name::<ndarray::OwnedRepr<f32>, ndarray::IxDyn>(&name) {
                arrays.insert(name.trim_end_matches(".npy").to_owned(), array);
            }
        }
        Self { arrays, tokens }
    }

    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub fn tokens(&self, row: usize) -> Vec<u32> {
        self.tokens[row].clone()
    }

    /// Hidden states and attentions in all.
    pub fn count(&self) -> usize {
        let counted =
            |n: &&String| n.starts_with("hidden_") || n.starts_with("attn_") && !n.contains("out");
        self.arrays.keys().filter(counted).count()
    }

    pub fn hidden(&self, layer: &str, row: usize, n: usize) -> Option<Vec<f32>> {
        self.part(&format!("hidden_{layer}"), row, &[0], n)
    }

    pub fn attention(&self, layer: &str, row: usize, n: usize) -> Option<Vec<f32>> {
        self.part(&format!("attn_{layer}"), row, &[1, 2], n)
    }

    /// `[label]`, or `[pos, vocab]` without padding.
    pub fn logits(&self, row: usize, n: usize) -> Vec<f32> {
        let by_position = self.arrays["logits"].ndim() == 3;
        let axes: &[usize] = if by_position { &[0] } else { &[] };
        self.part("logits", row, axes, n).unwrap()
    }

    fn part(&self, name: &str, row: usize, token_axes: &[usize], n: usize) -> Option<Vec<f32>> {
        let mut view = self.arrays.get(name)?.index_axis(Axis(0), row);
        for axis in token_axes {
            view.slice_axis_inplace(Axis(*axis), Slice::from(..n));
        }
        Some(view.iter().copied().collect())
    }
}
