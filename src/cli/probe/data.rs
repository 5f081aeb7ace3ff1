//! Labelled examples from a file, or inputs to score: `.tsv` and `.csv` with a heading, `.jsonl` with an object on each line.

use std::{fs::File, io::BufRead as _, io::BufReader, path::Path};

use serde_json::Value;

use crate::{
    cli::{capture::select::of_ids, error::CliError},
    service::wire::introspect::{self as pb, example::Of},
};

/// Which columns, or keys, hold what.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Columns {
    pub(in crate::cli) text: String,
    pub(in crate::cli) label: String,
    /// `train` or `test`, where the file says.
    pub(in crate::cli) part: String,
    /// Labels are numbers.
    pub(in crate::cli) numbers: bool,
}

/// Reads all examples of a file.
pub(in crate::cli) fn read(path: &Path, columns: &Columns) -> Result<Vec<pb::Example>, CliError> {
    let from = |file, delimiter| match delimiter {
        Some(delimiter) => table(file, delimiter, columns),
        None => lines(file, |line| object(line, columns)),
    };
    opened(path, "examples", from)
}

/// Reads all inputs of a file, whatever they are labelled by.
pub(super) fn inputs(path: &Path, text: &str) -> Result<Vec<pb::Input>, CliError> {
    let from = |file, delimiter| match delimiter {
        Some(delimiter) => texts(file, delimiter, text),
        None => lines(file, |line| {
            let object: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
            input(&object, text)
        }),
    };
    opened(path, "inputs", from)
}

/// Reads a file by its ending, which says by what columns are parted, where there are columns.
fn opened<T>(
    path: &Path,
    what: &str,
    from: impl FnOnce(File, Option<u8>) -> Result<Vec<T>, String>,
) -> Result<Vec<T>, CliError> {
    let file = File::open(path)
        .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", path.display())))?;
    let named = |e: String| CliError::new(format!("\"{}\": {e}", path.display()));
    let ending = path.extension().and_then(|e| e.to_str());
    let delimiter = match ending {
        Some("tsv") => Some(b'\t'),
        Some("csv") => Some(b','),
        Some("jsonl") => None,
        Some(_) | None => {
            return Err(CliError::Usage(format!(
                "\"{}\" ends in none of .tsv, .csv and .jsonl",
                path.display()
            )));
        }
    };
    let found = from(file, delimiter).map_err(named)?;
    if found.is_empty() {
        return Err(named(format!("there are no {what} in it")));
    }
    Ok(found)
}

/// Examples of a table. Tabs stand for themselves: quotes mean nothing in a `.tsv`.
pub(in crate::cli) fn table(
    from: impl std::io::Read,
    delimiter: u8,
    columns: &Columns,
) -> Result<Vec<pb::Example>, String> {
    let mut reader = reader(from, delimiter);
    let heading = reader.headers().map_err(|e| e.to_string())?.clone();
    let text = need(&heading, &columns.text, "--text-column")?;
    let label = need(&heading, &columns.label, "--label-column")?;
    let part = column(&heading, &columns.part);
    reader
        .records()
        .enumerate()
        .map(|(at, record)| {
            let record = record.map_err(|e| e.to_string())?;
            let cell = |at: usize| record.get(at).unwrap_or_default();
            let label = if columns.numbers {
                Of::Number(number(cell(label)).map_err(|e| format!("line {}: {e}", at + 2))?)
            } else {
                Of::Label(cell(label).trim().to_owned())
            };
            let part = part_of(part.map(cell)).map_err(|e| format!("line {}: {e}", at + 2))?;
            Ok(example(of_text(cell(text)), label, part))
        })
        .collect()
}

fn texts(from: impl std::io::Read, delimiter: u8, text: &str) -> Result<Vec<pb::Input>, String> {
    let mut reader = reader(from, delimiter);
    let heading = reader.headers().map_err(|e| e.to_string())?.clone();
    let text = need(&heading, text, "--text-column")?;
    let records = reader.records();
    records
        .map(|record| {
            let record = record.map_err(|e| e.to_string())?;
            Ok(of_text(record.get(text).unwrap_or_default()))
        })
        .collect()
}

fn reader<R: std::io::Read>(from: R, delimiter: u8) -> csv::Reader<R> {
    csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter != b'\t')
        .from_reader(from)
}

fn column(heading: &csv::StringRecord, name: &str) -> Option<usize> {
    heading.iter().position(|h| h.trim() == name)
}

fn need(heading: &csv::StringRecord, name: &str, option: &str) -> Result<usize, String> {
    column(heading, name).ok_or_else(|| {
        let has: Vec<&str> = heading.iter().collect();
        format!(
            "there is no column \"{name}\" among {}: name it with {option}",
            has.join(", ")
        )
    })
}

fn lines<T>(file: File, each: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let lines = BufReader::new(file).lines().enumerate();
    lines
        .filter(|(_, line)| !matches!(line, Ok(line) if line.trim().is_empty()))
        .map(|(at, line)| {
            let line = line.map_err(|e| e.to_string())?;
            each(&line).map_err(|e| format!("line {}: {e}", at + 1))
        })
        .collect()
}

fn object(line: &str, columns: &Columns) -> Result<pb::Example, String> {
    let object: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let input = input(&object, &columns.text)?;
    let tokens = match (&object["spans"], &object["positions"]) {
        (Value::Array(spans), _) => Some(pb::TokenLabels {
            spans: spans.iter().map(span).collect::<Result<_, _>>()?,
            ..pb::TokenLabels::default()
        }),
        (_, Value::Array(positions)) => Some(pb::TokenLabels {
            positions: positions.iter().map(position).collect::<Result<_, _>>()?,
            ..pb::TokenLabels::default()
        }),
        _ => None,
    };
    let of = match (&object[&columns.label], tokens) {
        (_, Some(tokens)) => Of::Tokens(tokens),
        (Value::String(label), _) if columns.numbers => Of::Number(number(label)?),
        (Value::String(label), _) => Of::Label(label.clone()),
        (Value::Number(n), _) if columns.numbers => Of::Number(n.as_f64().unwrap_or(f64::NAN)),
        (Value::Number(_) | Value::Bool(_), _) if !columns.numbers => {
            Of::Label(object[&columns.label].to_string())
        }
        _ => {
            return Err(format!(
                "\"{}\" is no label, and there are no \"spans\" of start, end and label, and no \"positions\" of position and label",
                columns.label
            ));
        }
    };
    let part = part_of(object[&columns.part].as_str())?;
    Ok(example(input, of, part))
}

/// A text, or "ids" of tokens.
fn input(object: &Value, text: &str) -> Result<pb::Input, String> {
    if let Value::Array(ids) = &object["ids"] {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = ids.iter().map(id).collect();
        return Ok(of_ids(&ids.ok_or("\"ids\" are not all ids of tokens")?));
    }
    let found = object[text].as_str();
    found
        .map(of_text)
        .ok_or_else(|| format!("\"{text}\" is no text, and there are no \"ids\""))
}

fn of_text(text: &str) -> pb::Input {
    pb::Input {
        kind: Some(pb::input::Kind::Text(pb::Text {
            text: text.to_owned(),
            truncate: true,
            ..pb::Text::default()
        })),
    }
}

fn position(labelled: &Value) -> Result<pb::PositionLabel, String> {
    let at = labelled["position"].as_i64();
    match (
        at.and_then(|n| i32::try_from(n).ok()),
        labelled["label"].as_str(),
    ) {
        (Some(position), Some(label)) => Ok(pb::PositionLabel {
            position,
            label: label.to_owned(),
        }),
        _ => Err(format!("{labelled} is no position with its label")),
    }
}

fn span(span: &Value) -> Result<pb::SpanLabel, String> {
    let byte = |key: &str| span[key].as_u64().and_then(|n| u32::try_from(n).ok());
    match (byte("start"), byte("end"), span["label"].as_str()) {
        (Some(start), Some(end), Some(label)) => Ok(pb::SpanLabel {
            start,
            end,
            label: label.to_owned(),
        }),
        _ => Err(format!("{span} is no span of start, end (bytes) and label")),
    }
}

fn example(input: pb::Input, of: Of, part: pb::Part) -> pb::Example {
    pb::Example {
        input: Some(input),
        of: Some(of),
        part: part.into(),
    }
}

fn number(text: &str) -> Result<f64, String> {
    let number = text.trim().parse();
    number.map_err(|_| format!("\"{}\" is no number", text.trim()))
}

fn part_of(text: Option<&str>) -> Result<pb::Part, String> {
    match text.map(str::trim) {
        None | Some("") => Ok(pb::Part::Unspecified),
        Some("train") => Ok(pb::Part::Train),
        Some("test" | "validation" | "dev") => Ok(pb::Part::Test),
        Some(other) => Err(format!("\"{other}\" is neither train nor test")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(numbers: bool) -> Columns {
        Columns {
            text: "text".into(),
            label: "label".into(),
            part: "split".into(),
            numbers,
        }
    }

    #[test]
    fn tables_are_read_by_their_heading() {
        let tsv = "label\ttext\tsplit\ngood\tso \"nice\"\ttrain\nbad\tno\ttest\n";
        let found = table(tsv.as_bytes(), b'\t', &columns(false)).unwrap();
        assert_eq!(found[0].of, Some(Of::Label("good".into())));
        assert_eq!(found[1].part, i32::from(pb::Part::Test));
        let csv = "text,label\n\"a, b\",1.5\n";
        let found = table(csv.as_bytes(), b',', &columns(true)).unwrap();
        assert_eq!(found[0].of, Some(Of::Number(1.5)));
        for (csv, part) in [
            ("words,label\na,b\n", "no column \"text\""),
            ("text,label\na,b\n", "line 2: \"b\" is no number"),
            ("text,label,split\na,1,later\n", "neither train nor test"),
        ] {
            let error = table(csv.as_bytes(), b',', &columns(true)).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn objects_have_labels_or_spans() {
        let found = object("{\"text\": \"a\", \"label\": 3}", &columns(false)).unwrap();
        assert_eq!(found.of, Some(Of::Label("3".into())));
        let line = "{\"text\": \"ab\", \"spans\": [{\"start\": 0, \"end\": 2, \"label\": \"x\"}]}";
        let found = object(line, &columns(false)).unwrap();
        assert!(matches!(found.of, Some(Of::Tokens(t)) if t.spans.len() == 1));
        let line = "{\"ids\": [2, 7], \"positions\": [{\"position\": -1, \"label\": \"x\"}]}";
        let found = object(line, &columns(false)).unwrap();
        assert!(matches!(found.of, Some(Of::Tokens(t)) if t.positions[0].position == -1));
        assert!(object("{\"ids\": [-2], \"label\": \"x\"}", &columns(false)).is_err());
        assert!(object("{\"text\": \"a\"}", &columns(false)).is_err());
        assert!(object("{\"label\": \"a\"}", &columns(false)).is_err());
    }
}
