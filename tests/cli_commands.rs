//! The command line without a model: help, mistakes, nobody listening, the doctor.

mod cli_support;

use std::{io::Read as _, net::TcpListener, process::Stdio};

use cli_support::{NOBODY, command, fixture, repository, run};
use serde_json::Value;

const COMMANDS: [&str; 11] = [
    "serve",
    "demo",
    "doctor",
    "inspect",
    "capture",
    "attribute",
    "probe",
    "intervene",
    "models",
    "tokenize",
    "predict",
];

#[test]
fn help_lists_every_command_and_each_teaches_by_example() {
    let help = run(&["--help"]).ok().out;
    for name in COMMANDS {
        assert!(help.contains(&format!("\n  {name} ")), "{name} in {help}");
        let own = run(&[name, "--help"]).ok().out;
        assert!(own.contains("Examples:"), "{name}: {own}");
        assert!(
            own.contains(&format!("introspectd {name}")),
            "{name}: {own}"
        );
    }
    assert!(
        run(&["--version"])
            .ok()
            .out
            .contains(env!("CARGO_PKG_VERSION"))
    );
}

/// The process of a model is nobody's command: not in the help, and not to be started by hand.
#[test]
fn workers_are_not_for_people() {
    assert!(!run(&["--help"]).ok().out.contains("worker"));
    run(&["worker"]).failed(1, "started by the daemon");
}

#[test]
fn a_command_line_that_means_nothing_is_exit_code_2() {
    for (args, said) in [
        (&[][..], "Usage"),
        (&["--bogus"], "--bogus"),
        (&["explain"], "explain"),
        (&["capture"], "<MODEL>"),
        (&["capture", "m"], "<TEXT"),
        (
            &["capture", "m", "text", "--ids", "1"],
            "cannot be used with",
        ),
        (
            &["capture", "m", "text", "-o", "a.txt"],
            ".npz, .json, .png and .html",
        ),
        (
            &["capture", "m", "text", "-o", "a.png", "--positions", "1"],
            "--positions",
        ),
        (&["capture", "m", "text", "--layers", "5-2"], "5-2"),
        (&["capture", "m", "text", "--dtype", "f8"], "f8"),
        (&["capture", "m", "text", "--pooling", "median"], "median"),
        (&["capture", "m", "text", "--candidates", "0"], "0"),
        (&["capture", "m", "--ids", "1,-2"], "-2"),
        (&["capture", "m", "--text-file", "texts.txt"], "--output"),
        (
            &["capture", "m", "text", "--sparse-floor", "0.1"],
            "--sparse",
        ),
        (
            &["capture", "m", "text", "--server", "https://there"],
            "plain http",
        ),
        (
            &["capture", "m", "text", "--server", "http://not an address"],
            "no address",
        ),
        (&["inspect"], "<MODEL>"),
        (
            &["inspect", "m", "--json", "--graph"],
            "cannot be used with",
        ),
        (&["models"], "Usage"),
        (&["models", "load"], "<MODEL>"),
        (&["models", "list", "--models", "."], "--server"),
        (&["tokenize", "m"], "<TEXT>"),
        (&["predict", "m", "text", "--top", "0"], "0"),
        (&["demo", "--layer", "1"], "--head"),
        (&["demo", "--layer", "x", "--head", "0"], "x"),
        (&["doctor", "everything"], "everything"),
        (&["serve", "now"], "now"),
    ] {
        let ran = run(args).failed(2, said);
        assert_eq!(ran.out, "", "{args:?} writes to standard error only");
    }
}

#[test]
fn nobody_listening_is_told_with_what_to_do() {
    for args in [
        &["capture", "m", "text"][..],
        &["inspect", "m"],
        &["models", "list"],
        &["models", "unload", "m"],
        &["tokenize", "m", "text"],
        &["predict", "m", "text"],
    ] {
        let mut args = args.to_vec();
        args.extend(["--server", NOBODY]);
        let ran = run(&args).failed(1, &format!("no daemon answers at {NOBODY}"));
        assert!(ran.err.contains("introspectd serve"), "{ran:?}");
    }
}

#[test]
fn something_else_listening_is_told_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let web_server = std::thread::spawn(move || {
        use std::io::Write as _;
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    let ran = run(&["models", "list", "--server", &url]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.starts_with("error: "), "{ran:?}");
    web_server.join().unwrap();
}

#[test]
fn folders_that_are_no_models_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir(path("empty")).unwrap();
    std::fs::write(path("file"), "x").unwrap();
    std::fs::create_dir(path("a name")).unwrap();
    for (name, said) in [
        ("nothing", "No such file"),
        ("file", "it is a file"),
        ("a name", "a model's name is made of"),
        ("empty", "there is no model.onnx"),
    ] {
        run(&["inspect", &path(name)]).failed(1, said);
    }
    // A folder of that name here, but no path: most likely meant as one.
    let ran = command(&["inspect", "empty", "--server", NOBODY])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&ran.stderr).contains("\"./empty\""));
    run(&["inspect", "m", "--models", &path("nothing")]).failed(1, "there is no such folder");
}

#[test]
fn serve_reports_all_mistakes_together() {
    let ran = run(&[
        "serve", "--models", "/no/such", "--listen", "here", "--grace", "soon",
    ])
    .failed(1, "the configuration has 3 mistake(s)");
    for name in ["models", "listen", "grace"] {
        assert!(ran.err.contains(name), "{ran:?}");
    }
}

fn findings(out: &str) -> Vec<Value> {
    let report: Value = serde_json::from_str(out).expect("JSON");
    report["findings"].as_array().expect("a list").clone()
}

#[test]
fn doctor_finds_the_runtime_and_what_is_wrong_with_folders() {
    let root = repository(&["bert.legacy14"]);
    std::fs::create_dir(root.path().join("not-a-model")).unwrap();
    let models = root.path().display().to_string();
    let args = [
        "--models",
        &models,
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        "off",
    ];
    let ran = run(&[&["doctor", "--json"], &args[..]].concat()).ok();
    let all = findings(&ran.out);
    let has = |verdict: &str, what: &str| {
        all.iter()
            .any(|f| f["verdict"] == verdict && f["what"].as_str().unwrap().contains(what))
    };
    assert!(has("ok", env!("INTROSPECTD_ORT_VERSION")), "{all:#?}");
    assert!(has("ok", "providers: cpu"), "{all:#?}");
    assert!(has("ok", "telemetry is off"), "{all:#?}");
    assert!(has("ok", "\"bert.legacy14\""), "{all:#?}");
    assert!(has("warning", "\"not-a-model\" is left out"), "{all:#?}");
    assert!(has("ok", "memfd"), "{all:#?}");
    let page = run(&[&["doctor"], &args[..]].concat()).ok().out;
    assert!(page.contains("0 problems"), "{page}");
}

#[test]
fn doctor_fails_where_a_daemon_would_and_says_what_to_do() {
    let root = repository(&[]);
    let models = root.path().display().to_string();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_at = taken.local_addr().unwrap().to_string();
    let not_a_library = fixture("bert.legacy14")
        .join("config.json")
        .display()
        .to_string();
    for (args, said) in [
        (vec!["--models", "/no/such"], "there is no such folder"),
        (
            vec![
                "--models",
                &models,
                "--listen",
                &taken_at,
                "--admin-listen",
                "off",
            ],
            "taken by another program",
        ),
        (
            vec!["--models", &models, "--ort-library", &not_a_library],
            "--ort-library names",
        ),
        (
            vec!["--models", &models, "--provider", "cuda"],
            "\"cuda\" is not among them",
        ),
    ] {
        let ran = run(&[&["doctor", "--json"], &args[..]].concat());
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let problem = findings(&ran.out)
            .into_iter()
            .find(|f| f["verdict"] == "problem" && f["what"].as_str().unwrap().contains(said));
        let problem = problem.unwrap_or_else(|| panic!("{said:?} is not in {}", ran.out));
        assert!(!problem["advice"].as_str().unwrap().is_empty());
    }
}

/// As `introspectd ... | head -0` does it.
#[test]
fn a_reader_that_leaves_ends_a_command_quietly() {
    let mut child = command(&[
        "doctor",
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        "off",
        "--models",
        ".",
    ])
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(said, "");
}
