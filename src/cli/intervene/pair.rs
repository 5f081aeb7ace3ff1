//! A tensor of both runs, and how far one is from the other.

use ndarray::{ArrayD, Zip};

use crate::cli::{
    arrays::{Array, Arrays},
    assemble::Broken,
};

/// The same hook point or output of both runs.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Pair {
    /// Of the model as it is.
    pub(super) original: Array,
    /// Of the changed one.
    pub(super) modified: Array,
}

/// The tensors of both runs, side by side.
///
/// # Errors
/// When they are not of the same names and shapes.
pub(super) fn pairs(original: Arrays, modified: Arrays) -> Result<Vec<Pair>, Broken> {
    let (original, modified) = (original.finish()?, modified.finish()?);
    let alike = |(a, b): (&Array, &Array)| a.name == b.name && a.shape() == b.shape();
    if original.len() != modified.len() || !original.iter().zip(&modified).all(alike) {
        return Err(Broken::new("its runs bring not the same tensors"));
    }
    let each = original.into_iter().zip(modified);
    let pair = |(original, modified)| Pair { original, modified };
    Ok(each.map(pair).collect())
}

impl Pair {
    /// Canonical name of the hook point, or name of the output.
    pub(super) fn name(&self) -> &str {
        &self.original.name
    }

    /// Modified less original; zero where both are the same infinity.
    pub(super) fn difference(&self) -> ArrayD<f32> {
        let change = |a: &f32, b: &f32| if a == b { 0.0 } else { b - a };
        Zip::from(&self.original.values)
            .and(&self.modified.values)
            .map_collect(change)
    }

    /// `|modified - original| / |original|`, Euclidean lengths over all that is finite of the original.
    pub(super) fn relative(&self) -> f64 {
        let length = |values: &ArrayD<f32>, of: fn(f32) -> bool| {
            let kept = values.iter().filter(|v| of(**v));
            kept.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
        };
        match length(&self.difference(), |_| true) {
            0.0 => 0.0,
            far => far / length(&self.original.values, f32::is_finite),
        }
    }

    /// The greatest magnitude of a difference.
    pub(super) fn greatest(&self) -> f32 {
        let difference = self.difference();
        let magnitudes = difference.iter().map(|d| d.abs());
        magnitudes.fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most })
    }

    /// Both runs and the difference, by the names that files have.
    pub(super) fn arrays(&self) -> [Array; 3] {
        let named = |what: &str, values: &ArrayD<f32>| Array {
            name: format!("{what}:{}", self.name()),
            axes: self.original.axes.clone(),
            values: values.clone(),
        };
        [
            named("original", &self.original.values),
            named("modified", &self.modified.values),
            named("difference", &self.difference()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::arrays::whole;
    use crate::service::wire::introspect as pb;

    fn array(values: &[f32]) -> pb::Tensor {
        pb::Tensor {
            name: "x".into(),
            dtype: pb::DType::F32.into(),
            shape: vec![values.len() as u64],
            data: bytemuck::cast_slice(values).to_vec().into(),
            ..pb::Tensor::default()
        }
    }

    fn pair(original: &[f32], modified: &[f32]) -> Pair {
        Pair {
            original: whole(array(original)).unwrap(),
            modified: whole(array(modified)).unwrap(),
        }
    }

    #[test]
    fn distances_are_relative_to_the_original() {
        let moved = pair(&[3.0, 4.0], &[3.0, 9.0]);
        assert_eq!((moved.relative(), moved.greatest()), (1.0, 5.0));
        let masked = pair(&[f32::NEG_INFINITY, 2.0], &[f32::NEG_INFINITY, 1.0]);
        assert_eq!((masked.relative(), masked.greatest()), (0.5, 1.0));
        let same = pair(&[0.0], &[0.0]);
        assert_eq!((same.relative(), same.greatest()), (0.0, 0.0));
        let from_nothing = pair(&[0.0], &[1.0]);
        assert_eq!(from_nothing.relative(), f64::INFINITY);
        assert!(pair(&[1.0, 2.0], &[f32::NAN, 2.0]).greatest().is_nan());
    }

    #[test]
    fn runs_bring_the_same_tensors() {
        let run = |values: &[f32]| {
            let mut arrays = Arrays::default();
            arrays.take(array(values)).unwrap();
            arrays
        };
        assert_eq!(pairs(run(&[1.0]), run(&[2.0])).unwrap().len(), 1);
        assert!(pairs(run(&[1.0]), run(&[1.0, 2.0])).is_err());
        assert!(pairs(run(&[1.0]), Arrays::default()).is_err());
    }
}
