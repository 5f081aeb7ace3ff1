//! `introspect.v1.ModelService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, stream};
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    daemon::State,
    from_proto,
    messages::Ledger,
    status, to_proto,
    wire::introspect::{
        self as pb, get_graph_response::Item as Piece, model_service_server::ModelService,
    },
};
use crate::{
    engine::{EngineError, ModelHandle, TokenizeOptions},
    methods::input,
};

/// Most texts of a call.
const MOST_TEXTS: usize = 1024;
/// Most bytes of text in a piece of a graph.
const TEXT_PIECE: usize = 64 << 10;

type Answer<T> = Result<Response<T>, Status>;

pub(super) struct Models {
    pub(super) state: Arc<State>,
}

impl Models {
    fn handle(&self, model: String) -> Result<ModelHandle, EngineError> {
        self.state.registry.get(&from_proto::named(model)?)
    }

    fn status_of(&self, name: &str) -> pb::ModelStatus {
        self.state
            .registry
            .list()
            .get(name)
            .map(to_proto::model_status)
            .unwrap_or_default()
    }
}

fn fails(error: EngineError) -> Status {
    status::status(&error)
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn list_models(
        &self,
        request: Request<pb::ListModelsRequest>,
    ) -> Answer<pb::ListModelsResponse> {
        let registry = &self.state.registry;
        if request.into_inner().rescan {
            registry.rescan().await.map_err(fails)?;
        }
        Ok(Response::new(pb::ListModelsResponse {
            models: registry
                .list()
                .values()
                .map(to_proto::model_status)
                .collect(),
            skipped: registry
                .skipped()
                .into_iter()
                .map(to_proto::skipped)
                .collect(),
        }))
    }

    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Answer<pb::GetModelResponse> {
        let handle = self.handle(request.into_inner().model).map_err(fails)?;
        let info = handle.info();
        let status = pb::ModelStatus {
            generation: handle.generation(),
            ..self.status_of(&info.name)
        };
        Ok(Response::new(pb::GetModelResponse {
            model: Some(to_proto::model(info, status)),
        }))
    }

    type GetGraphStream = Pin<Box<dyn Stream<Item = Result<pb::GetGraphResponse, Status>> + Send>>;

    async fn get_graph(
        &self,
        request: Request<pb::GetGraphRequest>,
    ) -> Answer<Self::GetGraphStream> {
        let call = Call::of(&request);
        let handle = self.handle(request.into_inner().model).map_err(fails)?;
        let text = handle.dump(&call.ctx()).await.map_err(fails)?;
        let mut ledger = Ledger::default();
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (piece, left) = rest.split_at(rest.floor_char_boundary(TEXT_PIECE.min(rest.len())));
            ledger.sent(&[piece.as_bytes()]);
            pieces.push(Piece::Text(piece.to_owned()));
            rest = left;
        }
        pieces.push(Piece::Summary(pb::Summary {
            messages: ledger.messages,
            bytes: ledger.bytes,
            crc32c: ledger.crc32c,
            timings: Some(to_proto::timings(
                &Default::default(),
                call.arrived.elapsed(),
            )),
            ..pb::Summary::default()
        }));
        let messages = pieces
            .into_iter()
            .map(|item| Ok(pb::GetGraphResponse { item: Some(item) }));
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }

    async fn load_model(
        &self,
        request: Request<pb::LoadModelRequest>,
    ) -> Answer<pb::LoadModelResponse> {
        let model = from_proto::named(request.into_inner().model).map_err(fails)?;
        self.state.registry.load(&model).await.map_err(fails)?;
        Ok(Response::new(pb::LoadModelResponse {
            status: Some(self.status_of(&model)),
        }))
    }

    async fn unload_model(
        &self,
        request: Request<pb::UnloadModelRequest>,
    ) -> Answer<pb::UnloadModelResponse> {
        let model = from_proto::named(request.into_inner().model).map_err(fails)?;
        self.state.registry.unload(&model).await.map_err(fails)?;
        Ok(Response::new(pb::UnloadModelResponse {
            status: Some(self.status_of(&model)),
        }))
    }

    async fn reload_model(
        &self,
        request: Request<pb::ReloadModelRequest>,
    ) -> Answer<pb::ReloadModelResponse> {
        let model = from_proto::named(request.into_inner().model).map_err(fails)?;
        self.state.registry.reload(&model).await.map_err(fails)?;
        Ok(Response::new(pb::ReloadModelResponse {
            status: Some(self.status_of(&model)),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<pb::TokenizeRequest>,
    ) -> Answer<pb::TokenizeResponse> {
        let call = Call::of(&request);
        let pb::TokenizeRequest { model, texts } = request.into_inner();
        let handle = self.handle(model).map_err(fails)?;
        if texts.is_empty() || texts.len() > MOST_TEXTS {
            let message = format!("has {} entries: give 1 to {MOST_TEXTS}", texts.len());
            return Err(fails(EngineError::invalid("texts", message)));
        }
        let mut encodings = Vec::with_capacity(texts.len());
        // Neighbours with the same options go together.
        let mut texts = texts
            .into_iter()
            .map(from_proto::text)
            .enumerate()
            .peekable();
        while let Some((first, (text, options))) = texts.next() {
            let mut together = vec![text];
            let same = |(_, (_, o)): &(usize, (_, TokenizeOptions))| *o == options;
            while let Some((_, (text, _))) = texts.next_if(same) {
                together.push(text);
            }
            let field = match together.len() {
                1 => format!("texts[{first}]"),
                n => format!("texts[{first}..{}]", first + n),
            };
            let made = handle
                .tokenize(together, options, &call.ctx())
                .await
                .map_err(|e| fails(input::at_field(e, &field)))?;
            encodings.extend(made.into_iter().map(|encoding| {
                pb::Encoding {
                    truncated_tokens: encoding.truncated,
                    tokens: input::tokens(encoding)
                        .into_iter()
                        .map(to_proto::token)
                        .collect(),
                }
            }));
        }
        Ok(Response::new(pb::TokenizeResponse { encodings }))
    }
}
