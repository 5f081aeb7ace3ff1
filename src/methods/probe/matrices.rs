//! The vectors of all examples, a matrix for each hook point: in memory up to a budget, in nameless temporary files beyond it.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read as _, Seek as _, Write as _},
};

/// Matrices that grow.
#[derive(Debug)]
pub struct Matrices {
    columns: Vec<Column>,
    /// Bytes in memory, and how many there may be.
    held: usize,
    budget: usize,
    /// Bytes in files.
    spilled: u64,
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
            spilled: 0,
        }
    }

    /// Appends rows to each.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn push(&mut self, rows: &[Vec<f32>]) -> io::Result<()> {
        let bytes: usize = rows.iter().map(|r| size_of_val(&r[..])).sum();
        if self.held + bytes > self.budget {
            self.spill()?;
        }
        for (column, rows) in self.columns.iter_mut().zip(rows) {
            let bytes = size_of_val(&rows[..]);
            match column {
                Column::Memory(values) => {
                    values.extend_from_slice(rows);
                    self.held += bytes;
                }
                Column::File(file) => {
                    file.write_all(bytemuck::cast_slice(rows))?;
                    self.spilled += bytes as u64;
                }
            }
        }
        Ok(())
    }

    /// Bytes in memory.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Puts into files what is in memory.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn spill(&mut self) -> io::Result<()> {
        for column in &mut self.columns {
            self.spilled += column.spill()?;
        }
        self.held = 0;
        Ok(())
    }

    /// Bytes in files.
    pub fn spilled(&self) -> u64 {
        self.spilled
    }

    /// Done with growing.
    pub fn into_columns(self) -> Vec<Column> {
        self.columns
    }
}

impl Column {
    /// Gives the bytes that went.
    fn spill(&mut self) -> io::Result<u64> {
        let Column::Memory(values) = self else {
            return Ok(0);
        };
        let bytes = size_of_val(&values[..]) as u64;
        let mut file = BufWriter::new(tempfile::tempfile()?);
        file.write_all(bytemuck::cast_slice(values))?;
        *self = Column::File(file);
        Ok(bytes)
    }

    /// Tells each row, in order.
    ///
    /// # Errors
    /// When a file cannot be read back.
    pub fn each(self, width: usize, mut row: impl FnMut(&[f32])) -> io::Result<()> {
        match self {
            Column::Memory(values) => values.chunks_exact(width).for_each(row),
            Column::File(file) => {
                let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
                let bytes = file.stream_position()?;
                file.rewind()?;
                let mut file = BufReader::with_capacity(1 << 16, file);
                let mut values = vec![0f32; width];
                for _ in 0..bytes / (width * size_of::<f32>()) as u64 {
                    file.read_exact(bytemuck::cast_slice_mut(&mut values))?;
                    row(&values);
                }
            }
        }
        Ok(())
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
        for (budget, held) in [(usize::MAX, 1600), (400, 0), (0, 0)] {
            let mut all = Matrices::new(2, budget);
            for row in &rows {
                all.push(row).unwrap();
            }
            assert!(all.held() <= budget);
            assert_eq!(all.held() as u64 + all.spilled(), 1600);
            assert_eq!(
                all.columns.iter().any(|c| matches!(c, Column::File(_))),
                held == 0
            );
            for (at, column) in all.into_columns().into_iter().enumerate() {
                let mut found = Vec::new();
                column
                    .each(rows[0][at].len(), |row| found.push(row.to_vec()))
                    .unwrap();
                let expected: Vec<Vec<f32>> = rows.iter().map(|r| r[at].clone()).collect();
                assert_eq!(found, expected);
            }
        }
    }
}
