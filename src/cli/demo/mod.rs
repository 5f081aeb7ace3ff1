//! `demo`: the main job on a small model that is part of the binary: a daemon in this process, a client over real gRPC, pictures, metrics.

mod explained;
mod head;
mod heads;
mod layers;
mod metrics;

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;

use super::{
    assemble::{Captured, Data},
    capture::{self, show, view},
    client::{Session, Target},
    error::CliError,
    inspect,
    local::{self, Local},
    out::{self, Paint, clean},
    picture::{self, Attention},
    sweep,
};
use crate::{
    config::Flags,
    service::{
        StartError,
        wire::introspect::{CaptureRequest, Input, Model, Selection, Text, Token, input::Kind},
    },
    shutdown::Shutdown,
    telemetry::recorder::Recorder,
};

/// The model's name in its repository.
const NAME: &str = "demo";
/// Its files, see `assets/demo-model/README.md`.
const FILES: [(&str, &[u8]); 3] = [
    (
        "model.onnx",
        include_bytes!("../../../assets/demo-model/model.onnx"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../assets/demo-model/tokenizer.json"),
    ),
    (
        "config.json",
        include_bytes!("../../../assets/demo-model/config.json"),
    ),
];
/// Where a daemon listens unless told otherwise.
const GRPC: &str = "127.0.0.1:50061";
const ADMIN: &str = "127.0.0.1:9464";
/// Any free port.
const ANY: &str = "127.0.0.1:0";

pub(super) const EXAMPLES: &str = "\
Examples:
  introspectd demo
  introspectd demo --text \"I would not watch it again.\" --layer 3 --head 0
  introspectd demo --out /tmp/demo --exit";

/// Arguments of `demo`.
#[derive(Args, Clone, Debug)]
pub(super) struct DemoArgs {
    /// Text to look at
    #[arg(long, default_value = "This movie was fantastic!")]
    text: String,
    /// Layer of the attention map [default: of the head that looks hardest from word to word]
    #[arg(long, value_name = "N", requires = "head")]
    layer: Option<usize>,
    /// Head of the attention map
    #[arg(long, value_name = "N", requires = "layer")]
    head: Option<usize>,
    /// Folder to write attention.png, attention.html, attribution.html, heads.html and layers.png to
    #[arg(long, value_name = "DIR", default_value = "introspectd-demo")]
    out: PathBuf,
    /// End when everything is shown; without it the daemon runs on until Ctrl-C
    #[arg(long)]
    exit: bool,
}

/// Runs the command.
pub(super) async fn run(args: &DemoArgs) -> Result<(), CliError> {
    let began = Instant::now();
    let shutdown = Shutdown::on_signals()
        .map_err(|e| CliError::new(format!("cannot listen for signals: {e}")))?;
    let repository = repository()?;
    let local = tokio::select! {
        started = start(repository.path(), shutdown.clone()) => started,
        () = shutdown.drain.cancelled() => return Err(CliError::Told),
    };
    let local = local?;

    let shown = tokio::select! {
        shown = show(args, &local, began) => shown,
        () = shutdown.drain.cancelled() => Err(CliError::Told),
    };
    let ended = match shown {
        Ok(()) if !args.exit => wait(&shutdown).await,
        other => other,
    };
    tokio::select! {
        () = local.stop() => {}
        () = shutdown.force.cancelled() => {}
    }
    ended
}

async fn wait(shutdown: &Shutdown) -> Result<(), CliError> {
    out::print("\nThe daemon runs on. Ctrl-C ends it.\n")?;
    shutdown.drain.cancelled().await;
    Ok(())
}

/// A repository with the one model, which goes away with the value.
fn repository() -> Result<tempfile::TempDir, CliError> {
    let write = || {
        let repository = tempfile::Builder::new()
            .prefix("introspectd-demo-")
            .tempdir()?;
        let folder = repository.path().join(NAME);
        fs::create_dir(&folder)?;
        for (name, bytes) in FILES {
            fs::write(folder.join(name), bytes)?;
        }
        Ok(repository)
    };
    write().map_err(|e: std::io::Error| {
        CliError::new(format!("cannot write the model to a temporary folder: {e}"))
            .advise("make room, or name another folder with TMPDIR")
    })
}

/// The daemon, on the usual addresses where they are free, on others where not.
async fn start(models: &Path, shutdown: Shutdown) -> Result<Local, CliError> {
    let recorder = Recorder::install()
        .map_err(|e| CliError::new(format!("the metrics cannot be set up: {e}")))?;
    let (mut grpc, mut admin) = (GRPC, ADMIN);
    loop {
        let flags = Flags {
            models: Some(models.display().to_string()),
            listen: Some(grpc.to_owned()),
            admin_listen: Some(admin.to_owned()),
            log: Some("off".into()),
            ..local::from_environment()
        };
        let config = local::resolve(&flags)?;
        let started = Local::serve(config, None, Some(recorder.clone()), shutdown.clone()).await;
        match started {
            // Only trying tells: another program may take an address at any time.
            Err(StartError::Listen { address, .. })
                if grpc != ANY && address.to_string() == grpc =>
            {
                grpc = ANY;
            }
            Err(StartError::Listen { address, .. })
                if admin != ANY && address.to_string() == admin =>
            {
                admin = ANY;
            }
            other => return other.map_err(local::not_started),
        }
    }
}

async fn show(args: &DemoArgs, local: &Local, began: Instant) -> Result<(), CliError> {
    let paint = Paint::of_stdout();
    let address = local.address();
    let target = Target {
        server: format!("http://{address}"),
        models: None,
    };
    let session = Session::remote(&target).await?;
    let model = inspect::fetch(&session, NAME.into()).await?;
    let captured = capture::capture(session.captures(), request(&args.text)).await?;
    let attention = view::attention(&captured, &[])?;
    let (layer, head) = match args.layer.zip(args.head) {
        Some(chosen) => chosen,
        None => head::most_telling(&attention, &captured.header.tokens).unwrap_or_default(),
    };

    let mut text = opening(&model, address, local.admin_address(), began, paint);
    section(&mut text, paint, "Tokens");
    let _ = writeln!(text, "  {}", tokens(&captured.header.tokens, paint));
    if let Some(prediction) = &captured.prediction {
        section(&mut text, paint, "Prediction");
        text.push_str(&show::prediction(prediction, &captured.header.tokens));
    }
    section(
        &mut text,
        paint,
        &format!("Attention of layer {layer}, head {head} (rows ask, columns are looked at)"),
    );
    text.push_str(&map(&attention, layer, head)?);
    let explained = explained::explain(&session, NAME, &args.text).await?;
    section(
        &mut text,
        paint,
        &format!(
            "Why? The {}, by token (red speaks for it, blue against)",
            explained.target()
        ),
    );
    text.push_str(&explained.page());
    let ablated = heads::ablate(&session, NAME, &args.text).await?;
    section(
        &mut text,
        paint,
        "Which heads matter? Each put to zero by itself, and what that does to the score",
    );
    text.push_str(&sweep::page(&ablated));
    let probe = layers::train(&session, NAME).await?;
    section(
        &mut text,
        paint,
        "Which layer knows? A probe for each, on texts that people rated",
    );
    text.push_str(&layers::page(&probe));
    section(&mut text, paint, "Hidden states");
    text.push_str(&hidden_states(&captured, &model)?);
    section(&mut text, paint, "Files");
    let pictures = Pictures {
        attention: &attention,
        explained: explained.html(),
        heads: sweep::html(&ablated),
        layers: layers::png(&probe)?,
    };
    text.push_str(&files(&args.out, &pictures)?);
    if let Some(admin) = local.admin_address() {
        section(
            &mut text,
            paint,
            &format!("Metrics (http://{admin}/metrics)"),
        );
        text.push_str(&metrics::summary(admin, NAME).await);
    }
    if !args.exit {
        section(&mut text, paint, "Try it");
        text.push_str(&commands(address, &args.text, layer, head));
    }
    out::print(&text)
}

fn request(text: &str) -> CaptureRequest {
    CaptureRequest {
        model: NAME.into(),
        input: Some(Input {
            kind: Some(Kind::Text(Text {
                text: text.to_owned(),
                ..Default::default()
            })),
        }),
        selection: Some(Selection {
            hooks: ["pattern", "hidden_states.*"].map(String::from).to_vec(),
            ..Default::default()
        }),
        intervention: None,
    }
}

fn section(text: &mut String, paint: Paint, title: &str) {
    let _ = writeln!(text, "\n{}", paint.bold(title));
}

fn opening(
    model: &Model,
    address: SocketAddr,
    admin: Option<SocketAddr>,
    began: Instant,
    paint: Paint,
) -> String {
    let dims = model.dims.unwrap_or_default();
    let mut text = format!(
        "{}\n",
        paint.bold(&format!(
            "introspectd {}: demonstration",
            env!("CARGO_PKG_VERSION")
        ))
    );
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<12} {}", clean(&value));
    };
    let usual = |a: SocketAddr, wanted: &str| {
        if a.to_string() == wanted {
            String::new()
        } else {
            format!(" ({wanted} is taken)")
        }
    };
    line("gRPC", format!("{address}{}", usual(address, GRPC)));
    if let Some(a) = admin {
        line("admin", format!("http://{a}{}", usual(a, ADMIN)));
    }
    line(
        "model",
        format!(
            "\"{NAME}\", {}: {} layers of {} heads, d_model {}, plain ONNX without a single attention among its outputs",
            model.task,
            dims.layers,
            dims.heads.unwrap_or(0),
            dims.d_model.unwrap_or(0)
        ),
    );
    if let Some(c) = &model.certificate {
        let held = c.checks.iter().filter(|c| c.passed).count();
        line(
            "certificate",
            format!(
                "{held} of {} checks held, {} hook points found",
                c.checks.len(),
                model.hooks.len()
            ),
        );
    }
    line("ready after", out::seconds(began.elapsed().as_secs_f64()));
    text
}

fn tokens(tokens: &[Token], paint: Paint) -> String {
    let shown: Vec<String> = tokens
        .iter()
        .map(|t| {
            let word = clean(&t.text);
            if t.special { paint.dim(&word) } else { word }
        })
        .collect();
    shown.join(" ")
}

fn map(attention: &Attention, layer: usize, head: usize) -> Result<String, CliError> {
    let pattern = attention.head(layer, head).ok_or_else(|| {
        let heads = attention.layers.first().map_or(0, |l| l.heads.len());
        CliError::Usage(format!(
            "the model has no layer {layer} with a head {head}: it has {} layers of {heads} heads, counted from 0",
            attention.layers.len()
        ))
    })?;
    Ok(show::map(&attention.tokens, pattern))
}

/// A line for each: how long the vector of the first token is and how far the layer moved it.
fn hidden_states(captured: &Captured, model: &Model) -> Result<String, CliError> {
    let mut rows = Vec::new();
    for named in &captured.tensors {
        let Data::Dense(tensor) = &named.data else {
            continue;
        };
        let [tokens, width] = *tensor.shape() else {
            continue;
        };
        if view::layer(&named.name).is_some() || named.axes.first().is_none_or(|a| a != "pos") {
            continue;
        }
        let values = tensor.to_f32().map_err(|e| CliError::new(e.to_string()))?;
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
        #[allow(clippy::cast_precision_loss)] // a mean for people
        let mean = values.chunks(width.max(1)).map(norm).sum::<f32>() / tokens.max(1) as f32;
        let aliases = model.hooks.iter().find(|h| h.name == named.name);
        let alias = aliases.and_then(|h| h.aliases.iter().find(|a| a.starts_with("hidden_states")));
        rows.push(vec![
            named.name.clone(),
            alias.cloned().unwrap_or_default(),
            named.axes.join(", "),
            format!("{tokens} x {width}"),
            tensor.dtype().to_string(),
            format!("{mean:.2}"),
        ]);
    }
    Ok(out::table(
        &["name", "also", "axes", "shape", "type", "mean length"],
        rows,
    ))
}

/// What is drawn.
struct Pictures<'a> {
    attention: &'a Attention,
    explained: String,
    heads: String,
    layers: Vec<u8>,
}

fn files(folder: &Path, pictures: &Pictures<'_>) -> Result<String, CliError> {
    let attention = pictures.attention;
    fs::create_dir_all(folder).map_err(|e| {
        CliError::new(format!(
            "cannot make the folder \"{}\": {e}",
            folder.display()
        ))
    })?;
    let png = picture::png::attention(attention).map_err(|e| CliError::new(e.to_string()))?;
    let page = picture::page::attention(attention);
    let mut text = String::new();
    for (name, bytes, what) in [
        ("attention.png", &png[..], "all layers and heads"),
        (
            "attention.html",
            page.as_bytes(),
            "the same, to click through",
        ),
        (
            "attribution.html",
            pictures.explained.as_bytes(),
            "the text, coloured by integrated gradients",
        ),
        (
            "heads.html",
            pictures.heads.as_bytes(),
            "what each head does to the score",
        ),
        (
            "layers.png",
            &pictures.layers,
            "what the probes know, by layer",
        ),
    ] {
        let path = folder.join(name);
        out::write_file(&path, bytes)?;
        let _ = writeln!(text, "  {}  {what}", path.display());
    }
    Ok(text)
}

/// Commands to paste, with this executable as it was called.
fn commands(address: SocketAddr, text: &str, layer: usize, head: usize) -> String {
    let me = std::env::args()
        .next()
        .unwrap_or_else(|| "introspectd".into());
    let me = clean(&me);
    let server = if address.to_string() == GRPC {
        String::new()
    } else {
        format!(" --server http://{address}")
    };
    let quoted = quote(text);
    let json = serde_json::json!({
        "model": NAME,
        "input": { "text": { "text": text } },
        "selection": { "hooks": [format!("attentions.{layer}")], "heads": [head] },
    });
    let json = quote(&json.to_string());
    format!(
        "  {me} capture {NAME} {quoted} -o demo.npz{server}\n  \
         {me} attribute {NAME} {quoted} --words{server}\n  \
         {me} sweep {NAME} {quoted} --hooks post --by dim --method both --most 20{server}\n  \
         {me} inspect {NAME}{server}\n  \
         {me} capture {NAME} {quoted} --hooks post --top-k 5 --by-magnitude{server}\n  \
         grpcurl -plaintext -d {json} {address} introspect.v1.CaptureService/Capture\n"
    )
}

/// A word of a shell.
fn quote(text: &str) -> String {
    format!("'{}'", clean(text).replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_cannot_leave_its_quotes() {
        assert_eq!(quote("it's; rm"), "'it'\\''s; rm'");
    }
}
