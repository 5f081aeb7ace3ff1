//! The prediction, explained twice: by gradients along a path, and by differences of values along the same path.

use indicatif::ProgressBar;

use crate::{
    cli::{
        attribute::{answer, answer::Explained, files, show},
        client::Session,
        error::CliError,
        out,
        picture::{attribution, terminal::Style},
    },
    service::wire::introspect::{
        AttributeRequest, FiniteDifference, Input, IntegratedGradients, Method, Text,
        input::Kind as Given, method::Kind,
    },
};

/// Points of the path, the same for both.
const STEPS: u32 = 20;

/// Both explanations.
pub(super) struct Twice {
    gradients: Explained,
    differences: Explained,
}

/// Asks for both.
pub(super) async fn explain(session: &Session, model: &str, text: &str) -> Result<Twice, CliError> {
    let ask = async |kind| {
        let request = AttributeRequest {
            model: model.to_owned(),
            input: Some(Input {
                kind: Some(Given::Text(Text {
                    text: text.to_owned(),
                    ..Default::default()
                })),
            }),
            method: Some(Method { kind: Some(kind) }),
            ..Default::default()
        };
        answer::ask(session.attributions(), request, &ProgressBar::hidden()).await
    };
    Ok(Twice {
        gradients: ask(Kind::IntegratedGradients(IntegratedGradients {
            steps: STEPS,
            ..Default::default()
        }))
        .await?,
        differences: ask(Kind::FiniteDifference(FiniteDifference {
            path_steps: STEPS,
            ..Default::default()
        }))
        .await?,
    })
}

impl Twice {
    /// What is explained.
    pub(super) fn target(&self) -> String {
        self.gradients.target()
    }

    /// The page of the first.
    pub(super) fn html(&self) -> String {
        attribution::html(&files::pictured(&self.gradients))
    }

    /// The text, the scores side by side, and how well they agree.
    pub(super) fn page(&self) -> String {
        let (first, second) = (self.gradients.scored(), self.differences.scored());
        let mut text = format!("  {}\n\n", show::coloured(&first, Style::of_stdout()));
        let rows = first.iter().zip(&second).map(|(a, b)| {
            vec![
                a.text.clone(),
                format!("{:+.4}", a.score),
                format!("{:+.4}", b.score),
                b.error.map_or(String::new(), |e| format!("±{e:.1e}")),
            ]
        });
        let heading = ["token", "by gradients", "by differences", "their error"];
        text.push_str(&out::table(&heading, rows));
        let apart = first
            .iter()
            .zip(&second)
            .fold(0.0f32, |m, (a, b)| m.max((a.score - b.score).abs()));
        let ratio = self.gradients.result.residual_ratio.unwrap_or_default();
        text.push_str(&format!(
            "  Integrated gradients, {STEPS} points: delta {:+.1e}, {:.4} % of what {} does to the score.\n  \
             Finite differences along the same path, no gradient used: at most {apart:.1e} apart.\n",
            self.gradients.result.delta.unwrap_or_default(),
            100.0 * ratio,
            "replacing the text by padding",
        ));
        text
    }
}
