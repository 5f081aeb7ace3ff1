//! What truncation cut off.
//!
//! Answers of probes do not say it, so that the tokens of the texts are asked for. That costs nothing unless texts may be cut.

use futures::{StreamExt as _, stream};

use crate::{
    cli::client::Session,
    service::wire::introspect::{self as pb, input::Kind},
};

/// Texts whose tokens are asked for at a time.
const AHEAD: usize = 16;

/// The texts that may be cut.
pub(super) fn texts<'a>(inputs: impl Iterator<Item = &'a pb::Input>) -> Vec<pb::Text> {
    let text = |input: &pb::Input| match &input.kind {
        Some(Kind::Text(text)) if text.truncate => Some(text.clone()),
        Some(Kind::Text(_) | Kind::Tokens(_) | Kind::Tensors(_)) | None => None,
    };
    inputs.filter_map(text).collect()
}

/// Says how much was cut off, if anything was. A text that has no tokens failed, and was told as such.
pub(super) async fn note(session: &Session, model: String, texts: Vec<pb::Text>) -> String {
    let cut = texts.into_iter().map(|text| {
        let request = pb::TokenizeRequest {
            model: model.clone(),
            texts: vec![text],
        };
        let mut client = session.models();
        async move {
            let answer = client.tokenize(request).await.ok()?.into_inner();
            let encoding = answer.encodings.into_iter().next()?;
            Some(u64::from(encoding.truncated_tokens))
        }
    });
    let cut = stream::iter(cut).buffer_unordered(AHEAD);
    let cut: u64 = cut.fold(0, async |all, n| all + n.unwrap_or(0)).await;
    if cut == 0 {
        return String::new();
    }
    told(cut, most(session, model).await)
}

fn told(cut: u64, most: Option<u64>) -> String {
    let takes = most.map_or(String::new(), |most| format!(": the model takes {most}"));
    format!("note: {cut} tokens were cut off{takes}\n")
}

/// Most tokens of an input.
async fn most(session: &Session, model: String) -> Option<u64> {
    let mut client = session.models();
    let answer = client.get_model(pb::GetModelRequest { model });
    answer.await.ok()?.into_inner().model?.max_tokens
}
