//! `tokenize` and `predict`: a text in, its tokens or its prediction out.

use clap::Args;
use serde_json::{Value, json};

use super::{
    capture::{
        self, json as as_json,
        select::{OtherArgs, TextArgs},
        show,
    },
    client::{Session, Target},
    error::CliError,
    intervene::edit::EditArgs,
    out,
};
use crate::service::wire::introspect::{
    CaptureRequest, Encoding, Input, Selection, TokenizeRequest,
};

pub(super) const TOKENIZE_EXAMPLES: &str = "\
Examples:
  introspectd tokenize demo \"This movie was fantastic!\"
  introspectd tokenize demo \"One text.\" \"Another.\" --json
  introspectd tokenize ./models/bert \"Without a daemon\"";

pub(super) const PREDICT_EXAMPLES: &str = "\
Examples:
  introspectd predict demo \"This movie was fantastic!\"
  introspectd predict gpt2 \"The capital of France is\" --top 10
  introspectd predict demo \"One text.\" \"Another.\" --json
  introspectd predict demo \"This movie was fantastic!\" --edit 'z[layer=3;head=1] zero'";

/// Arguments of `tokenize`.
#[derive(Args, Clone, Debug)]
pub(super) struct TokenizeArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Texts
    #[arg(required = true)]
    text: Vec<String>,
    #[command(flatten)]
    texts: TextArgs,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Arguments of `predict`.
#[derive(Args, Clone, Debug)]
pub(super) struct PredictArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Texts
    #[arg(required_unless_present_any = ["ids", "inputs"])]
    text: Vec<String>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    edits: EditArgs,
    /// Candidates to show
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Output")]
    top: u32,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Runs `tokenize`.
pub(super) async fn tokenize(args: &TokenizeArgs) -> Result<(), CliError> {
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = TokenizeRequest {
        model,
        texts: args.text.iter().map(|t| args.texts.text(t)).collect(),
    };
    let answer = session.models().tokenize(request).await;
    session.close().await;
    let encodings = answer?.into_inner().encodings;
    if encodings.len() != args.text.len() {
        return Err(CliError::new(format!(
            "{} texts were sent, {} came back",
            args.text.len(),
            encodings.len()
        )));
    }
    if args.json {
        let all: Vec<Value> = encodings
            .iter()
            .map(|e| {
                json!({
                    "tokens": e.tokens.iter().map(as_json::token).collect::<Vec<_>>(),
                    "truncated_tokens": e.truncated_tokens,
                })
            })
            .collect();
        return out::print_json(&json!({ "encodings": all }));
    }
    let mut text = String::new();
    for (i, (encoding, source)) in encodings.iter().zip(&args.text).enumerate() {
        if i > 0 {
            text.push('\n');
        }
        text.push_str(&tokens(encoding, source, args.texts.pair.as_deref()));
        if encoding.truncated_tokens > 0 {
            text.push_str(&format!(
                "{} more tokens were cut off\n",
                encoding.truncated_tokens
            ));
        }
    }
    out::print(&text)
}

fn tokens(encoding: &Encoding, text: &str, pair: Option<&str>) -> String {
    out::table(
        &["", "id", "token", "bytes", "text", "word"],
        encoding.tokens.iter().enumerate().map(|(i, t)| {
            let source = if t.sequence == 0 {
                text
            } else {
                pair.unwrap_or_default()
            };
            let stands_for = source
                .get(t.start as usize..t.end as usize)
                .unwrap_or_default();
            let (bytes, stands_for) = if t.special {
                (String::new(), "(special)".to_owned())
            } else {
                (format!("{}..{}", t.start, t.end), format!("{stands_for:?}"))
            };
            vec![
                i.to_string(),
                t.id.to_string(),
                t.text.clone(),
                bytes,
                stands_for,
                t.word.map_or(String::new(), |w| w.to_string()),
            ]
        }),
    )
}

/// Runs `predict`.
pub(super) async fn predict(args: &PredictArgs) -> Result<(), CliError> {
    let intervention = args.edits.intervention(&args.texts)?;
    let texts = args.text.iter().map(|text| args.texts.input(text));
    let inputs: Vec<Input> = args.other.input()?.into_iter().chain(texts).collect();
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let selection = Selection {
        candidates: args.top,
        ..Default::default()
    };
    let asked = inputs.into_iter().map(|input| CaptureRequest {
        model: model.clone(),
        input: Some(input),
        selection: Some(selection.clone()),
        intervention: intervention.clone(),
    });
    let done = predictions(&session, asked).await;
    session.close().await;
    let answers = done?;
    if args.json {
        let all: Vec<Value> = answers
            .iter()
            .map(|a| {
                a.prediction
                    .as_ref()
                    .map_or(Value::Null, as_json::prediction)
            })
            .collect();
        return out::print_json(&json!({ "predictions": all }));
    }
    let mut text = String::new();
    for (at, answer) in answers.iter().enumerate() {
        if answers.len() > 1 {
            let source = args.text.get(at).map_or("", String::as_str);
            text.push_str(&format!("{}\n", out::clean(source)));
        }
        match &answer.prediction {
            Some(prediction) => text.push_str(&show::prediction(prediction, &answer.header.tokens)),
            None => {
                return Err(CliError::new(format!(
                    "the model predicts nothing: it is for \"{}\"",
                    out::clean(&answer.header.task)
                ))
                .advise("`introspectd capture` shows its hidden states"));
            }
        }
    }
    out::print(&text)
}

async fn predictions(
    session: &Session,
    asked: impl Iterator<Item = CaptureRequest>,
) -> Result<Vec<super::assemble::Captured>, CliError> {
    let mut answers = Vec::new();
    for request in asked {
        answers.push(capture::capture(session.captures(), request).await?);
    }
    Ok(answers)
}
