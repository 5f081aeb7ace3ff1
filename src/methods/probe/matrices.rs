//! The vectors of all examples, a matrix for each hook point: in memory up to a budget, in nameless temporary files beyond it.

use std::{
    fs::File,
    io::{self, BufWriter, Read as _, Seek as _, Write as _},
};

/// Matrices that grow.
#[derive(Debug)]
pub struct Matrices {
    columns: Vec<Column>,
    /// Bytes in memory, and how many there may be.
    held: usize,
    budget: usize,
}

/// A matrix, wherever it is.
#[derive(Debug)]
pub enum Column {
    /// Row-major.
    Memory(Vec<f32>),
    /// The same in a file that has no name, and is gone with us.
    File(BufWriter<File>),
}

impl Matrices {
    /// So many empty ones, which together take at most so many bytes of memory.
    pub fn new(count: usize, budget: usize) -> Self {
        Self {
            columns: (0..count).map(|_| Column::Memory(Vec::new())).collect(),
            held: 0,
            budget,
        }
    }

    /// Appends rows to each.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn push(&mut self, rows: &[Vec<f32>]) -> io::Result<()> {
        self.held += rows.iter().map(|r| size_of_val(&r[..])).sum::<usize>();
        if self.held > self.budget {
            for column in &mut self.columns {
                column.spill()?;
            }
            self.held = 0;
        }
        for (column, rows) in self.columns.iter_mut().zip(rows) {
            match column {
                Column::Memory(values) => values.extend_from_slice(rows),
                Column::File(file) => file.write_all(bytemuck::cast_slice(rows))?,
            }
        }
        Ok(())
    }

    /// Whether they are in files.
    pub fn spilled(&self) -> bool {
        self.columns.iter().any(|c| matches!(c, Column::File(_)))
    }

    /// Done with growing.
    pub fn into_columns(self) -> Vec<Column> {
        self.columns
    }
}

impl Column {
    fn spill(&mut self) -> io::Result<()> {
        if let Column::Memory(values) = self {
            let mut file = BufWriter::new(tempfile::tempfile()?);
            file.write_all(bytemuck::cast_slice(values))?;
            *self = Column::File(file);
        }
        Ok(())
    }

    /// All of it, in memory.
    ///
    /// # Errors
    /// When a file cannot be read back.
    pub fn load(self) -> io::Result<Vec<f32>> {
        match self {
            Column::Memory(values) => Ok(values),
            Column::File(file) => {
                let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
                let bytes = usize::try_from(file.stream_position()?).unwrap_or(usize::MAX);
                file.rewind()?;
                let mut values = vec![0f32; bytes / size_of::<f32>()];
                file.read_exact(bytemuck::cast_slice_mut(&mut values))?;
                Ok(values)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_back_is_what_went_in_from_memory_and_from_files() {
        let rows: Vec<[Vec<f32>; 2]> = (0u8..50)
            .map(|i| [vec![f32::from(i); 3], vec![-f32::from(i); 5]])
            .collect();
        for (budget, spilled) in [(usize::MAX, false), (400, true), (0, true)] {
            let mut all = Matrices::new(2, budget);
            for row in &rows {
                all.push(row).unwrap();
            }
            assert_eq!(all.spilled(), spilled);
            let found: Vec<Vec<f32>> = all
                .into_columns()
                .into_iter()
                .map(|c| c.load().unwrap())
                .collect();
            for (at, found) in found.iter().enumerate() {
                let expected: Vec<f32> = rows.iter().flat_map(|r| r[at].clone()).collect();
                assert_eq!(*found, expected);
            }
        }
    }
}
