//! `introspect.v1.AnalysisService`.

mod heads;
mod lens;
mod neurons;

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};

use super::{
    daemon::State,
    teller::Messaged,
    wire::introspect::{self as pb, analysis_service_server::AnalysisService},
};

pub(super) struct Analyses {
    pub(super) state: Arc<State>,
}

#[tonic::async_trait]
impl AnalysisService for Analyses {
    type HeadsStream = Messaged<pb::HeadsResponse>;

    async fn heads(
        &self,
        request: Request<pb::HeadsRequest>,
    ) -> Result<Response<Self::HeadsStream>, Status> {
        heads::answer(&self.state, request).await
    }

    type NeuronsStream = Messaged<pb::NeuronsResponse>;

    async fn neurons(
        &self,
        request: Request<Streaming<pb::NeuronsRequest>>,
    ) -> Result<Response<Self::NeuronsStream>, Status> {
        neurons::answer(&self.state, request).await
    }

    type LensStream = Messaged<pb::LensResponse>;

    async fn lens(
        &self,
        request: Request<pb::LensRequest>,
    ) -> Result<Response<Self::LensStream>, Status> {
        lens::answer(&self.state, request).await
    }
}
