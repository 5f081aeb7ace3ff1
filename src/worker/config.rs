//! What the files beside a model say about it: `config.json`, `tokenizer_config.json`, and the operator's `introspect.toml`, which
//! overrides them. All are optional, and none is believed: sizes, depth and contents are bounded.
//!
//! Left out: everything that the anatomy measures (layers, heads, widths) and the name of the architecture.

use std::collections::BTreeMap;

use bytes::Bytes;
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::Value;

use super::json;
use crate::{
    ipc::info::Task,
    onnx::{Folder, OnnxError},
};

/// Largest of these files in bytes.
const LARGEST: u64 = 4 << 20;
/// Most classes.
const MOST_LABELS: usize = 100_000;
/// Longest name of a class in bytes.
const LONGEST_LABEL: usize = 512;
/// A longer limit of positions means "none" (exporters write 1e30).
const UNLIMITED: u64 = 1 << 24;

/// Of a model's files what the runtime does not show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ModelConfig {
    /// Names of the classes, by index.
    pub(super) labels: Vec<String>,
    /// Most tokens of a row.
    pub(super) max_positions: Option<usize>,
    /// The padding token.
    pub(super) pad_id: Option<u32>,
    /// Token strings by role: `pad_token`, `mask_token`, `unk_token`.
    pub(super) tokens: BTreeMap<String, String>,
    /// What the operator says the model is for.
    pub(super) task: Option<Task>,
    /// The output that explanations are about, if the operator names one.
    pub(super) main_output: Option<String>,
}

/// The operator's file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    task: Option<Task>,
    labels: Option<Vec<String>>,
    pad_id: Option<u32>,
    max_tokens: Option<usize>,
    main_output: Option<String>,
}

impl ModelConfig {
    /// Reads the files of a folder.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub(super) fn read(folder: &Folder) -> Result<Self, String> {
        let mut config = Self::default();
        if let Some(value) = document(folder, "config.json")? {
            config.take_model(&value)?;
        }
        if let Some(value) = document(folder, "tokenizer_config.json")? {
            config.take_tokenizer(&value);
        }
        if let Some(bytes) = optional(folder, "introspect.toml", LARGEST)? {
            let text = std::str::from_utf8(&bytes)
                .map_err(|_| "\"introspect.toml\" is not UTF-8".to_owned())?;
            let manifest: Manifest = toml::from_str(text)
                .map_err(|e| format!("\"introspect.toml\": {}", e.message()))?;
            config.override_by(manifest)?;
        }
        Ok(config)
    }

    fn take_model(&mut self, value: &Value) -> Result<(), String> {
        if let Some(names) = value.get("id2label").and_then(Value::as_object) {
            self.labels =
                labels(names).map_err(|why| format!("\"config.json\": id2label {why}"))?;
        }
        self.max_positions = [
            "max_position_embeddings",
            "n_positions",
            "max_sequence_length",
        ]
        .iter()
        .find_map(|key| positions(value.get(*key)?));
        self.pad_id = value
            .get("pad_token_id")
            .and_then(Value::as_u64)
            .and_then(|id| u32::try_from(id).ok());
        Ok(())
    }

    fn take_tokenizer(&mut self, value: &Value) {
        // The tokenizer's limit counts tokens; a position table may have rows that no token uses.
        let limit = value.get("model_max_length").and_then(positions);
        self.max_positions = [self.max_positions, limit].into_iter().flatten().min();
        for role in ["pad_token", "mask_token", "unk_token"] {
            let token = value.get(role);
            let content = token.and_then(|t| t.get("content")).or(token);
            if let Some(content) = content.and_then(Value::as_str) {
                self.tokens.insert(role.to_owned(), content.to_owned());
            }
        }
    }

    fn override_by(&mut self, manifest: Manifest) -> Result<(), String> {
        if let Some(labels) = manifest.labels {
            bounded(&labels).map_err(|why| format!("\"introspect.toml\": labels {why}"))?;
            self.labels = labels;
        }
        if manifest.max_tokens == Some(0) {
            return Err("\"introspect.toml\": max_tokens must be at least 1".to_owned());
        }
        self.max_positions = manifest.max_tokens.or(self.max_positions);
        self.pad_id = manifest.pad_id.or(self.pad_id);
        self.task = manifest.task;
        self.main_output = manifest.main_output;
        Ok(())
    }
}

/// A small file that need not be there.
pub(super) fn optional(folder: &Folder, name: &str, limit: u64) -> Result<Option<Bytes>, String> {
    match folder.map(name, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(OnnxError::Io { why, .. }) if why == Errno::NOENT.to_string() => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

fn document(folder: &Folder, name: &str) -> Result<Option<Value>, String> {
    let Some(bytes) = optional(folder, name, LARGEST)? else {
        return Ok(None);
    };
    json::check(&bytes).map_err(|why| format!("\"{name}\": {why}"))?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| format!("\"{name}\": {e}"))?;
    if !value.is_object() {
        return Err(format!("\"{name}\" is not a JSON object"));
    }
    Ok(Some(value))
}

fn positions(value: &Value) -> Option<usize> {
    let n = value.as_u64().filter(|n| (1..UNLIMITED).contains(n))?;
    usize::try_from(n).ok()
}

/// Names by index, which must be 0, 1, 2, …
fn labels(names: &serde_json::Map<String, Value>) -> Result<Vec<String>, String> {
    let mut labels = vec![None; names.len().min(MOST_LABELS + 1)];
    for (index, name) in names {
        let place = index
            .parse::<usize>()
            .ok()
            .and_then(|i| labels.get_mut(i))
            .ok_or_else(|| format!("has the index {:?}", shortened(index)))?;
        let name = name
            .as_str()
            .ok_or_else(|| format!("{:?} is not a name", shortened(index)))?;
        *place = Some(name.to_owned());
    }
    let labels: Vec<String> = labels
        .into_iter()
        .collect::<Option<_>>()
        .ok_or("leaves an index out")?;
    bounded(&labels)?;
    Ok(labels)
}

fn bounded(labels: &[String]) -> Result<(), String> {
    if labels.len() > MOST_LABELS {
        return Err(format!("has more than {MOST_LABELS} names"));
    }
    match labels.iter().find(|l| l.len() > LONGEST_LABEL) {
        Some(long) => Err(format!("has a name of {} bytes", long.len())),
        None => Ok(()),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<ModelConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        ModelConfig::read(&Folder::open(folder.path()).unwrap())
    }

    #[test]
    fn a_folder_without_files_says_nothing() {
        assert_eq!(read(&[]), Ok(ModelConfig::default()));
    }

    #[test]
    fn the_manifest_overrides_what_the_files_say() {
        let config =
            r#"{"id2label":{"1":"b","0":"a"},"max_position_embeddings":514,"pad_token_id":1}"#;
        let tokens =
            r#"{"model_max_length":512,"pad_token":"<pad>","mask_token":{"content":"<mask>"}}"#;
        let got = read(&[("config.json", config), ("tokenizer_config.json", tokens)]).unwrap();
        assert_eq!(got.labels, ["a", "b"]);
        assert_eq!((got.max_positions, got.pad_id), (Some(512), Some(1)));
        assert_eq!(got.tokens["mask_token"], "<mask>");
        let manifest = "task = \"masked_lm\"\nlabels = [\"x\"]\nmax_tokens = 64\npad_id = 7";
        let got = read(&[("config.json", config), ("introspect.toml", manifest)]).unwrap();
        assert_eq!(got.labels, ["x"]);
        assert_eq!((got.max_positions, got.pad_id), (Some(64), Some(7)));
        assert_eq!(got.task, Some(Task::MaskedLm));
    }

    #[test]
    fn limits_that_mean_none_are_none() {
        let got = read(&[("tokenizer_config.json", r#"{"model_max_length":1e30}"#)]).unwrap();
        assert_eq!(got.max_positions, None);
    }

    #[test]
    fn hostile_files_are_errors_that_name_the_file() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for (name, text) in [
            ("config.json", "{"),
            ("config.json", "[1]"),
            ("config.json", deep.as_str()),
            ("config.json", r#"{"a":1,"a":2}"#),
            ("config.json", r#"{"id2label":{"0":"a","2":"b"}}"#),
            (
                "config.json",
                r#"{"id2label":{"18446744073709551615":"a"}}"#,
            ),
            ("config.json", r#"{"id2label":{"0":5}}"#),
            ("introspect.toml", "taks = \"masked_lm\""),
            ("introspect.toml", "max_tokens = 0"),
        ] {
            let got = read(&[(name, text)]).unwrap_err();
            assert!(got.contains(name) && got.len() < 1000, "{got}");
        }
    }

    #[test]
    fn a_file_that_is_a_link_is_refused_rather_than_left_out() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", folder.path().join("config.json")).unwrap();
        let got = ModelConfig::read(&Folder::open(folder.path()).unwrap());
        assert!(got.unwrap_err().contains("config.json"));
    }
}
