//! Golden numbers: the arrays of an `.npz`, all as double precision.

use std::{collections::BTreeMap, fs::File, path::Path};

use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::NpzReader;

/// Of a file of `tests/fixtures`.
pub fn read(name: &str) -> BTreeMap<String, ArrayD<f64>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    let mut file = NpzReader::new(File::open(path).unwrap()).unwrap();
    let mut arrays = BTreeMap::new();
    for name in file.names().unwrap() {
        let read = file
            .by_name::<OwnedRepr<f64>, IxDyn>(&name)
            .or_else(|_| {
                let single = file.by_name::<OwnedRepr<f32>, IxDyn>(&name);
                single.map(|a| a.mapv(f64::from))
            })
            .or_else(|_| {
                let whole = file.by_name::<OwnedRepr<i64>, IxDyn>(&name);
                whole.map(|a| a.mapv(|v| v as f64))
            })
            .or_else(|_| {
                let bits = file.by_name::<OwnedRepr<u8>, IxDyn>(&name);
                bits.map(|a| a.mapv(f64::from))
            });
        arrays.insert(name.trim_end_matches(".npy").to_owned(), read.unwrap());
    }
    arrays
}
