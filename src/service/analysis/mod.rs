//! `introspect.v1.AnalysisService`.

mod lens;

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use tonic::{Request, Response, Status};

use super::{
    daemon::State,
    wire::introspect::{self as pb, analysis_service_server::AnalysisService},
};

type Messaged<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Analyses {
    pub(super) state: Arc<State>,
}

#[tonic::async_trait]
impl AnalysisService for Analyses {
    type LensStream = Messaged<pb::LensResponse>;

    async fn lens(
        &self,
        request: Request<pb::LensRequest>,
    ) -> Result<Response<Self::LensStream>, Status> {
        lens::answer(&self.state, request).await
    }
}
