//! `introspect.v1.AnalysisService`.

mod heads;
mod lens;
mod neurons;

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    daemon::State,
    wire::introspect::{self as pb, analysis_service_server::AnalysisService},
};

/// Messages that wait for a slow reader. Progress is left out before anything waits for it.
const WAITING: usize = 4;

type Messaged<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

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
