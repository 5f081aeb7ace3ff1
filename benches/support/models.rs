//! The models that are measured, and texts for them.

use std::path::{Path, PathBuf};

/// The committed demo model: four layers of 128, a classifier.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-model")
}

/// The folder of all-MiniLM-L6-v2: six layers of 384, an encoder.
pub fn minilm() -> PathBuf {
    made(
        "INTROSPECTD_BENCH_MINILM",
        "minilm",
        "$PY assets/make/minilm.py target/assets/minilm",
    )
}

/// The folder of a sentiment classifier of MiniLM's size.
pub fn classifier() -> PathBuf {
    made(
        "INTROSPECTD_BENCH_CLASSIFIER",
        "sentiment-teacher",
        "$PY assets/make/data.py target/assets && $PY assets/make/teacher.py target/assets/sentiment-teacher",
    )
}

fn made(variable: &str, name: &str, command: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os(variable).map_or_else(
        || root.join("target/assets").join(name),
        |named| root.join(named),
    );
    if !folder.join("model.onnx").is_file() {
        eprintln!(
            "this bench needs a model that is not committed: there is no model.onnx in {}.\n\
             Name its folder with {variable}, or make it, from the root of the repository (assets/README.md says more):\n\
             \x20   python3 -m venv target/assets/venv\n\
             \x20   target/assets/venv/bin/pip install -r assets/make/requirements.txt\n\
             \x20   PY=target/assets/venv/bin/python\n\
             \x20   {command}",
            folder.display()
        );
        std::process::exit(2);
    }
    folder
}

/// Token ids of a row of this length: `[CLS]`, words, `[SEP]`. The same for the same seed.
pub fn row(length: usize, seed: u64) -> Vec<i64> {
    const WORDS: std::ops::Range<u64> = 1000..8000; // of every vocabulary that is measured here
    let mut state = seed.wrapping_add(1);
    let mut ids: Vec<i64> = (0..length)
        .map(|_| {
            let word = WORDS.start + splitmix(&mut state) % (WORDS.end - WORDS.start);
            i64::try_from(word).expect("words are small numbers")
        })
        .collect();
    ids[0] = 2;
    ids[length - 1] = 3;
    ids
}

/// Steele, Lea and Flood 2014: a generator that needs no crate.
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
