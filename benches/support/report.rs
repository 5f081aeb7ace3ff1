//! Options of a bench, medians, and the report: a table, or JSON with `--json`.

use std::time::Duration;

use comfy_table::{Table, presets::ASCII_MARKDOWN};
use serde_json::{Value, json};

/// What was asked on the command line.
#[derive(Clone, Debug)]
pub struct Options {
    json: bool,
    runs: Option<usize>,
}

impl Options {
    /// Of this process. `cargo bench` itself adds `--bench`.
    pub fn read() -> Self {
        let mut options = Self {
            json: false,
            runs: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--json" => options.json = true,
                "--runs" => {
                    let n = args.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
                    options.runs = Some(n.unwrap_or_else(|| usage()));
                }
                _ => usage(),
            }
        }
        options
    }

    /// Counted runs of each side: as asked, or the bench's own number.
    pub fn runs(&self, own: usize) -> usize {
        self.runs.unwrap_or(own)
    }
}

fn usage() -> ! {
    eprintln!("usage: cargo bench --bench NAME -- [--runs N] [--json]");
    std::process::exit(2);
}

/// The middle; of an even number of values the upper one of the two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Milliseconds.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Times of two sides that took turns, in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    pub ours: Vec<f64>,
    pub bare: Vec<f64>,
}

impl Pairs {
    pub fn push(&mut self, ours: Duration, bare: Duration) {
        self.ours.push(millis(ours));
        self.bare.push(millis(bare));
    }

    /// Median of ours minus median of bare.
    pub fn added(&self) -> f64 {
        median(&self.ours) - median(&self.bare)
    }

    /// Median of ours by median of bare.
    pub fn ratio(&self) -> f64 {
        median(&self.ours) / median(&self.bare)
    }
}

/// A table that grows row by row.
pub struct Report {
    bench: &'static str,
    options: Options,
    columns: Vec<&'static str>,
    rows: Vec<Vec<Value>>,
    notes: Vec<String>,
    missed: bool,
}

impl Report {
    pub fn new(bench: &'static str, options: &Options, columns: &[&'static str]) -> Self {
        Self {
            bench,
            options: options.clone(),
            columns: columns.to_vec(),
            rows: Vec::new(),
            notes: Vec::new(),
            missed: false,
        }
    }

    /// A row, a value for each column.
    pub fn row(&mut self, values: Vec<Value>) {
        assert_eq!(values.len(), self.columns.len(), "a value for each column");
        self.rows.push(values);
    }

    /// What the reader must know.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Whether a target was met, as a cell.
    pub fn verdict(&mut self, met: bool) -> Value {
        self.missed |= !met;
        json!(if met { "met" } else { "missed" })
    }

    /// Prints it. A target that was missed is told by the text alone: times depend on the machine.
    pub fn print(self) {
        let machine = machine();
        if self.options.json {
            let rows: Vec<Value> = self
                .rows
                .iter()
                .map(|row| {
                    let cells = self.columns.iter().map(|c| (*c).to_owned());
                    Value::Object(cells.zip(row.iter().cloned()).collect())
                })
                .collect();
            let all = json!({
                "bench": self.bench, "machine": machine, "rows": rows, "notes": self.notes, "all_met": !self.missed,
            });
            println!("{all:#}");
            return;
        }
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN).set_header(&self.columns);
        for row in &self.rows {
            table.add_row(row.iter().map(cell));
        }
        println!("{}, on {machine}\n\n{table}", self.bench);
        for note in &self.notes {
            println!("\n{note}");
        }
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) if n.is_f64() => {
            let n = n.as_f64().unwrap_or(f64::NAN);
            if n.abs() < 10.0 {
                format!("{n:.3}")
            } else {
                format!("{n:.1}")
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    format!("{cores} cores of {model}")
}
