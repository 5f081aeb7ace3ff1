//! `probe`: trained from files, shown, scored, moved about, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

/// A repository with one model, and a file of examples.
struct Place {
    folder: tempfile::TempDir,
    model: String,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("models/bert");
        std::fs::create_dir_all(&model).unwrap();
        for entry in std::fs::read_dir(fixture("bert.legacy14")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        let model = model.display().to_string();
        Self { folder, model }
    }

    fn file(&self, name: &str, content: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Texts that begin with one of two words.
    fn examples(&self) -> String {
        let lines: String = (0..60)
            .map(|i| {
                let (word, label) = if i % 2 == 0 {
                    ("the", "yes")
                } else {
                    ("a", "no")
                };
                format!(
                    "{word} story {} of it {}\t{label}\n",
                    ["a", "in", "of"][i % 3],
                    i % 7
                )
            })
            .collect();
        self.file("words.tsv", &format!("text\tlabel\n{lines}"))
    }
}

#[test]
fn a_probe_goes_from_a_file_to_scores_and_pictures() {
    let place = Place::new();
    let data = place.examples();
    let model = place.model.as_str();
    let trained = run(&[
        "probe",
        "train",
        model,
        "--data",
        &data,
        "--name",
        "first",
        "--pooling",
        "cls",
        "--json",
    ])
    .ok();
    let told: Value = serde_json::from_str(&trained.out).unwrap();
    assert_eq!(told["labels"], serde_json::json!(["no", "yes"]));
    assert_eq!(told["train_examples"], 48);
    assert!(trained.err.contains("stored as first"), "{}", trained.err);
    let more = [
        "--codelength",
        "--learning-curve",
        "--labels",
        "yes,no",
        "--no-control",
    ];
    let told = run(&[&["probe", "train", model, "--data", &data][..], &more].concat())
        .ok()
        .out;
    for part in ["BITS", "COMPRESSION", "AFTER EXAMPLES"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let table = run(&["probe", "show", model, "first"]).ok().out;
    for part in [
        "HOOK POINT",
        "SELECTIVITY",
        "ECE",
        "logistic on 48 examples",
        "*",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    for (name, begins) in [
        ("curve.png", &b"\x89PNG"[..]),
        ("curve.html", b"<!doctype html>"),
    ] {
        let path = place.path(name);
        let told = run(&["probe", "show", model, "first", "-o", &path]).ok();
        assert!(told.out.contains("HOOK POINT"), "{}", told.out);
        assert!(std::fs::read(path).unwrap().starts_with(begins), "{name}");
    }
    let path = place.path("trained.html");
    let both = ["-o", &path, "--no-control", "--json"];
    let told = run(&[&["probe", "train", model, "--data", &data][..], &both].concat()).ok();
    serde_json::from_str::<Value>(&told.out).unwrap();
    assert!(std::fs::read(path).unwrap().starts_with(b"<!doctype html>"));
    let scored = run(&[
        "probe",
        "score",
        model,
        "first,first@hidden_states.1",
        "the story of it",
        "--json",
    ])
    .ok();
    let scored: Value = serde_json::from_str(&scored.out).unwrap();
    assert_eq!(scored["scores"][1]["hook"], "blocks.1.hook_resid_pre");
    assert!(scored["scores"][0]["input"]["label"].is_string());
    let page = run(&[
        "probe",
        "score",
        model,
        "first",
        "the story of it",
        "--per-token",
    ])
    .ok()
    .out;
    assert!(
        page.contains("(all)") && page.contains("PROBABILITY"),
        "{page}"
    );

    // All of a file, a line for each, in its order.
    let lines = run(&["probe", "score", model, "first", "--data", &data])
        .ok()
        .out;
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 60);
    assert_eq!(lines[59]["id"], "59");
    assert!(lines[0]["scores"][0]["input"]["label"].is_string());
    let some = place.file(
        "some.jsonl",
        "{\"ids\": [2, 17, 3]}\n\n{\"ids\": [2, 9999999, 3]}\n",
    );
    let told = run(&["probe", "score", model, "first", "--data", &some]).failed(1, "1 of 2 inputs");
    assert!(told.out.contains("vocabulary"), "{}", told.out);
    assert!(told.out.contains("\"line\":3"), "{}", told.out);
    run(&["probe", "score", model, "first"]).failed(2, "<TEXT>");

    let both = run(&["probe", "score", model, "first", "the story", "--predict"]).ok();
    assert!(both.out.contains("PREDICTION"), "{}", both.out);

    // Which words make it say so: the scores add up to what it says, less what it says of nothing.
    let told = run(&[
        "attribute",
        model,
        "the story",
        "--probe",
        "first",
        "--json",
    ])
    .ok();
    let told: Value = serde_json::from_str(&told.out).unwrap();
    let score = run(&["probe", "score", model, "first", "the story", "--json"]).ok();
    let edit = ["--edit", "hidden_states.0 zero"];
    let asked = ["probe", "score", model, "first", "the story", "--json"];
    let edited = run(&[&asked[..], &edit].concat()).ok();
    let edited: Value = serde_json::from_str(&edited.out).unwrap();
    let score: Value = serde_json::from_str(&score.out).unwrap();
    assert_ne!(edited["scores"], score["scores"]);
    let values = [&told["value"], &score["scores"][0]["input"]["values"][0]];
    let [explained, scored] = values.map(|v| v.as_f64().unwrap());
    assert!((explained - scored).abs() < 1e-3, "{explained} {scored}");
    let page = run(&["attribute", model, "the story", "--probe", "first"])
        .ok()
        .out;
    assert!(page.contains("score of the probe for \"yes\""), "{page}");

    // As scikit-learn's numbers come: a row of weights, classes that are numbers.
    let linear = serde_json::json!({
        "hook": "hidden_states.1", "pooling": "mean", "labels": [0, 1], "weight": [vec![0.5; 32]], "bias": [0.25],
    });
    let weights = place.file("weights.json", &linear.to_string());
    run(&["probe", "import", model, "plain", "--linear", &weights]).ok();
    let plain = run(&["probe", "score", model, "plain", "the story", "--json"]).ok();
    let plain: Value = serde_json::from_str(&plain.out).unwrap();
    assert!(["0", "1"].contains(&plain["scores"][0]["input"]["label"].as_str().unwrap()));
    let uneven = place.file(
        "uneven.json",
        "{\"hook\": \"h\", \"weight\": [[1, 2], [3]], \"bias\": [0, 0]}",
    );
    run(&["probe", "import", model, "uneven", "--linear", &uneven]).failed(1, "different lengths");
    run(&["probe", "import", model, "nothing"]).failed(2, "--from");

    let out = place.path("exported");
    run(&["probe", "export", model, "first", "--to", &out]).ok();
    run(&["probe", "import", model, "second", "--from", &out]).ok();
    let listed = run(&["probe", "list", model]).ok().out;
    assert!(
        listed.contains("first") && listed.contains("second"),
        "{listed}"
    );
    run(&["probe", "import", model, "second", "--from", &out]).failed(1, "already");
    run(&["probe", "delete", model, "second"]).ok();
    run(&["probe", "delete", model, "second"]).failed(1, "there is no probe \"second\"");
}

#[test]
fn mistakes_are_named() {
    let place = Place::new();
    let data = place.examples();
    let model = place.model.as_str();
    let strange = place.file("data.txt", "text\n");
    let empty = place.file("empty.csv", "text,label\n");
    let broken = place.file(
        "broken.jsonl",
        "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": 3}\n",
    );
    let unlabelled = place.file("unlabelled.csv", "text,label\n\"a\nb\",x\nc, \n");
    let vocabulary = place.file(
        "vocabulary.jsonl",
        "{\"text\": \"a\", \"label\": \"x\"}\n\n{\"ids\": [9999999], \"label\": \"y\"}\n",
    );
    for (args, code, part) in [
        (vec!["--data", "/nowhere.tsv"], 1, "cannot read"),
        (vec!["--data", &strange], 2, ".tsv, .csv and .jsonl"),
        (vec!["--data", &empty], 1, "no examples"),
        (vec!["--data", &broken], 1, "line 2"),
        (vec!["--data", &unlabelled], 1, "line 4: \"label\" is empty"),
        (vec!["--data", &vocabulary], 1, "place   line 3 of"),
        (
            vec!["--data", &data, "--label-column", "mood"],
            1,
            "--label-column",
        ),
        (vec!["--data", &data, "--kind", "pca", "--c", "2"], 2, "--c"),
        (
            vec!["--data", &data, "-o", "curve.gif"],
            2,
            ".png, .html and .json",
        ),
        (
            vec!["--data", &data, "--hooks", "pattern"],
            1,
            "header.hooks",
        ),
        (vec!["--data", &data, "--numbers"], 1, "is no number"),
    ] {
        let all = [&["probe", "train", model][..], &args].concat();
        run(&all).failed(code, part);
    }
    run(&["probe", "score", model, "nothing", "a"]).failed(1, "there is no probe \"nothing\"");
}

#[test]
fn files_are_read_as_programs_write_them() {
    let place = Place::new();
    let model = place.model.as_str();
    let (mut objects, mut rows) = (String::new(), "text\tlabel\tsplit\n".to_owned());
    for at in 0..24 {
        let (word, part) = [("the", "Train"), ("a", "TEST")][at / 2 % 2];
        let label = at % 2;
        objects.push_str(&format!(
            r#"{{"text": "{word} story", "spans": [{{"start": 0, "end": 1, "label": {label}}}], "split": "{part}"}}"#
        ));
        objects.push('\n');
        rows.push_str(&format!("{word} story\tof\\{label}\t{part}\n \t\n"));
    }
    for (name, content) in [
        ("marked.jsonl", format!("\u{feff}{objects}")),
        ("SHOUTED.JSONL", objects),
        ("marked.tsv", format!("\u{feff}{rows}")),
        ("SHOUTED.TSV", rows.clone()),
        (
            "SHOUTED.Csv",
            rows.replace('\t', ",").replace("\n ,\n", "\n \n"),
        ),
    ] {
        let data = place.file(name, &content);
        let asked = ["probe", "train", model, "--data", &data];
        let more = ["--hooks", "hidden_states.1", "--no-control", "--json"];
        let told = run(&[&asked[..], &more].concat()).ok();
        let told: Value = serde_json::from_str(&told.out).unwrap();
        assert_eq!(told["labels"].as_array().unwrap().len(), 2, "{name}");
        assert_eq!(told["test_examples"], 12, "{name}");
    }
}

#[test]
fn long_texts_are_refused_or_what_is_cut_off_is_told() {
    let place = Place::new();
    let model = place.model.as_str();
    let long = "story ".repeat(5000);
    let lines: String = (0..10)
        .map(|at| format!("{} story\t{}\n", ["a", "the"][at % 2], at % 2))
        .collect();
    let data = place.file("long.tsv", &format!("text\tlabel\n{lines}{long}\t1\n"));
    let train = ["probe", "train", model, "--data", &data, "--name", "cut"];
    let more = ["--hooks", "hidden_states.1", "--no-control"];
    let train = [&train[..], &more].concat();
    let told = run(&train).failed(1, "place   line 12 of");
    assert!(told.err.contains("examples[10]"), "{}", told.err);
    let told = run(&[&train[..], &["--truncate"]].concat()).ok();
    assert!(told.err.contains("tokens were cut off"), "{}", told.err);
    let score = ["probe", "score", model, "cut"];
    for of in [vec!["--data", &data], vec![long.as_str()]] {
        let score = [&score[..], &of].concat();
        let told = run(&score);
        assert_eq!(told.code, Some(1), "{told:?}");
        let told = run(&[&score[..], &["--truncate"]].concat()).ok();
        assert!(told.err.contains("tokens were cut off"), "{}", told.err);
    }
}

#[test]
fn labels_are_shown_on_one_line_and_short() {
    let place = Place::new();
    let model = place.model.as_str();
    let labels: Vec<String> = (0..200).map(|at| format!("class\n\u{202e}{at}")).collect();
    let linear = serde_json::json!({
        "hook": "hidden_states.1", "pooling": "mean", "labels": labels, "weight": vec![vec![0.5; 32]; 200], "bias": vec![0.0; 200],
    });
    let weights = place.file("weights.json", &linear.to_string());
    run(&["probe", "import", model, "many", "--linear", &weights]).ok();
    let listed = run(&["probe", "list", model]).ok().out;
    let scored = run(&["probe", "score", model, "many", "the story"])
        .ok()
        .out;
    assert!(listed.contains("... 200 in all"), "{listed}");
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(
        listed.lines().all(|line| line.chars().count() < 160),
        "{listed}"
    );
    for told in [listed, scored] {
        assert!(told.contains("class↵\u{fffd}"), "{told}");
        assert!(!told.contains('\u{202e}'), "{told}");
    }
}
