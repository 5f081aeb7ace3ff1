//! `introspect.v1.AnalysisService`.

use std::sync::Arc;

use super::{daemon::State, wire::introspect::analysis_service_server::AnalysisService};

pub(super) struct Analyses {
    pub(super) state: Arc<State>,
}

#[tonic::async_trait]
impl AnalysisService for Analyses {}
