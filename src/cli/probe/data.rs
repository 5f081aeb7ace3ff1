//! Labelled examples from a file, or inputs to score: `.tsv` and `.csv` with a heading, `.jsonl` with an object on each line.
//!
//! Files are UTF-8, with a byte order mark or without. Lines of white space are passed over, and what is wrong is told with the line of the
//! file at which its record begins.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    cli::{
        capture::select::{TextArgs, of_ids},
        error::CliError,
    },
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
    /// How texts become tokens.
    pub(in crate::cli) how: TextArgs,
}

/// What a file holds.
#[derive(Debug)]
pub(in crate::cli) struct Found<T> {
    pub(in crate::cli) all: Vec<T>,
    /// The line of the file at which each begins, from 1.
    pub(in crate::cli) lines: Vec<usize>,
}

impl<T> FromIterator<(usize, T)> for Found<T> {
    fn from_iter<I: IntoIterator<Item = (usize, T)>>(from: I) -> Self {
        let (lines, all) = from.into_iter().unzip();
        Self { all, lines }
    }
}

/// Reads all examples of a file.
pub(in crate::cli) fn read(path: &Path, columns: &Columns) -> Result<Found<pb::Example>, CliError> {
    let from = |content: &str, delimiter| match delimiter {
        Some(delimiter) => table(content, delimiter, columns),
        None => lines(content, |line| object(line, columns)),
    };
    opened(path, "examples", from)
}

/// Reads all inputs of a file, whatever they are labelled by.
pub(super) fn inputs(
    path: &Path,
    text: &str,
    how: &TextArgs,
) -> Result<Found<pb::Input>, CliError> {
    let from = |content: &str, delimiter| match delimiter {
        Some(delimiter) => texts(content, delimiter, text, how),
        None => lines(content, |line| {
            let object: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
            input(&object, text, how)
        }),
    };
    opened(path, "inputs", from)
}

/// Reads a file by its ending, which says by what columns are parted, where there are columns.
fn opened<T>(
    path: &Path,
    what: &str,
    from: impl FnOnce(&str, Option<u8>) -> Result<Found<T>, String>,
) -> Result<Found<T>, CliError> {
    let bytes = fs::read(path)
        .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", path.display())))?;
    let named = |e: String| CliError::new(format!("\"{}\": {e}", path.display()));
    let ending = path.extension().and_then(|e| e.to_str());
    let delimiter = match ending.map(str::to_ascii_lowercase).as_deref() {
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
    let found = content(&bytes)
        .and_then(|content| from(content, delimiter))
        .map_err(named)?;
    if found.all.is_empty() {
        return Err(named(format!("there are no {what} in it")));
    }
    Ok(found)
}

/// The text of a file, without the mark that some programs put before it.
fn content(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        format!("line {} is not UTF-8", 1 + newlines(before))
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b == b'\n').count()
}

/// Examples of a table. Tabs stand for themselves: quotes mean nothing in a `.tsv`.
pub(in crate::cli) fn table(
    content: &str,
    delimiter: u8,
    columns: &Columns,
) -> Result<Found<pb::Example>, String> {
    let (heading, records) = records(content, delimiter)?;
    let text = need(&heading, &columns.text, "--text-column")?;
    let label = need(&heading, &columns.label, "--label-column")?;
    let part = column(&heading, &columns.part);
    let read = |record: &csv::StringRecord| {
        let cell = |at: usize| record.get(at).unwrap_or_default();
        let label = cell(label).trim();
        let of = if columns.numbers {
            Of::Number(number(label, &columns.label)?)
        } else {
            Of::Label(class(label.to_owned(), &columns.label)?)
        };
        let part = part_of(part.map(cell))?;
        Ok(example(columns.how.input(cell(text)), of, part))
    };
    records
        .map(|record| {
            let (line, record) = record?;
            let example = read(&record).map_err(|e: String| format!("line {line}: {e}"))?;
            Ok((line, example))
        })
        .collect()
}

fn texts(
    content: &str,
    delimiter: u8,
    text: &str,
    how: &TextArgs,
) -> Result<Found<pb::Input>, String> {
    let (heading, records) = records(content, delimiter)?;
    let text = need(&heading, text, "--text-column")?;
    records
        .map(|record| {
            let (line, record) = record?;
            Ok((line, how.input(record.get(text).unwrap_or_default())))
        })
        .collect()
}

/// A record of a table with the line at which it begins, or what is wrong with it.
type Record = Result<(usize, csv::StringRecord), String>;

/// The heading of a table, and its records.
fn records(
    content: &str,
    delimiter: u8,
) -> Result<(csv::StringRecord, impl Iterator<Item = Record>), String> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter != b'\t')
        .flexible(true)
        .from_reader(content.as_bytes());
    let heading = reader.headers().map_err(|e| e.to_string())?.clone();
    let width = heading.len();
    let mut at = Place::new(content);
    let records = reader.into_records().filter_map(move |record| {
        let record = match record {
            Ok(record) => record,
            Err(e) => return Some(Err(e.to_string())),
        };
        let line = at.go(&record);
        if at.blank() {
            return None;
        }
        Some(match record.len() {
            cells if cells == width => Ok((line, record)),
            cells => Err(format!(
                "line {line} has {cells} columns, and the heading has {width}"
            )),
        })
    });
    Ok((heading, records))
}

/// A place in a table.
struct Place<'a> {
    content: &'a str,
    byte: usize,
    line: usize,
}

impl<'a> Place<'a> {
    fn new(content: &'a str) -> Self {
        Self {
            content,
            byte: 0,
            line: 1,
        }
    }

    /// Goes on to where a record begins, and gives its line. To the reader, empty lines before a record belong to it.
    fn go(&mut self, record: &csv::StringRecord) -> usize {
        let begins = record.position().map(csv::Position::byte);
        let begins = begins.and_then(|byte| usize::try_from(byte).ok());
        let rest = self.rest();
        let passed = begins.map_or(0, |byte| byte.saturating_sub(self.byte).min(rest.len()));
        let ends = rest[passed..]
            .iter()
            .take_while(|b| matches!(b, b'\n' | b'\r'));
        let passed = passed + ends.count();
        self.line += newlines(&rest[..passed]);
        self.byte += passed;
        self.line
    }

    /// Whether the line holds nothing but white space.
    fn blank(&self) -> bool {
        let line = self.rest().split(|b| *b == b'\n').next();
        line.is_none_or(|line| String::from_utf8_lossy(line).trim().is_empty())
    }

    fn rest(&self) -> &'a [u8] {
        &self.content.as_bytes()[self.byte..]
    }
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

fn lines<T>(content: &str, each: impl Fn(&str) -> Result<T, String>) -> Result<Found<T>, String> {
    content
        .lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, at)| Ok((at, each(line).map_err(|e| format!("line {at}: {e}"))?)))
        .collect()
}

fn object(line: &str, columns: &Columns) -> Result<pb::Example, String> {
    let object: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let input = input(&object, &columns.text, &columns.how)?;
    let of = match tokens(&object)? {
        Some(tokens) => Of::Tokens(tokens),
        None => whole(&object[&columns.label], columns)?,
    };
    let part = match &object[&columns.part] {
        Value::Null => pb::Part::Unspecified,
        Value::String(text) => part_of(Some(text))?,
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            return Err(format!("\"{}\": {other} is no text", columns.part));
        }
    };
    Ok(example(input, of, part))
}

/// The labels of tokens, where there are some.
fn tokens(object: &Value) -> Result<Option<pb::TokenLabels>, String> {
    let labels = match (object["spans"].as_array(), object["positions"].as_array()) {
        (Some(spans), _) => pb::TokenLabels {
            spans: spans.iter().map(span).collect::<Result<_, _>>()?,
            ..pb::TokenLabels::default()
        },
        (None, Some(positions)) => pb::TokenLabels {
            positions: positions.iter().map(position).collect::<Result<_, _>>()?,
            ..pb::TokenLabels::default()
        },
        (None, None) => return Ok(None),
    };
    Ok(Some(labels))
}

/// The label of a whole input.
fn whole(label: &Value, columns: &Columns) -> Result<Of, String> {
    let column = &columns.label;
    match (label, name(label)) {
        (Value::String(text), _) if columns.numbers => Ok(Of::Number(number(text, column)?)),
        (Value::Number(n), _) if columns.numbers => Ok(Of::Number(n.as_f64().unwrap_or(f64::NAN))),
        (_, Some(name)) if !columns.numbers => Ok(Of::Label(class(name, column)?)),
        _ => Err(format!(
            "\"{column}\" is no label, and there are no \"spans\" of start, end and label, and no \"positions\" of position and label",
        )),
    }
}

/// The name of a class, which may be a number or a truth value.
fn name(label: &Value) -> Option<String> {
    match label {
        Value::String(name) => Some(name.clone()),
        Value::Number(_) | Value::Bool(_) => Some(label.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A name that says something.
fn class(name: String, column: &str) -> Result<String, String> {
    if name.trim().is_empty() {
        return Err(format!("\"{column}\" is empty: every example has a label"));
    }
    Ok(name)
}

/// A text, or "ids" of tokens.
fn input(object: &Value, text: &str, how: &TextArgs) -> Result<pb::Input, String> {
    if let Value::Array(ids) = &object["ids"] {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = ids.iter().map(id).collect();
        return Ok(of_ids(&ids.ok_or("\"ids\" are not all ids of tokens")?));
    }
    let found = object[text].as_str();
    found
        .map(|text| how.input(text))
        .ok_or_else(|| format!("\"{text}\" is no text, and there are no \"ids\""))
}

fn position(labelled: &Value) -> Result<pb::PositionLabel, String> {
    let at = labelled["position"].as_i64();
    match (
        at.and_then(|n| i32::try_from(n).ok()),
        name(&labelled["label"]),
    ) {
        (Some(position), Some(name)) => Ok(pb::PositionLabel {
            position,
            label: class(name, "positions.label")?,
        }),
        _ => Err(format!("{labelled} is no position with its label")),
    }
}

fn span(span: &Value) -> Result<pb::SpanLabel, String> {
    let byte = |key: &str| span[key].as_u64().and_then(|n| u32::try_from(n).ok());
    match (byte("start"), byte("end"), name(&span["label"])) {
        (Some(start), Some(end), Some(name)) => Ok(pb::SpanLabel {
            start,
            end,
            label: class(name, "spans.label")?,
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

fn number(text: &str, column: &str) -> Result<f64, String> {
    let number = text.trim().parse();
    number.map_err(|_| format!("\"{column}\": \"{}\" is no number", text.trim()))
}

fn part_of(text: Option<&str>) -> Result<pb::Part, String> {
    let text = text.unwrap_or_default().trim();
    match text.to_ascii_lowercase().as_str() {
        "" => Ok(pb::Part::Unspecified),
        "train" => Ok(pb::Part::Train),
        "test" | "validation" | "dev" => Ok(pb::Part::Test),
        _ => Err(format!("\"{text}\" is neither train nor test")),
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
            how: TextArgs::default(),
        }
    }

    #[test]
    fn tables_are_read_by_their_heading() {
        let tsv = "label\ttext\tsplit\ngood\tso \"nice\"\tTrain\nbad\tno\ttest\n";
        let found = table(tsv, b'\t', &columns(false)).unwrap().all;
        assert_eq!(found[0].of, Some(Of::Label("good".into())));
        assert_eq!(found[0].part, i32::from(pb::Part::Train));
        assert_eq!(found[1].part, i32::from(pb::Part::Test));
        let csv = "text,label\n\"a, b\",1.5\n";
        let found = table(csv, b',', &columns(true)).unwrap().all;
        assert_eq!(found[0].of, Some(Of::Number(1.5)));
        for (csv, part) in [
            ("words,label\na,b\n", "no column \"text\""),
            ("text,label\na,b\n", "line 2: \"label\": \"b\" is no number"),
            ("text,label,split\na,1,later\n", "neither train nor test"),
            (
                "text,label\na\n",
                "line 2 has 1 columns, and the heading has 2",
            ),
        ] {
            let error = table(csv, b',', &columns(true)).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn lines_are_those_at_which_records_begin() {
        for (delimiter, content, lines) in [
            (b',', "text,label\n\"a\nb\",x\nc,y\n", vec![2, 4]),
            (b',', "text,label\n\n\na,x\n\nb,y", vec![4, 6]),
            (
                b',',
                "text,label\r\na,x\r\n\r\n\"b\r\n\",y\r\nc,x\r\n",
                vec![2, 4, 6],
            ),
            (
                b',',
                "text,label\n  \na,x\n \u{3000}\n\" \",y\n \n",
                vec![3, 5],
            ),
            (
                b'\t',
                "text\tlabel\n\t\n\"a\tx\n \t \nb\ty\n\t\t\t\n",
                vec![3, 5],
            ),
        ] {
            let found = table(content, delimiter, &columns(false)).unwrap();
            assert_eq!(found.lines, lines, "{content:?}");
        }
        let found = texts("text\na\n  \nb\n", b',', "text", &TextArgs::default()).unwrap();
        assert_eq!(found.lines, [2, 4]);
        let error = table("text,label\n\"a\nb\",1\nc,x\n", b',', &columns(true)).unwrap_err();
        assert!(error.starts_with("line 4: "), "{error}");
        assert_eq!(content(b"a\nb\xe9"), Err("line 2 is not UTF-8".to_owned()));
    }

    #[test]
    fn objects_have_labels_or_spans() {
        let found = object("{\"text\": \"a\", \"label\": 3}", &columns(false)).unwrap();
        assert_eq!(found.of, Some(Of::Label("3".into())));
        let line = "{\"text\": \"ab\", \"spans\": [{\"start\": 0, \"end\": 2, \"label\": 1}]}";
        let found = object(line, &columns(false)).unwrap();
        assert!(matches!(found.of, Some(Of::Tokens(t)) if t.spans[0].label == "1"));
        let line = "{\"ids\": [2, 7], \"positions\": [{\"position\": -1, \"label\": true}]}";
        let found = object(line, &columns(false)).unwrap();
        let Some(Of::Tokens(t)) = found.of else {
            panic!("{found:?}");
        };
        assert_eq!(
            (t.positions[0].position, &*t.positions[0].label),
            (-1, "true")
        );
        assert!(object("{\"ids\": [-2], \"label\": \"x\"}", &columns(false)).is_err());
        assert!(object("{\"text\": \"a\"}", &columns(false)).is_err());
        assert!(object("{\"label\": \"a\"}", &columns(false)).is_err());
        assert!(object("{\"text\": \"a\", \"label\": true}", &columns(true)).is_err());
    }

    #[test]
    fn labels_say_something() {
        let error = table("text,label\na,x\nb, \n", b',', &columns(false)).unwrap_err();
        assert!(error.contains("line 3: \"label\" is empty"), "{error}");
        for (given, part) in [
            ("\"label\": \" \"", "\"label\" is empty"),
            (
                "\"spans\": [{\"start\": 0, \"end\": 1, \"label\": \"\"}]",
                "\"spans.label\" is empty",
            ),
            (
                "\"positions\": [{\"position\": 0, \"label\": \"\\t\"}]",
                "\"positions.label\" is empty",
            ),
        ] {
            let line = format!("\n{{\"text\": \"a\", {given}}}\n");
            let error = lines(&line, |line| object(line, &columns(false))).unwrap_err();
            assert!(error.contains(&format!("line 2: {part}")), "{error}");
        }
    }

    #[test]
    fn parts_are_texts() {
        let of = |split: &str| {
            let line = format!("{{\"text\": \"a\", \"label\": 1, \"split\": {split}}}");
            object(&line, &columns(false)).map(|e| e.part())
        };
        assert_eq!(of("\"TEST\""), Ok(pb::Part::Test));
        assert_eq!(of("null"), Ok(pb::Part::Unspecified));
        assert_eq!(of("1"), Err("\"split\": 1 is no text".to_owned()));
    }
}
