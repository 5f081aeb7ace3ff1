//! The examples of every `--help`: those of encoders do what they say, and the others are commands that exist.

mod cli_support;

use std::{fmt::Write as _, fs, path::Path, process::Command};

use cli_support::{BINARY, NOBODY, Ran, Server, demo, run};

/// Commands with examples that have no end.
const ENDLESS: [&str; 2] = ["serve", "demo"];

/// The files that examples name, made for the demonstration model.
fn files(folder: &Path) {
    let write = |name: &str, content: &str| fs::write(folder.join(name), content).unwrap();
    for name in ["texts.txt", "corpus.txt", "good.txt"] {
        write(name, "a fine film\nwonderful from start to end\n");
    }
    write("bad.txt", "a dull story\nboring and far too long\n");
    let (mut reviews, mut lengths) = ("text\tlabel\n".to_owned(), "text,label\n".to_owned());
    let (mut words, mut ids) = (String::new(), String::new());
    for at in 0..12 {
        let (word, label) = [("good", "positive"), ("bad", "negative")][at % 2];
        writeln!(reviews, "film {at} is {word}\t{label}").unwrap();
        writeln!(lengths, "film {}is {word},{}", "so ".repeat(at), at + 3).unwrap();
        writeln!(
            words,
            r#"{{"text": "a {word} film", "spans": [{{"start": 0, "end": 1, "label": "other"}}, {{"start": 2, "end": 6, "label": "noun"}}]}}"#
        )
        .unwrap();
        writeln!(
            ids,
            r#"{{"ids": [2, {}, 3], "positions": [{{"position": 0, "label": "other"}}, {{"position": 1, "label": "noun"}}]}}"#,
            at + 10
        )
        .unwrap();
    }
    write("reviews.tsv", &reviews);
    write("labelled.tsv", &reviews);
    write("lengths.csv", &lengths);
    write("words.jsonl", &words);
    write("ids.jsonl", &ids);
    let linear = serde_json::json!({
        "hook": "hidden_states.3", "pooling": "mean", "labels": ["no", "yes"], "weight": [vec![0.1; 128]], "bias": [0.5],
    });
    write("weights.json", &linear.to_string());
    let file = fs::File::create(folder.join("mood.npz")).unwrap();
    let mut vector = ndarray_npy::NpzWriter::new(file);
    let values = ndarray::Array1::from_elem(128, 0.25_f32);
    vector.add_array("arr_0", &values).unwrap();
    vector.finish().unwrap();
}

/// The commands that the help lists.
fn commands() -> Vec<String> {
    let help = run(&["--help"]).ok().out;
    let listed = help.split("Commands:").nth(1).unwrap();
    let listed = listed.split("Options:").next().unwrap();
    let names = listed.lines().filter_map(|l| l.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// The examples of a command's help.
fn examples(command: &str) -> Vec<String> {
    let help = run(&[command, "--help"]).ok().out;
    let examples = help.split("Examples:").nth(1).unwrap_or_default();
    let lines = examples.lines().filter_map(|line| {
        let example = line.trim_start().strip_prefix("introspectd ")?;
        // What other programs make of it is theirs.
        let ours = example.split(" | ").next()?.split(" && ").next()?;
        Some(ours.to_owned())
    });
    lines.collect()
}

/// Whether what a line asks for is here. Others, which want a decoder or a graphics card, are held to be commands that exist.
fn can_run(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let ours = ["demo", "bert", "./models", "--json"];
    line == "probe list"
        || line == "models list"
        || !line.contains("cuda") && words.any(|word| ours.iter().any(|o| word.starts_with(o)))
}

/// Runs a line as a shell does.
async fn shell(line: &str, folder: &Path, server: &str) -> Ran {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("'{BINARY}' {line}")])
        .current_dir(folder)
        .env("INTROSPECTD_SERVER", server);
    let ended = tokio::task::spawn_blocking(move || shell.output().unwrap());
    ended.await.unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_the_help_run() {
    let server = Server::of(&[("demo", demo()), ("bert", demo())]).await;
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    files(folder);
    std::os::unix::fs::symlink(server.root.path(), folder.join("models")).unwrap();
    let (mut ran, mut wrong) = (0, Vec::new());
    for command in commands() {
        if ENDLESS.contains(&command.as_str()) {
            continue;
        }
        let examples = examples(&command);
        assert!(!examples.is_empty(), "{command} has no examples");
        for line in examples {
            let done = if can_run(&line) {
                ran += 1;
                let done = shell(&line, folder, &server.url()).await;
                (done.code != Some(0)).then_some(done)
            } else {
                let done = shell(&line, folder, NOBODY).await;
                (done.code != Some(1)).then_some(done)
            };
            wrong.extend(done.map(|done| format!("{line}: {done:?}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ran > 70, "{ran} examples ran");
}
