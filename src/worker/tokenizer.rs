//! Text to tokens: `tokenizer.json`, kept on a short leash.
//!
//! What it promises, whatever the file says:
//! - offsets are bytes of the text as given, on character boundaries, `start <= end <= text length`;
//! - no padding, and truncation only when the caller asks: what the file sets is ignored;
//! - no token id outside the model's embedding;
//! - text is bounded before it is tokenised; awkward strings were tried when the model was loaded.
//!
//! A tokenizer that panics is refused. One that aborts or never ends takes the worker with it, which the front notices; nothing in
//! this process can do better.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use tokenizers::{
    Encoding, NormalizedString, Normalizer as _, PostProcessor as _, Tokenizer as Inner,
    processors::PostProcessorWrapper,
    utils::truncation::{TruncationParams, truncate_encodings},
};

use super::{
    config::{self, ModelConfig},
    json,
};
use crate::{
    ipc::{
        info::TokenizerInfo,
        wire::{self, Text},
    },
    onnx::Folder,
};

const FILE: &str = "tokenizer.json";
/// Largest file in bytes.
const LARGEST: u64 = 64 << 20;
/// No vocabulary has tokens longer than this on average: a text with more characters per token of the limit is too long.
const CHARACTERS_PER_TOKEN: usize = 250;
/// Most bytes that normalising may make of one; Unicode's own decompositions stay below twelve.
const LARGEST_GROWTH: usize = 32;
/// Longest time that one awkward string may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bounds that do not stand in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Rows of the model's embedding, if known.
    pub(super) vocab: Option<usize>,
    /// Most tokens of an input.
    pub(super) max_tokens: usize,
    /// Largest text in bytes.
    pub(super) max_text_bytes: usize,
}

/// A tokenizer that passed its self-test.
pub(super) struct Tokenizer {
    /// Without post-processor: that one runs after our truncation.
    inner: Inner,
    processor: Option<PostProcessorWrapper>,
    bounds: Bounds,
    info: TokenizerInfo,
}

/// What is wrong with a text: the field and the reason.
type TextError = (String, String);

impl Tokenizer {
    /// Reads `tokenizer.json`, if the folder has one.
    ///
    /// # Errors
    /// Says what is wrong with the file.
    pub(super) fn load(
        folder: &Folder,
        config: &ModelConfig,
        bounds: Bounds,
    ) -> Result<Option<Self>, String> {
        let Some(bytes) = config::optional(folder, FILE, LARGEST)? else {
            return Ok(None);
        };
        let refuse = |why: String| format!("\"{FILE}\": {why}");
        json::check(&bytes).map_err(refuse)?;
        let made = guarded(|| {
            let inner = Inner::from_bytes(&bytes).map_err(|e| e.to_string())?;
            Self::wrap(inner, config, bounds)
        });
        let made = made.and_then(|t| t.self_test().map(|()| t));
        made.map(Some).map_err(refuse)
    }

    fn wrap(mut inner: Inner, config: &ModelConfig, bounds: Bounds) -> Result<Self, String> {
        let file_limit = inner
            .get_truncation()
            .map(|t| t.max_length)
            .filter(|n| *n > 0);
        let file_pad = inner.get_padding().map(|p| p.pad_id);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        let processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let vocab = inner.get_vocab(true);
        let largest = vocab
            .values()
            .copied()
            .max()
            .ok_or("the vocabulary is empty")?;
        let ids = largest as usize + 1;
        if let Some(rows) = bounds.vocab
            && ids > rows
        {
            return Err(format!(
                "it has token ids up to {largest}, the model's embedding has {rows} rows"
            ));
        }
        let max_tokens = file_limit.map_or(bounds.max_tokens, |n| n.min(bounds.max_tokens));
        let added = processor
            .as_ref()
            .map_or(0, |p| p.added_tokens(false).max(p.added_tokens(true)));
        if added >= max_tokens {
            return Err(format!(
                "it adds {added} tokens to an input of at most {max_tokens}"
            ));
        }
        let named = |role: &str, usual: &[&str]| {
            let configured = config.tokens.get(role).map(String::as_str);
            configured
                .into_iter()
                .chain(usual.iter().copied())
                .find_map(|token| vocab.get(token).copied())
        };
        let mut special_ids: Vec<u32> = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        special_ids.sort_unstable();
        let pad_id = config
            .pad_id
            .or(file_pad)
            .filter(|id| (*id as usize) < bounds.vocab.unwrap_or(ids))
            .or_else(|| named("pad_token", &["[PAD]", "<pad>", "<|pad|>"]))
            .unwrap_or(0);
        let info = TokenizerInfo {
            vocab: ids,
            max_tokens,
            pad_id,
            mask_id: named("mask_token", &["[MASK]", "<mask>"]),
            unk_id: named("unk_token", &["[UNK]", "<unk>"]),
            special_ids,
        };
        Ok(Self {
            inner,
            processor,
            bounds: Bounds {
                max_tokens,
                ..bounds
            },
            info,
        })
    }

    /// What the front needs to know.
    pub(super) fn info(&self) -> TokenizerInfo {
        self.info.clone()
    }

    /// Tokens of texts, or the field of the first that cannot be.
    pub(super) fn encode(
        &self,
        texts: &[Text],
        special: bool,
        truncate: bool,
    ) -> Result<Vec<wire::Encoding>, TextError> {
        texts
            .iter()
            .enumerate()
            .map(|(at, text)| {
                guarded(|| self.encode_one(text, special, truncate))
                    .map_err(|why| (format!("texts[{at}]"), why))
            })
            .collect()
    }

    /// Vocabulary strings of token ids.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<Vec<String>, TextError> {
        ids.iter()
            .enumerate()
            .map(|(at, id)| {
                self.inner.id_to_token(*id).ok_or_else(|| {
                    let why = format!(
                        "token id {id} is not in the vocabulary of {}",
                        self.info.vocab
                    );
                    (format!("ids[{at}]"), why)
                })
            })
            .collect()
    }

    fn encode_one(
        &self,
        text: &Text,
        special: bool,
        truncate: bool,
    ) -> Result<wire::Encoding, String> {
        let first = self.bounded(&text.text, truncate)?;
        let second = text
            .pair
            .as_deref()
            .map(|t| self.bounded(t, truncate))
            .transpose()?;
        let first_raw = self.raw(first)?;
        let mut second_raw = second.map(|t| self.raw(t)).transpose()?;
        if let Some(pair) = &mut second_raw {
            pair.set_type_ids(vec![1; pair.len()]);
        }
        let given = first_raw.len() + second_raw.as_ref().map_or(0, Encoding::len);
        let added = match (&self.processor, special) {
            (Some(p), true) => p.added_tokens(second_raw.is_some()),
            (Some(_), false) | (None, _) => 0,
        };
        let room = self.bounds.max_tokens - added;
        if given > room && !truncate {
            return Err(format!(
                "the text has {} tokens, the model takes at most {}: shorten it or ask for truncation",
                given + added,
                self.bounds.max_tokens
            ));
        }
        let params = TruncationParams {
            max_length: room,
            ..TruncationParams::default()
        };
        let (mut first_raw, mut second_raw) =
            truncate_encodings(first_raw, second_raw, &params).map_err(|e| e.to_string())?;
        // What was cut off is not wanted, and the processor would dress every piece of it.
        first_raw.take_overflowing();
        if let Some(pair) = &mut second_raw {
            pair.take_overflowing();
        }
        let kept = first_raw.len() + second_raw.as_ref().map_or(0, Encoding::len);
        let done = self.post_process(first_raw, second_raw, special)?;
        let encoding = on_the_wire(&done, first, second, given - kept);
        self.check(&encoding)?;
        Ok(encoding)
    }

    /// The text as far as it can matter; an error when it is longer and must not be cut.
    fn bounded<'a>(&self, text: &'a str, truncate: bool) -> Result<&'a str, String> {
        if text.len() > self.bounds.max_text_bytes {
            return Err(format!(
                "the text has {} bytes, more than the limit of {}",
                text.len(),
                self.bounds.max_text_bytes
            ));
        }
        let most = self.bounds.max_tokens.saturating_mul(CHARACTERS_PER_TOKEN);
        match text.char_indices().nth(most) {
            None => Ok(text),
            Some((end, _)) if truncate => Ok(&text[..end]),
            Some(_) => Err(format!(
                "the text has more than {most} characters, which is too long for {} tokens",
                self.bounds.max_tokens
            )),
        }
    }

    fn raw(&self, text: &str) -> Result<Encoding, String> {
        self.inner.encode(text, false).map_err(|e| e.to_string())
    }

    fn post_process(
        &self,
        first: Encoding,
        second: Option<Encoding>,
        special: bool,
    ) -> Result<Encoding, String> {
        match &self.processor {
            Some(p) => p.process(first, second, special).map_err(|e| e.to_string()),
            None => {
                let mut all = first;
                all.set_sequence_id(0);
                if let Some(mut pair) = second {
                    pair.set_sequence_id(1);
                    all.merge_with(pair, false);
                }
                Ok(all)
            }
        }
    }

    fn check(&self, encoding: &wire::Encoding) -> Result<(), String> {
        if encoding.ids.len() > self.bounds.max_tokens {
            return Err(format!(
                "the tokenizer gave {} tokens where at most {} fit",
                encoding.ids.len(),
                self.bounds.max_tokens
            ));
        }
        let ids = self.bounds.vocab.unwrap_or(self.info.vocab);
        match encoding.ids.iter().find(|id| **id as usize >= ids) {
            Some(bad) => Err(format!("the tokenizer gave token id {bad} of {ids}")),
            None => Ok(()),
        }
    }

    /// Chained replacements can multiply a text; the next string would then take all memory.
    fn refuse_growth(&self, text: &str) -> Result<(), String> {
        let Some(normalizer) = self.inner.get_normalizer() else {
            return Ok(());
        };
        let mut normalized = NormalizedString::from(text);
        normalizer
            .normalize(&mut normalized)
            .map_err(|e| e.to_string())?;
        let most = text.len() * LARGEST_GROWTH + 64;
        if normalized.get().len() > most {
            return Err(format!(
                "normalising makes {} bytes of {}",
                normalized.get().len(),
                text.len()
            ));
        }
        Ok(())
    }

    /// Encodes and decodes strings on which tokenizers are known to fail.
    fn self_test(&self) -> Result<(), String> {
        for text in awkward() {
            let started = Instant::now();
            let shown: String = text.chars().take(20).collect();
            let failed = |why: String| format!("it fails on {shown:?}: {why}");
            guarded(|| {
                self.refuse_growth(&text)?;
                for pair in [None, Some(text.clone())] {
                    let text = Text {
                        text: text.clone(),
                        pair,
                    };
                    for special in [true, false] {
                        let encoding = self.encode_one(&text, special, true)?;
                        self.inner
                            .decode(&encoding.ids, false)
                            .map_err(|e| e.to_string())?;
                    }
                }
                Ok(())
            })
            .map_err(failed)?;
            if started.elapsed() > PATIENCE {
                return Err(failed(format!("it takes {:?}", started.elapsed())));
            }
        }
        Ok(())
    }
}

fn awkward() -> Vec<String> {
    let mut all: Vec<String> = [
        "",
        " ",
        "\0",
        "\t\r\n \u{a0}\u{2003}",
        "a",
        "Hello, world! 12345",
        "naïve café",
        "e\u{301}\u{302}\u{303}\u{304}",
        "\u{301}",
        "\u{202e}abc\u{202c}\u{200f}\u{feff}",
        "\u{fdfa}\u{fb2c}\u{1d160}",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "日本語のテキスト 한국어",
        "\u{10ffff}\u{fffd}\u{e000}",
        "[CLS] [SEP] [MASK] <s> </s> <|endoftext|>",
        "((((((((((((((((((((a",
    ]
    .map(str::to_owned)
    .into();
    all.push("a".repeat(4000));
    all.push(" ".repeat(4000));
    all.push("a ".repeat(2000));
    all.push("1".repeat(4000));
    all.push("\u{fdfa}".repeat(500));
    all.push("aA1!".repeat(1000));
    all
}

/// Runs the library, whose panics become errors.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // Nothing is left half-changed: the library is only read after it was loaded.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let said = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(format!("the tokenizer library panicked: {said}"))
    })
}

fn on_the_wire(e: &Encoding, text: &str, pair: Option<&str>, truncated: usize) -> wire::Encoding {
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let sequence: Vec<Option<usize>> = e.get_sequence_ids();
    let special: Vec<bool> = e
        .get_special_tokens_mask()
        .iter()
        .map(|m| *m == 1)
        .collect();
    let mut wire = wire::Encoding {
        ids: e.get_ids().to_vec(),
        type_ids: e.get_type_ids().to_vec(),
        tokens: e.get_tokens().to_vec(),
        truncated: small(truncated),
        ..wire::Encoding::default()
    };
    for (at, (start, end)) in e.get_offsets().iter().copied().enumerate() {
        let from_template = special.get(at).copied().unwrap_or(false);
        let in_pair = sequence.get(at).copied().flatten() == Some(1);
        let (start, end) = if from_template {
            (0, 0)
        } else {
            within(if in_pair { pair.unwrap_or("") } else { text }, start, end)
        };
        wire.starts.push(small(start));
        wire.ends.push(small(end));
        wire.special.push(from_template);
        wire.sequence.push(u32::from(in_pair));
        let word = e.get_word_ids().get(at).copied().flatten();
        wire.words.push(
            word.filter(|_| !from_template)
                .and_then(|w| i32::try_from(w).ok())
                .unwrap_or(-1),
        );
    }
    wire
}

/// A range of the text, widened to whole characters: byte-level vocabularies split them.
fn within(text: &str, start: usize, end: usize) -> (usize, usize) {
    let start = text.floor_char_boundary(start.min(text.len()));
    let end = text.ceil_char_boundary(end.clamp(start, text.len()));
    (start, end)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    const BOUNDS: Bounds = Bounds {
        vocab: Some(320),
        max_tokens: 128,
        max_text_bytes: 256 << 10,
    };

    fn fixture(model: &str) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/models")
            .join(model);
        let folder = Folder::open(&path).unwrap();
        let config = ModelConfig::read(&folder).unwrap();
        Tokenizer::load(&folder, &config, BOUNDS).unwrap().unwrap()
    }

    fn hostile(change: impl FnOnce(&mut serde_json::Value)) -> Result<(), String> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/models/bert.legacy14/tokenizer.json");
        let mut value = serde_json::from_slice(&fs::read(source).unwrap()).unwrap();
        change(&mut value);
        load(&value.to_string())
    }

    fn load(text: &str) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), text).unwrap();
        let folder = Folder::open(folder.path()).unwrap();
        Tokenizer::load(&folder, &ModelConfig::default(), BOUNDS).map(|t| assert!(t.is_some()))
    }

    fn one(
        t: &Tokenizer,
        text: &str,
        pair: Option<&str>,
        truncate: bool,
    ) -> Result<wire::Encoding, TextError> {
        let text = Text {
            text: text.to_owned(),
            pair: pair.map(str::to_owned),
        };
        Ok(t.encode(&[text], true, truncate)?.remove(0))
    }

    #[test]
    fn offsets_are_bytes_of_the_text_and_special_tokens_have_none() {
        for model in ["bert.legacy14", "gpt2.legacy14", "llama.legacy14"] {
            let t = fixture(model);
            let text = "Ünïcode 😀 wörks, the film";
            let e = one(&t, text, None, false).unwrap();
            let mut covered = vec![false; text.len()];
            for i in 0..e.ids.len() {
                let (start, end) = (e.starts[i] as usize, e.ends[i] as usize);
                assert!(
                    text.get(start..end).is_some(),
                    "{model}: {start}..{end} is a range of characters"
                );
                assert!(!e.special[i] || start == end);
                covered[start..end].fill(true);
            }
            let missed: String = text
                .char_indices()
                .filter(|(i, c)| !covered[*i] && !c.is_whitespace())
                .map(|(_, c)| c)
                .collect();
            assert_eq!(missed, "", "{model}: every character belongs to a token");
        }
    }

    #[test]
    fn a_pair_is_told_apart_and_truncation_cuts_the_longer_one() {
        let t = fixture("bert.legacy14");
        let e = one(&t, "the film", Some("a b"), false).unwrap();
        let (first, second): (Vec<_>, Vec<_>) = (0..e.ids.len())
            .filter(|i| !e.special[*i])
            .partition(|i| e.sequence[*i] == 0);
        assert!(!first.is_empty() && !second.is_empty());
        assert!(second.iter().all(|i| e.type_ids[*i] == 1));
        let long = "film ".repeat(500);
        let e = one(&t, &long, Some("the"), true).unwrap();
        assert_eq!(e.ids.len(), 128);
        assert!(e.truncated > 0);
        assert!(
            (0..128).any(|i| e.sequence[i] == 1 && !e.special[i]),
            "the short one is whole"
        );
    }

    #[test]
    fn too_long_is_an_error_that_names_the_text_and_the_limit() {
        let t = fixture("bert.legacy14");
        let (subject, why) = one(&t, &"film ".repeat(500), None, false).unwrap_err();
        assert_eq!(subject, "texts[0]");
        assert!(why.contains("at most 128"), "{why}");
        for text in [
            "x".repeat(300 << 10),
            "y".repeat(128 * CHARACTERS_PER_TOKEN + 1),
        ] {
            assert!(one(&t, &text, None, false).is_err());
        }
        assert!(one(&t, &"y".repeat(128 * CHARACTERS_PER_TOKEN + 1), None, true).is_ok());
    }

    #[test]
    fn padding_and_truncation_of_the_file_do_nothing() {
        let padding = serde_json::json!({
            "strategy": {"Fixed": 10_000_000}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"
        });
        let truncation = serde_json::json!({
            "direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 60
        });
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/models/bert.legacy14/tokenizer.json");
        let mut value: serde_json::Value =
            serde_json::from_slice(&fs::read(source).unwrap()).unwrap();
        value["padding"] = padding;
        value["truncation"] = truncation;
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), value.to_string()).unwrap();
        let folder = Folder::open(folder.path()).unwrap();
        let t = Tokenizer::load(&folder, &ModelConfig::default(), BOUNDS)
            .unwrap()
            .unwrap();
        assert_eq!(t.info().max_tokens, 64, "the file may lower the limit");
        assert!(one(&t, "the film", None, false).unwrap().ids.len() < 10);
    }

    #[test]
    fn ids_beyond_the_embedding_are_refused() {
        let got = hostile(|v| v["model"]["vocab"]["zzz"] = 5000.into()).unwrap_err();
        assert!(got.contains("up to 5000") && got.contains("320"), "{got}");
    }

    #[test]
    fn broken_files_are_errors_and_never_panics() {
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "{}",
            "[]",
            "null",
            "{\"version\":\"1.0\"}",
            "{\"a\":1,\"a\":2}",
            &deep,
        ] {
            assert!(load(text).is_err(), "{text:.40}");
        }
        let template = |v: &mut serde_json::Value| {
            v["post_processor"]["special_tokens"] = serde_json::json!({})
        };
        assert!(hostile(template).is_err(), "a template without its tokens");
        assert!(
            hostile(|v| v["model"]["vocab"] = serde_json::json!({})).is_err(),
            "no vocabulary"
        );
        assert!(
            hostile(|v| v["model"]["unk_token"] = "none".into()).is_err(),
            "no unknown token"
        );
        let growth = serde_json::json!({"type": "Sequence", "normalizers": vec![
            serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}); 6]});
        let grown = hostile(|v| v["normalizer"] = growth);
        assert!(grown.is_err(), "text that grows a millionfold");
    }

    #[test]
    fn ids_come_back_as_the_vocabulary_spells_them() {
        let t = fixture("bert.legacy14");
        let e = one(&t, "the film", None, false).unwrap();
        assert_eq!(t.decode(&e.ids).unwrap(), e.tokens);
        assert_eq!(t.decode(&[0, 99_999]).unwrap_err().0, "ids[1]");
    }
}
