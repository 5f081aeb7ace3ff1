//! The demonstration, as a new user runs it.

mod cli_support;

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use cli_support::{command, run};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn the_demonstration_shows_everything_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("pictures").display().to_string();
    let page = run(&["demo", "--exit", "--out", &out]).ok().out;
    for part in [
        "[CLS] this movie was fantastic ! [SEP]",
        "positive",
        "Attention of layer",
        "Why?",
        "Integrated gradients, 20 points",
        "Which heads matter?",
        "blocks.3.attn.hook_z, head",
        "17 rows",
        "Which layer knows?",
        "logistic on 192 examples",
        "hidden_states.4",
        "7 x 128",
        "introspectd_explanation_duration_seconds",
        "introspectd_rows_total",
    ] {
        assert!(page.contains(part), "{part} in {page}");
    }
    let png = png::Decoder::new(BufReader::new(
        File::open(format!("{out}/attention.png")).unwrap(),
    ));
    let mut picture = png.read_info().expect("a PNG");
    let mut pixels = vec![0; picture.output_buffer_size().unwrap()];
    picture.next_frame(&mut pixels).expect("a whole PNG");
    assert!(
        pixels.chunks(3).any(|p| p == [68, 1, 84]),
        "dark cells of the colour scale"
    );
    let html = std::fs::read_to_string(format!("{out}/attention.html")).unwrap();
    assert!(html.starts_with("<!doctype html>"));
    assert_eq!(
        html.matches("\"weights\":").count(),
        16,
        "4 layers of 4 heads"
    );
    assert!(html.contains("fantastic"));
    let html = std::fs::read_to_string(format!("{out}/heads.html")).unwrap();
    assert_eq!(html.matches("<td ").count(), 16, "a cell for each head");
    let html = std::fs::read_to_string(format!("{out}/attribution.html")).unwrap();
    assert!(html.contains("fantastic") && html.contains("integrated_gradients"));
}

#[test]
fn a_text_and_a_head_can_be_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().display().to_string();
    let chosen = [
        "demo",
        "--exit",
        "--out",
        &out,
        "--text",
        "I hated it.",
        "--layer",
        "3",
        "--head",
        "2",
    ];
    let page = run(&chosen).ok().out;
    assert!(
        page.contains("Attention of layer 3, head 2") && page.contains("negative"),
        "{page}"
    );
    run(&[
        "demo", "--exit", "--out", &out, "--layer", "9", "--head", "0",
    ])
    .failed(2, "4 layers of 4 heads");
    run(&["demo", "--exit", "--out", "/proc/nowhere"]).failed(1, "cannot make the folder");
    let long = "word ".repeat(500);
    run(&["demo", "--exit", "--out", &out, "--text", &long]).failed(1, "INVALID_ARGUMENT");
}

/// Without `--exit` the daemon runs on, another client can use it, and Ctrl-C ends it cleanly.
#[test]
fn the_daemon_of_the_demonstration_serves_until_it_is_asked_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = command(&["demo", "--out", folder.path().to_str().unwrap()])
        .env("TMPDIR", folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = None;
    for line in BufReader::new(child.stdout.as_mut().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(rest) = line.strip_prefix("  gRPC") {
            address = rest.split_whitespace().next().map(str::to_owned);
        }
        if line.contains("Ctrl-C ends it") {
            break;
        }
    }
    let server = format!("http://{}", address.expect("the address is shown"));
    let answer = run(&["predict", "demo", "Wonderful!", "--server", &server])
        .ok()
        .out;
    assert!(answer.contains("positive"), "{answer}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("introspectd-demo-"))
        .collect();
    assert!(left.is_empty(), "temporary folders are gone: {left:?}");
}
