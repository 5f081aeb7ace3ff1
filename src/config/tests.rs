use std::io::Write as _;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    flags: Flags,
}

fn flags(arguments: &[&str]) -> Flags {
    Command::try_parse_from(std::iter::once("test").chain(arguments.iter().copied()))
        .unwrap()
        .flags
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn defaults_are_good() {
    let config = Config::resolve(&flags(&["--models=."])).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:50061");
    assert_eq!(config.admin_listen.unwrap().to_string(), "127.0.0.1:9464");
    assert_eq!(config.grace, Duration::from_secs(30));
    assert_eq!(config.max_message, 4 << 20);
    assert_eq!(config.max_streams, 64);
    assert_eq!(config.ort_library, None);
}

#[test]
fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
    let file = file("models = \".\"\ngrace = \"7s\"\nthreads = 3\narena = true\n");
    let path = file.path().to_str().unwrap();
    let config = Config::resolve(&flags(&["--config", path, "--threads=5"])).unwrap();
    assert_eq!(config.threads, 5, "flag over file");
    assert_eq!(config.grace, Duration::from_secs(7), "file over default");
    assert!(config.arena);
    assert_eq!(config.batch_tokens, 2048, "default");
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    // What clap hands over for a variable that is set to nothing.
    let given = Flags {
        models: Some(".".into()),
        listen: Some(String::new()),
        ..Flags::default()
    };
    assert_eq!(Config::resolve(&given).unwrap().listen.port(), 50061);
}

#[test]
fn all_mistakes_are_reported_together_each_with_its_source() {
    let file = file("grace = \"soon\"\ncolour = 1\nbatch_tokens = [1]\n");
    let path = file.path().to_str().unwrap();
    let mistakes = Config::resolve(&flags(&[
        "--config",
        path,
        "--models=/nonexistent",
        "--listen=here",
        "--provider=rocm",
        "--max-message=1TiB",
        "--threads=-1x",
    ]))
    .unwrap_err();
    let text = mistakes.to_string();
    for part in [
        "colour",
        "grace = \"soon\" (the file)",
        "batch_tokens in the file must be",
        "models = \"/nonexistent\" (--models or INTROSPECTD_MODELS)",
        "listen = \"here\"",
        "provider = \"rocm\"",
        "max_message = \"1TiB\"",
        "threads = \"-1x\"",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert_eq!(mistakes.iter().count(), 8, "{text}");
}

#[test]
fn settings_that_contradict_each_other_are_mistakes() {
    let mistakes = Config::resolve(&flags(&[
        "--models=.",
        "--listen=127.0.0.1:9464",
        "--max-capture=2GiB",
    ]))
    .unwrap_err();
    assert_eq!(mistakes.iter().count(), 2, "{mistakes}");
}

#[test]
fn a_file_that_is_not_there_or_not_toml_is_a_mistake() {
    let broken = file("models = ");
    for path in ["/nonexistent", broken.path().to_str().unwrap()] {
        let mistakes = Config::resolve(&flags(&["--config", path, "--models=."])).unwrap_err();
        assert_eq!(mistakes.iter().count(), 1, "{mistakes}");
    }
}

#[test]
fn times_and_sizes() {
    assert_eq!(parse::duration("500ms"), Ok(Duration::from_millis(500)));
    assert_eq!(parse::duration("2m"), Ok(Duration::from_secs(120)));
    for bad in [
        "",
        "0s",
        "s",
        "5",
        "1h",
        "-1s",
        "99999999999999999999s",
        "2000000m",
    ] {
        assert!(parse::duration(bad).is_err(), "{bad}");
    }
    assert_eq!(parse::size("4MiB"), Ok(4 << 20));
    assert_eq!(parse::size("65536"), Ok(65536));
    for bad in ["", "0", "4MB", "-1", "1.5GiB", "99999999999TiB"] {
        assert!(parse::size(bad).is_err(), "{bad}");
    }
}

#[test]
fn help_tells_default_variable_and_precedence() {
    use clap::CommandFactory as _;
    let help = Command::command().render_long_help().to_string();
    for part in [
        "[default: 127.0.0.1:50061]",
        "INTROSPECTD_LISTEN",
        "Precedence: flag, environment, file, default",
    ] {
        assert!(help.contains(part), "{part} is not in:\n{help}");
    }
}
