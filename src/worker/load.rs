//! From a folder to a model that serves: read, unfuse, find the anatomy by trial runs, certify.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use ort::session::{RunOptions, Session};

use super::{
    certificate,
    config::ModelConfig,
    limits, measure,
    normal::{self, Normal},
    run::RunLimit,
    runtime::{Runtime, RuntimeError},
    session::{Bench, Effort, run},
    tokenizer::{Bounds, Tokenizer},
    variants::Built,
    weights::SharedWeights,
};
use crate::{
    anatomy::{self, Anatomy, Trace, Trials, certificate::LOGITS},
    ipc::{
        info::{
            Certificate, HookInfo, InputInfo, LoadStage, Missing, ModelInfo, TokenizerInfo,
            ValueInfo,
        },
        spec::{LoadOptions, Plan, VariantSpec},
        wire::Failure,
    },
    onnx::{Dim, Folder, Limits, Model, OnnxError},
    rewrite,
};

/// Name of a model file, as the hub has it.
const MODEL: &str = "model.onnx";
/// Most tokens of a text for a model that does not say.
const UNKNOWN_MAX_TOKENS: usize = 512;

/// Why a model or a variant is not there.
#[derive(Debug)]
pub(super) struct LoadError {
    pub(super) kind: Failure,
    pub(super) message: String,
}

impl LoadError {
    fn bad(message: impl Into<String>) -> Self {
        Self {
            kind: Failure::BadModel,
            message: message.into(),
        }
    }
}

impl From<OnnxError> for LoadError {
    fn from(e: OnnxError) -> Self {
        Self::bad(e.to_string())
    }
}

impl From<RuntimeError> for LoadError {
    fn from(e: RuntimeError) -> Self {
        Self {
            kind: Failure::Provider,
            message: e.to_string(),
        }
    }
}

/// A model that serves.
pub(super) struct Loaded {
    pub(super) info: ModelInfo,
    pub(super) tokenizer: Option<Tokenizer>,
    bench: Bench,
    limit: RunLimit,
    /// What plain predicts run: the file as it is, if it runs.
    plain: Model,
    /// Unfused: what rewrites start from.
    normal: Model,
    anatomy: Anatomy,
    /// The plain session that the load built, until a plain variant takes it.
    spare: Mutex<Option<Session>>,
    /// Inputs on which shapes are measured.
    trials: Vec<measure::Inputs>,
}

/// Times the stages of a load and tells them.
struct Clock<'a> {
    tell: &'a dyn Fn(&str),
    stages: Vec<LoadStage>,
    since: Instant,
}

impl Clock<'_> {
    fn stage<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        (self.tell)(name);
        self.since = Instant::now();
        let result = work();
        self.stages.push(LoadStage {
            name: name.to_owned(),
            millis: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        result
    }
}

impl Loaded {
    /// Loads the model of a folder. `tell` hears the name of each stage as it begins.
    pub(super) fn load(
        path: &Path,
        options: &LoadOptions,
        tell: &dyn Fn(&str),
    ) -> Result<Self, LoadError> {
        let mut clock = Clock {
            tell,
            stages: Vec::new(),
            since: Instant::now(),
        };
        if let Some(bytes) = options.memory_limit_bytes {
            limits::private_memory(bytes)
                .map_err(|e| LoadError::bad(format!("the memory limit cannot be set: {e}")))?;
        }
        let folder = open_folder(path, options)?;
        let (model_folder, file) = model_file(path)?;
        let config = clock
            .stage("config", || ModelConfig::read(&folder))
            .map_err(LoadError::bad)?;
        let limits = Limits {
            file_bytes: options.max_model_bytes,
            weight_bytes: options.max_model_bytes,
            ..Limits::default()
        };
        let plain = clock.stage("read", || {
            Model::open(&open_folder(&model_folder, options)?, &file, &limits)
                .map_err(LoadError::from)
        })?;
        let runtime = clock.stage("runtime", || Runtime::load(options))?;
        let weights = Arc::new(SharedWeights::new(&plain.graph).map_err(LoadError::bad)?);
        let bench = Bench {
            runtime,
            weights,
            folder: plain
                .weights_folder()
                .unwrap_or(&model_folder)
                .to_string_lossy()
                .into_owned(),
        };
        let Normal {
            model: normal,
            changed,
            notes: fusions,
        } = clock.stage("unfuse", || normal::of(&plain));
        // The plain session is built once here: a model that the runtime refuses must not load.
        let mut plain_session = clock
            .stage("session", || bench.session(&plain, Effort::Full))
            .map_err(|why| LoadError::bad(format!("ONNX Runtime refuses the model: {why}")))?;
        let trace = clock.stage("trace", || anatomy::trace(&normal));
        // A model that no trial fits still serves plain predicts: its anatomy is then read from nothing, and says so.
        let (trials, unseen) = clock.stage("trials", || observe(&bench, &normal, &trace));
        let mut anatomy = clock.stage("anatomy", || anatomy::read(&normal, &trace, &trials));
        let mut notes = anatomy.notes.clone();
        if let Some(reason) = unseen {
            anatomy.hooks.clear();
            anatomy.missing = vec![Missing {
                hook: "*".to_owned(),
                reason,
            }];
        }
        let mut served = plain.clone();
        if changed
            && let Some(inputs) = certificate::inputs(&trials, &anatomy)
            && let Some(why) = normal::refused(&mut plain_session, &inputs)
        {
            served = normal.clone();
            plain_session = bench
                .session(&normal, Effort::Full)
                .map_err(|why| LoadError::bad(format!("ONNX Runtime refuses the model: {why}")))?;
            notes.push(format!(
                "the file's own operators do not run, and predicts use the unfused graph too: {why}"
            ));
        }
        let (checks, certified) = clock.stage("certificate", || {
            if options.certify {
                certificate::check(&bench, &normal, &anatomy, &trials, &mut plain_session)
            } else {
                (Vec::new(), Vec::new())
            }
        });
        notes.extend(certified);
        // What does not compute what the file computes shows nothing of the file.
        if checks.iter().any(|c| c.name == LOGITS && !c.passed) {
            anatomy.hooks.clear();
            anatomy.missing = vec![Missing {
                hook: "*".to_owned(),
                reason: if changed {
                    "without its fused operators the model answers differently"
                } else {
                    "with its inside shown the model answers differently"
                }
                .to_owned(),
            }];
        }
        notes.extend(fusions);
        let divisions = plain.graph.integer_divisions().len();
        if divisions > 0 {
            notes.push(format!(
                "{divisions} integer divisions by values that are not constant"
            ));
        }
        let vocab = anatomy.dims.vocab;
        let max_tokens = [options.max_tokens, config.max_positions]
            .into_iter()
            .flatten()
            .min();
        let tokenizer = clock
            .stage("tokenizer", || {
                let bounds = Bounds {
                    vocab,
                    max_tokens: max_tokens.unwrap_or(UNKNOWN_MAX_TOKENS),
                    max_text_bytes: options.max_text_bytes,
                };
                Tokenizer::load(&folder, &config, bounds)
            })
            .map_err(LoadError::bad)?;
        let info = describe(Description {
            plain: &plain,
            normal: &normal,
            anatomy: &anatomy,
            config,
            tokenizer: tokenizer.as_ref().map(Tokenizer::info),
            max_tokens,
            certificate: Certificate { checks },
            notes,
            runtime: bench.runtime.version.clone(),
            options,
            load: clock.stages,
        });
        Ok(Self {
            info,
            tokenizer,
            bench,
            limit: RunLimit(options.max_run_bytes),
            plain: served,
            normal,
            spare: Mutex::new(Some(plain_session)),
            trials: certificate::trial_inputs(&trials, &anatomy),
            anatomy,
        })
    }

    /// Builds a variant: its session, and its outputs in the session's order.
    pub(super) fn build(&self, spec: &VariantSpec) -> Result<Built, LoadError> {
        let mut outputs = if spec.keep_outputs {
            self.info.outputs.clone()
        } else {
            Vec::new()
        };
        let model =
            match spec.plan {
                Plan::Plain => self.plain.clone(),
                Plan::Rewritten => {
                    let measure = |model: &Model, movable: &[String]| {
                        measure::shapes(&self.bench, model, movable, &self.trials)
                    };
                    let made = rewrite::variant(&self.normal, &self.anatomy, spec, measure)
                        .map_err(|e| LoadError {
                            kind: Failure::FailedPrecondition,
                            message: e.to_string(),
                        })?;
                    outputs.extend(made.outputs.into_iter().map(|o| ValueInfo {
                        name: o.name,
                        dtype: o.dtype,
                        axes: o.axes,
                        dims: o.dims,
                    }));
                    made.model
                }
            };
        let session = match self.take_spare(spec.plan) {
            Some(built) => built,
            None => self
                .bench
                .session(&model, Effort::Full)
                .map_err(|message| LoadError {
                    kind: Failure::Runtime,
                    message: format!("the variant could not be built: {message}"),
                })?,
        };
        // The session's order is the truth.
        let order = |name: &str| session.outputs().iter().position(|o| o.name() == name);
        outputs.retain(|o| order(&o.name).is_some());
        outputs.sort_by_key(|o| order(&o.name));
        Ok(Built {
            session,
            outputs,
            weights: self.bench.weights.clone(),
            limit: self.limit,
        })
    }

    fn take_spare(&self, plan: Plan) -> Option<Session> {
        match plan {
            Plan::Plain => self
                .spare
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
            Plan::Rewritten => None,
        }
    }

    /// The graph that rewrites start from, as text.
    pub(super) fn dump(&self) -> String {
        self.normal.graph.dump()
    }
}

fn open_folder(path: &Path, options: &LoadOptions) -> Result<Folder, LoadError> {
    let inside = options
        .repository
        .as_deref()
        .and_then(|r| Some((r, path.strip_prefix(r).ok()?)));
    Ok(match inside {
        Some((repository, inside)) if !inside.as_os_str().is_empty() => {
            Folder::in_repository(repository, inside)?
        }
        _ => Folder::open(path)?,
    })
}

/// `model.onnx`, `onnx/model.onnx`, or the only `.onnx` file of the folder: the folder that it stands in, beneath which its external data
/// stand too, and its name.
fn model_file(path: &Path) -> Result<(PathBuf, String), LoadError> {
    for folder in [path.to_owned(), path.join("onnx")] {
        if folder.join(MODEL).symlink_metadata().is_ok() {
            return Ok((folder, MODEL.to_owned()));
        }
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(|e| LoadError::bad(format!("the model's folder cannot be read: {e}")))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "onnx"))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => {
            let name = only.file_name().unwrap_or_default().to_string_lossy();
            Ok((path.to_owned(), name.into_owned()))
        }
        (Some(_), false) => Err(LoadError::bad(
            "the folder holds several .onnx files and none is called model.onnx",
        )),
        (None, _) => Err(LoadError::bad(
            "the folder holds no model: put the export there as model.onnx",
        )),
    }
}

/// Runs the trials of a plan that the model accepts. With none, empty trials and the reason.
fn observe(bench: &Bench, model: &Model, trace: &Trace) -> (Trials, Option<String>) {
    let nothing = |why| (Trials::none(), Some(why));
    let session = rewrite::observe(model, &trace.observe)
        .map_err(|e| e.to_string())
        .and_then(|observed| {
            let session = bench.session(&observed.model, Effort::Little)?;
            Ok((session, observed.outputs))
        });
    let (mut session, outputs) = match session {
        Ok(made) => made,
        Err(why) => return nothing(format!("its inner values cannot be shown: {why}")),
    };
    match anatomy::measure(trace, |plan| trial(&mut session, &outputs, plan)) {
        Ok(trials) => (trials, None),
        Err(why) => nothing(format!("the model runs on none of the trial inputs: {why}")),
    }
}

fn trial(
    session: &mut Session,
    outputs: &[(String, crate::onnx::ValueId)],
    plan: anatomy::TrialPlan,
) -> Result<Trials, String> {
    let options = RunOptions::new().map_err(|e| e.to_string())?;
    let mut trials = Trials::new(plan);
    for at in 0..trials.runs() {
        let made = run(session, &trials.plan.runs[at].inputs.clone(), &options)?;
        for (name, tensor) in made {
            if let Some((_, value)) = outputs.iter().find(|(n, _)| *n == name) {
                trials.record(at, *value, tensor);
            }
        }
    }
    Ok(trials)
}

struct Description<'a> {
    plain: &'a Model,
    normal: &'a Model,
    anatomy: &'a Anatomy,
    config: ModelConfig,
    tokenizer: Option<TokenizerInfo>,
    max_tokens: Option<usize>,
    certificate: Certificate,
    notes: Vec<String>,
    runtime: String,
    options: &'a LoadOptions,
    load: Vec<LoadStage>,
}

fn describe(d: Description<'_>) -> ModelInfo {
    let Description {
        plain,
        normal,
        anatomy,
        ..
    } = d;
    ModelInfo {
        name: String::new(),
        fingerprint: plain
            .fingerprint()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect(),
        task: d.config.task.unwrap_or(anatomy.task),
        inputs: anatomy
            .inputs
            .iter()
            .map(|i| InputInfo {
                name: i.name.clone(),
                dtype: i.dtype,
                dims: i
                    .dims
                    .iter()
                    .map(|d| match d {
                        Dim::Fixed(n) => usize::try_from(*n).ok(),
                        Dim::Named(_) | Dim::Unknown => None,
                    })
                    .collect(),
                axes: i.axes(),
                role: i.role,
            })
            .collect(),
        outputs: anatomy
            .outputs
            .iter()
            .map(|o| ValueInfo {
                name: o.name.clone(),
                dtype: o.dtype,
                axes: o.axes.clone(),
                dims: o.dims.clone(),
            })
            .collect(),
        main_output: d
            .config
            .main_output
            .or_else(|| Some(plain.graph.name(anatomy.main_output?).to_owned()))
            .unwrap_or_default(),
        labels: d.config.labels,
        dims: anatomy.dims,
        hooks: anatomy
            .hooks
            .iter()
            .map(|h| HookInfo {
                name: h.name.clone(),
                aliases: h.aliases.clone(),
                layer: h.layer,
                value: normal
                    .graph
                    .values()
                    .find(|v| *v == h.value)
                    .map(|v| normal.graph.name(v).to_owned())
                    .unwrap_or_default(),
                axes: h.axes.clone(),
                dims: h.dims.clone(),
                dtype: h.dtype,
            })
            .collect(),
        missing: anatomy.missing.clone(),
        certificate: d.certificate,
        tokenizer: d.tokenizer,
        pads: anatomy.pads,
        fixed_batch: anatomy.fixed_batch,
        rows_interact: anatomy.rows_interact,
        fixed_length: anatomy.fixed_length,
        max_tokens: d.max_tokens,
        producer: plain.producer.clone(),
        opset: plain.opset(),
        notes: d.notes,
        runtime: d.runtime,
        provider: d.options.provider.to_string(),
        load: d.load,
        picture: anatomy.picture.clone(),
    }
}
