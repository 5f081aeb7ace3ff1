//! Grids and arrays as a file: `.npz`, `.json`, `.png`, `.html`.

use std::{io::Cursor, path::Path};

use ndarray::{Array1, ArrayD};
use ndarray_npy::NpzWriter;
use serde_json::Value;

use super::{
    capture::Kind,
    error::CliError,
    out,
    picture::grid::{self, Grid},
};

/// What an answer is as a file.
pub(super) struct Contents {
    /// All of it, for `.json`; for `.npz` the array `meta`, as UTF-8 bytes.
    pub(super) json: Value,
    /// For `.npz`, by name.
    pub(super) arrays: Vec<(String, ArrayD<f32>)>,
    /// What the page is called.
    pub(super) title: String,
    /// For pictures and pages.
    pub(super) grids: Vec<Grid>,
}

/// Writes the file that its ending says.
pub(super) fn write(path: &Path, kind: Kind, contents: &Contents) -> Result<(), CliError> {
    let bytes = match kind {
        Kind::Npz => npz(contents)?,
        Kind::Json => format!("{}\n", contents.json).into_bytes(),
        Kind::Png => grid::png(&contents.grids).map_err(|e| CliError::new(e.to_string()))?,
        Kind::Html => grid::html(&contents.title, &contents.grids).into_bytes(),
    };
    out::write_told(path, &bytes)
}

fn npz(contents: &Contents) -> Result<Vec<u8>, CliError> {
    let mut archive = NpzWriter::new(Cursor::new(Vec::new()));
    for (name, array) in &contents.arrays {
        archive
            .add_array(name.as_str(), array)
            .map_err(|e| CliError::new(format!("array \"{name}\" cannot be written: {e}")))?;
    }
    let meta = Array1::from(contents.json.to_string().into_bytes());
    archive
        .add_array("meta", &meta)
        .map_err(|e| CliError::new(format!("array \"meta\" cannot be written: {e}")))?;
    let done = archive.finish().map_err(|e| CliError::new(e.to_string()))?;
    Ok(done.into_inner())
}
