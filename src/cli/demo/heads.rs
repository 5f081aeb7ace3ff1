//! Which heads does the prediction need? Each is put to zero by itself, over the service.

use indicatif::ProgressBar;

use crate::{
    cli::{
        client::Session,
        error::CliError,
        sweep::{self, Swept},
    },
    service::wire::introspect::{
        Input, SweepAxis, SweepRequest, Text, Zero, input::Kind, sweep_request::Change,
    },
};

/// Sweeps all heads of all layers.
pub(super) async fn ablate(session: &Session, model: &str, text: &str) -> Result<Swept, CliError> {
    let request = SweepRequest {
        model: model.to_owned(),
        input: Some(Input {
            kind: Some(Kind::Text(Text {
                text: text.to_owned(),
                ..Default::default()
            })),
        }),
        hooks: vec!["attn.hook_z".to_owned()],
        by: vec![SweepAxis::Head.into()],
        change: Some(Change::Zero(Zero {})),
        ..Default::default()
    };
    sweep::ask(session.interventions(), request, &ProgressBar::hidden()).await
}
