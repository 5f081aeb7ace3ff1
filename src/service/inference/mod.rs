//! `inference.GRPCInferenceService`: the Open Inference Protocol v2 with Triton's extensions, so that existing clients work unchanged.
//!
//! - `edits`: what is changed inside of the model meanwhile;
//! - `rows`: a request's inputs to rows of the engine; texts are tokenised here, each run at its own length;
//! - `answer`: what was run to outputs, joined along the batch axis;
//! - `statistics`: counts and times per model.

mod answer;
mod edits;
mod rows;
mod statistics;

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

pub(super) use self::statistics::Statistics;
use super::{
    call::Call,
    daemon::State,
    explained::{self, Explained},
    status, to_proto,
    wire::inference::{
        self as pb, grpc_inference_service_server::GrpcInferenceService,
        model_metadata_response::TensorMetadata,
    },
};
use crate::{
    engine::{EngineError, Job, Lane, StageTimings},
    ipc::{
        info::ModelInfo,
        spec::{Plan, VariantSpec},
    },
    model::ModelState,
};

/// Requests of a stream that are worked on at a time.
const AHEAD: usize = 32;
/// Extensions of the protocol that are served.
const EXTENSIONS: [&str; 5] = [
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
    "binary_tensor_data",
];
const PLATFORM: &str = "onnxruntime_onnx";

type Answer<T> = Result<Response<T>, Status>;

pub(super) struct Inference {
    pub(super) state: Arc<State>,
}

fn fails(error: EngineError) -> Status {
    status::status(&error)
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(
        &self,
        _: Request<pb::ServerLiveRequest>,
    ) -> Answer<pb::ServerLiveResponse> {
        Ok(Response::new(pb::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<pb::ServerReadyRequest>,
    ) -> Answer<pb::ServerReadyResponse> {
        let ready = self.state.is_ready();
        Ok(Response::new(pb::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<pb::ModelReadyRequest>,
    ) -> Answer<pb::ModelReadyResponse> {
        let pb::ModelReadyRequest { name, version } = request.into_inner();
        match self.state.registry.get_version(&name, &version) {
            Ok(_) => Ok(Response::new(pb::ModelReadyResponse { ready: true })),
            // One that is not there is not ready either, as Triton's clients expect.
            Err(
                EngineError::Unavailable { .. }
                | EngineError::FailedPrecondition { .. }
                | EngineError::NotFound { .. },
            ) => Ok(Response::new(pb::ModelReadyResponse { ready: false })),
            Err(error) => Err(fails(error)),
        }
    }

    async fn server_metadata(
        &self,
        _: Request<pb::ServerMetadataRequest>,
    ) -> Answer<pb::ServerMetadataResponse> {
        Ok(Response::new(pb::ServerMetadataResponse {
            name: "introspectd".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<pb::ModelMetadataRequest>,
    ) -> Answer<pb::ModelMetadataResponse> {
        let pb::ModelMetadataRequest { name, version } = request.into_inner();
        let handle = self
            .state
            .registry
            .get_version(&name, &version)
            .map_err(fails)?;
        Ok(Response::new(metadata(handle.info(), handle.generation())))
    }

    async fn model_infer(
        &self,
        request: Request<pb::ModelInferRequest>,
    ) -> Answer<pb::ModelInferResponse> {
        let call = Call::of(&request);
        self.state
            .infer(request.into_inner(), &call)
            .await
            .map(Response::new)
            .map_err(fails)
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<pb::ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<pb::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        let call = Call::of(&request);
        let state = self.state.clone();
        let answers = request
            .into_inner()
            .map(move |request| {
                let (state, call) = (state.clone(), call.clone());
                async move {
                    let request = request?;
                    let call = Call {
                        arrived: std::time::Instant::now(),
                        ..call
                    };
                    let failed = pb::ModelInferResponse {
                        model_name: request.model_name.clone(),
                        id: request.id.clone(),
                        ..pb::ModelInferResponse::default()
                    };
                    Ok(match state.infer(request, &call).await {
                        Ok(response) => pb::ModelStreamInferResponse {
                            error_message: String::new(),
                            infer_response: Some(response),
                        },
                        Err(error) => pb::ModelStreamInferResponse {
                            error_message: fails(error).message().to_owned(),
                            infer_response: Some(failed),
                        },
                    })
                }
            })
            .buffered(AHEAD);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_statistics(
        &self,
        request: Request<pb::ModelStatisticsRequest>,
    ) -> Answer<pb::ModelStatisticsResponse> {
        let pb::ModelStatisticsRequest { name, version } = request.into_inner();
        let names: Vec<String> = if name.is_empty() {
            let serving = self.state.registry.list();
            serving
                .values()
                .filter(|s| s.state == ModelState::Ready)
                .map(|s| s.name.clone())
                .collect()
        } else {
            vec![name]
        };
        let mut model_stats = Vec::with_capacity(names.len());
        for name in names {
            let handle = self
                .state
                .registry
                .get_version(&name, &version)
                .map_err(fails)?;
            model_stats.push(self.state.statistics.of(&name, handle.generation()));
        }
        Ok(Response::new(pb::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<pb::RepositoryIndexRequest>,
    ) -> Answer<pb::RepositoryIndexResponse> {
        let only_ready = request.into_inner().ready;
        let models = self
            .state
            .registry
            .list()
            .values()
            .filter(|s| !only_ready || s.state == ModelState::Ready)
            .map(|s| {
                let (state, reason) = match &s.state {
                    ModelState::Ready => ("READY", ""),
                    ModelState::Loading => ("LOADING", ""),
                    ModelState::Draining => ("UNLOADING", ""),
                    ModelState::Unloaded => ("UNAVAILABLE", "unloaded"),
                    ModelState::Failed { reason } | ModelState::Withdrawn { reason } => {
                        ("UNAVAILABLE", reason.as_str())
                    }
                };
                let version = match s.state {
                    ModelState::Ready => s.generation.to_string(),
                    ModelState::Loading
                    | ModelState::Draining
                    | ModelState::Unloaded
                    | ModelState::Failed { .. }
                    | ModelState::Withdrawn { .. } => String::new(),
                };
                pb::repository_index_response::ModelIndex {
                    name: s.name.clone(),
                    version,
                    state: state.to_owned(),
                    reason: reason.to_owned(),
                }
            })
            .collect();
        Ok(Response::new(pb::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<pb::RepositoryModelLoadRequest>,
    ) -> Answer<pb::RepositoryModelLoadResponse> {
        let request = request.into_inner();
        if let Some(key) = request.parameters.keys().next() {
            return Err(fails(EngineError::invalid(
                "parameters",
                format!("\"{key}\" is refused: a model is what its folder holds"),
            )));
        }
        let name = model_of(request.model_name, request.repository_name)?;
        // One that does not serve is loaded by this as well.
        self.state.registry.reload(&name).await.map_err(fails)?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {
            model_name: name,
            is_loaded: true,
        }))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answer<pb::RepositoryModelUnloadResponse> {
        let request = request.into_inner();
        let name = model_of(request.model_name, request.repository_name)?;
        self.state.registry.unload(&name).await.map_err(fails)?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {
            model_name: name,
            is_unloaded: true,
        }))
    }
}

/// Triton's field, or KServe's only one, which has the number of Triton's repository.
fn model_of(model: String, repository: String) -> Result<String, Status> {
    let name = if model.is_empty() { repository } else { model };
    if name.is_empty() {
        return Err(fails(EngineError::invalid(
            "model_name",
            "is empty: name a model",
        )));
    }
    Ok(name)
}

fn metadata(info: &ModelInfo, generation: u64) -> pb::ModelMetadataResponse {
    let tensor = |name: &str, dtype, dims| TensorMetadata {
        name: name.to_owned(),
        datatype: rows::datatype(dtype).to_owned(),
        shape: dims,
    };
    let mut properties: std::collections::HashMap<String, String> = [
        ("task", info.task.name()),
        ("fingerprint", &info.fingerprint),
        ("provider", &info.provider),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    if info.tokenizer.is_some() {
        properties.insert("text_inputs".to_owned(), "text,text_pair".to_owned());
    }
    pb::ModelMetadataResponse {
        name: info.name.clone(),
        versions: vec![generation.to_string()],
        platform: PLATFORM.to_owned(),
        inputs: info
            .inputs
            .iter()
            .map(|i| tensor(&i.name, i.dtype, to_proto::dims(&i.dims)))
            .collect(),
        outputs: info
            .outputs
            .iter()
            .map(|o| tensor(&o.name, o.dtype, to_proto::dims(&o.dims)))
            .collect(),
        properties,
    }
}

impl State {
    /// Runs a request, and counts it.
    async fn infer(
        &self,
        request: pb::ModelInferRequest,
        call: &Call,
    ) -> Result<pb::ModelInferResponse, EngineError> {
        let model = request.model_name.clone();
        let handle = self.registry.get_version(&model, &request.model_version)?;
        let mut timings = StageTimings::default();
        let mut explained = None;
        let answered = async {
            let info = handle.info().clone();
            let outputs = answer::Asked::of(&info, &request.outputs)?;
            let hooks = answer::hooks(&outputs);
            let intervention = edits::asked(&request)?;
            if !hooks.is_empty() || intervention.is_some() {
                explained = Some(Explained::new(&model, "infer", call.arrived));
            }
            let ctx = call.ctx();
            let (mut groups, tokenize) = rows::groups(&handle, &request, &ctx).await?;
            timings.tokenize = tokenize;
            let rows: usize = groups.iter().map(|g| g.rows).sum();
            let picks = outputs.iter().map(|o| o.pick.clone()).collect::<Vec<_>>();
            for group in &mut groups {
                group.picks.clone_from(&picks);
            }
            let plain = hooks.is_empty();
            let lane = if plain { Lane::Predict } else { Lane::Interactive };
            // The answer is one message, so all of it is held here.
            let bytes = answer::estimate(&info, &outputs, &groups);
            if bytes > self.config.max_capture {
                return Err(EngineError::exhausted(
                    format!(
                        "the answer would take {bytes} bytes, more than the limit of {}: ask for fewer outputs or rows",
                        self.config.max_capture
                    ),
                    None,
                ));
            }
            let _held = handle.buffer(bytes, lane)?;
            let spec = VariantSpec {
                plan: if plain { Plan::Plain } else { Plan::Rewritten },
                keep_outputs: plain || outputs.iter().any(|o| !o.is_hook),
                expose: hooks,
                ..VariantSpec::plain()
            };
            let editor = self.editor(&handle, intervention).await;
            let editor = editor.map_err(edits::told)?;
            let apart = edits::apart(editor.as_ref(), &handle, groups, (lane, &ctx)).await?;
            let runs = apart.into_iter().enumerate().map(|(first, (model, groups))| {
                let job = Job {
                    spec: spec.clone(),
                    lane,
                    groups,
                };
                let (ctx, request) = (&ctx, &request);
                async move {
                    let rows = model.submit(job, ctx).await;
                    let mut rows = rows.map_err(|e| rows::at_inputs(e, request))?;
                    let mut done = Vec::new();
                    while let Some(some) = rows.next().await {
                        let mut some = some?;
                        some.group += first;
                        done.push(some);
                    }
                    Ok::<_, EngineError>(done)
                }
            });
            let done = stream::iter(runs).buffered(AHEAD);
            let done: Vec<Vec<_>> = done.try_collect().await?;
            let mut done: Vec<_> = done.into_iter().flatten().collect();
            let begun = std::time::Instant::now();
            done.sort_by_key(|d| (d.group, d.rows.start));
            let mut longest = StageTimings::default();
            for part in &done {
                longest.queue = longest.queue.max(part.timings.queue);
                longest.build = longest.build.max(part.timings.build);
                longest.run = longest.run.max(part.timings.run);
            }
            timings += longest;
            let response = answer::response(&handle, &request, outputs, done)?;
            timings.encode = begun.elapsed();
            Ok((rows, response))
        }
        .await;
        let took = call.arrived.elapsed();
        match answered {
            Ok((rows, response)) => {
                self.statistics.succeeded(&model, rows, &timings, took);
                match explained {
                    Some(explained) => explained.answered(&timings),
                    None => explained::stages(&model, "infer", &timings),
                }
                Ok(response)
            }
            Err(error) => {
                self.statistics.failed(&model, took);
                if let Some(explained) = explained {
                    explained.failed(&error);
                }
                Err(error)
            }
        }
    }
}
