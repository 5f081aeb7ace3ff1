//! Configuration from flags, environment and file, resolved once into a validated value.
//!
//! Precedence: flag, then environment variable, then file, then default. Each setting stands once, in the table below: its
//! type, its default, the variable, its help. An empty variable counts as not set. All mistakes are reported together.

mod parse;

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;

use crate::telemetry::log;

/// Largest configuration file that is read.
const FILE_LIMIT: u64 = 1 << 20;

macro_rules! settings {
    ($($field:ident: $type:ty = $default:literal, $env:literal, $value:literal, $parse:path, $help:literal;)*) => {
        /// Settings as they were given, on the command line or by the environment.
        #[derive(Args, Clone, Debug, Default)]
        pub struct Flags {
            /// Read settings from this TOML file. Precedence: flag, environment, file, default
            #[arg(long, env = "INTROSPECTD_CONFIG", value_name = "FILE")]
            pub config: Option<PathBuf>,
            $(
                #[arg(long, env = $env, value_name = $value, help = concat!($help, " [default: ", $default, "]"))]
                #[doc = $help]
                pub $field: Option<String>,
            )*
        }

        /// Settings, validated.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $(#[doc = $help] pub $field: $type,)*
        }

        const KEYS: &[&str] = &[$(stringify!($field)),*];

        impl Config {
            fn read(flags: &Flags, file: &toml::Table, mistakes: &mut Mistakes) -> Option<Self> {
                $(let $field = mistakes.setting(
                    &Setting {
                        key: stringify!($field),
                        env: $env,
                        given: flags.$field.as_deref().filter(|v| !v.is_empty()),
                        file: file.get(stringify!($field)),
                        default: $default,
                    },
                    $parse,
                );)*
                Some(Self { $($field: $field?,)* })
            }
        }
    };
}

settings! {
    models: PathBuf = "models", "INTROSPECTD_MODELS", "DIR", parse::folder,
        "Folder of models: a folder for each, with model.onnx in it";
    listen: SocketAddr = "127.0.0.1:50061", "INTROSPECTD_LISTEN", "ADDRESS", parse::address,
        "Address of the gRPC port";
    admin_listen: Option<SocketAddr> = "127.0.0.1:9464", "INTROSPECTD_ADMIN_LISTEN", "ADDRESS", parse::address_or_off,
        "Address of /metrics, /livez and /readyz, or \"off\"";
    log: String = "info", "INTROSPECTD_LOG", "FILTER", parse::filter,
        "What to log: off, error, warn, info, debug, or a filter such as introspectd=debug,h2=warn";
    log_format: log::Format = "text", "INTROSPECTD_LOG_FORMAT", "FORMAT", parse::log_format,
        "How to log: text or json";
    grace: Duration = "30s", "INTROSPECTD_GRACE", "TIME", parse::duration,
        "Time that open requests get after SIGTERM";
    provider: String = "cpu", "INTROSPECTD_PROVIDER", "PROVIDER", parse::provider,
        "Where models run: cpu, cuda or cuda:N. What cannot be loaded is an error, not a reason to fall back";
    threads: usize = "0", "INTROSPECTD_THREADS", "N", parse::count,
        "Threads of a run; 0 for every core";
    ort_library: Option<PathBuf> = "search", "INTROSPECTD_ORT_LIBRARY", "FILE", parse::library,
        "The ONNX Runtime library: an absolute path, or \"search\"";
    arena: bool = "false", "INTROSPECTD_ARENA", "BOOL", parse::truth,
        "Keep ONNX Runtime's memory arena: about 5 % faster, and never gives a large request's memory back";
    worker_memory: Option<u64> = "unlimited", "INTROSPECTD_WORKER_MEMORY", "SIZE", parse::size_or_unlimited,
        "Cap of each worker's private memory";
    load_limit: Duration = "180s", "INTROSPECTD_LOAD_LIMIT", "TIME", parse::duration,
        "A load that takes longer fails";
    loads_at_a_time: usize = "2", "INTROSPECTD_LOADS_AT_A_TIME", "N", parse::positive,
        "Models loaded at the same time";
    max_tokens: Option<usize> = "model", "INTROSPECTD_MAX_TOKENS", "N", parse::count_or_model,
        "Most tokens of an input, when lower than the model's own limit; or \"model\"";
    max_text: usize = "256KiB", "INTROSPECTD_MAX_TEXT", "SIZE", parse::size,
        "Largest text that is tokenised";
    batch_tokens: usize = "2048", "INTROSPECTD_BATCH_TOKENS", "N", parse::positive,
        "Most padded tokens of a run, fewer where they take long; a longer input runs alone";
    queue_rows: usize = "16384", "INTROSPECTD_QUEUE_ROWS", "N", parse::positive,
        "Rows that wait for one model; when full, calls are RESOURCE_EXHAUSTED with retry advice";
    open_tokens: usize = "2097152", "INTROSPECTD_OPEN_TOKENS", "N", parse::positive,
        "Tokens of all open requests of one model; when full, as above";
    buffer: usize = "1GiB", "INTROSPECTD_BUFFER", "SIZE", parse::size,
        "Memory for results that nobody took yet, over all models; when full, as above";
    variant_memory: usize = "1GiB", "INTROSPECTD_VARIANT_MEMORY", "SIZE", parse::size,
        "Memory of each model's graph variants; when full, the longest unused leave";
    max_capture: usize = "512MiB", "INTROSPECTD_MAX_CAPTURE", "SIZE", parse::size,
        "Largest capture of one input, by its estimate before it runs";
    max_rows: usize = "262144", "INTROSPECTD_MAX_ROWS", "N", parse::positive,
        "Most rows that one explanation runs, by its estimate before it runs";
    probes: Option<PathBuf> = "beside", "INTROSPECTD_PROBES", "DIR", parse::folder_or_beside,
        "Folder of stored probes, a folder for each model; or \"beside\": in the folder \"probes\" of each model";
    lenses: Option<PathBuf> = "beside", "INTROSPECTD_LENSES", "DIR", parse::folder_or_beside,
        "Folder of tuned lenses, a folder for each model; or \"beside\": in the folder \"lenses\" of each model";
    probe_memory: usize = "1GiB", "INTROSPECTD_PROBE_MEMORY", "SIZE", parse::size,
        "Memory for the vectors of a training's examples, and for its fits, of four trainings at most; more vectors go to temporary files, and a fit that takes more is refused";
    max_message: usize = "4MiB", "INTROSPECTD_MAX_MESSAGE", "SIZE", parse::message_size,
        "Largest message that is accepted, after decompression";
    max_connections: usize = "1024", "INTROSPECTD_MAX_CONNECTIONS", "N", parse::positive,
        "Open connections; more wait to be accepted";
    max_streams: u32 = "64", "INTROSPECTD_MAX_STREAMS", "N", parse::streams,
        "Open calls of one connection; more wait at the client";
    keepalive: Duration = "20s", "INTROSPECTD_KEEPALIVE", "TIME", parse::duration,
        "A silent connection is asked so often whether it lives; without an answer within 10 s it is closed";
    stall_limit: Duration = "30s", "INTROSPECTD_STALL_LIMIT", "TIME", parse::duration,
        "A stream whose reader takes nothing for so long is given up, and a training of probes whose examples do not come";
}

impl Config {
    /// Resolves settings. Reads the file, if one is named, and looks at the folder of models.
    ///
    /// # Errors
    /// Every mistake that was made.
    pub fn resolve(flags: &Flags) -> Result<Self, Mistakes> {
        let mut mistakes = Mistakes::default();
        let file = match &flags.config {
            Some(path) => read_file(path).unwrap_or_else(|why| {
                mistakes.add(why);
                toml::Table::new()
            }),
            None => toml::Table::new(),
        };
        for key in file.keys().filter(|k| !KEYS.contains(&k.as_str())) {
            mistakes.add(format!(
                "{key:?} in the file is not a setting: there are {}",
                KEYS.join(", ")
            ));
        }
        let config = Self::read(flags, &file, &mut mistakes);
        if let Some(config) = &config {
            config.check(&mut mistakes);
        }
        config.filter(|_| mistakes.0.is_empty()).ok_or(mistakes)
    }

    /// What concerns more than one setting.
    fn check(&self, mistakes: &mut Mistakes) {
        if self.listen.port() != 0 && Some(self.listen) == self.admin_listen {
            mistakes.add("listen and admin_listen are the same address: choose two".into());
        }
        if self.max_capture > self.buffer {
            mistakes.add(
                "max_capture is above buffer: a capture of that size could never be held".into(),
            );
        }
    }
}

fn read_file(path: &Path) -> Result<toml::Table, String> {
    let read = || -> io::Result<String> {
        if fs::metadata(path)?.len() > FILE_LIMIT {
            return Err(io::Error::other("the file is larger than 1 MiB"));
        }
        fs::read_to_string(path)
    };
    let text = read().map_err(|e| format!("cannot read {:?}: {e}", path.display().to_string()))?;
    text.parse::<toml::Table>().map_err(|e| {
        format!(
            "{:?} is not TOML: {}",
            path.display().to_string(),
            e.message()
        )
    })
}

/// One setting and everything that was said about it.
struct Setting<'a> {
    key: &'a str,
    env: &'a str,
    given: Option<&'a str>,
    file: Option<&'a toml::Value>,
    default: &'a str,
}

/// What is wrong with the settings, one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    fn add(&mut self, mistake: String) {
        self.0.push(mistake);
    }

    /// The mistakes, each a sentence.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    fn setting<T>(
        &mut self,
        setting: &Setting<'_>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let flag = format!("--{}", setting.key.replace('_', "-"));
        let (text, source) = match (setting.given, setting.file) {
            (Some(text), _) => (text.to_owned(), format!("{flag} or {}", setting.env)),
            (None, Some(value)) => match plain(value) {
                Some(text) => (text, "the file".to_owned()),
                None => {
                    self.add(format!(
                        "{} in the file must be a string, a number or a truth value",
                        setting.key
                    ));
                    return None;
                }
            },
            (None, None) => (
                setting.default.to_owned(),
                format!("the default; set {flag} or {}", setting.env),
            ),
        };
        parse(&text)
            .map_err(|why| self.add(format!("{} = {text:?} ({source}): {why}", setting.key)))
            .ok()
    }
}

/// A TOML value as the text that a flag would have.
fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(s) => Some(s.clone()),
        toml::Value::Integer(n) => Some(n.to_string()),
        toml::Value::Boolean(b) => Some(b.to_string()),
        toml::Value::Float(_)
        | toml::Value::Datetime(_)
        | toml::Value::Array(_)
        | toml::Value::Table(_) => None,
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} mistake(s):", self.0.len())?;
        self.0.iter().try_for_each(|m| write!(f, "\n  - {m}"))
    }
}

impl std::error::Error for Mistakes {}

#[cfg(test)]
mod tests;
