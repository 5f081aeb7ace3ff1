//! Shared by integration tests: runs models in ONNX Runtime from the per-user cache, and reads the fixtures.
#![allow(dead_code)] // every test binary uses a part of it
#![allow(clippy::wildcard_enum_match_arm)] // a test reads the types that its models have

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock},
};

use introspectd::{
    anatomy::{self, Anatomy, Trace, Trials},
    onnx::{Folder, Limits, Model, Weights},
    rewrite::{self, Exposure},
    tensor::{DType, Tensor},
};
use ndarray::{ArrayD, IxDyn};
use ort::{
    environment::Environment,
    session::{Session, SessionInputValue, builder::GraphOptimizationLevel},
    value::{DynValue, TensorElementType, ValueType},
};

pub(crate) type Named = BTreeMap<String, Tensor>;

/// One environment per process, as ONNX Runtime wants it.
fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
            .expect("XDG_CACHE_HOME or HOME is set");
        let version = env!("INTROSPECTD_ORT_VERSION");
        let library = cache
            .join("introspectd")
            .join(format!("onnxruntime-{version}"))
            .join(format!("libonnxruntime.so.{version}"));
        // SAFETY of the process environment is not at stake: this runs once, before the library starts threads.
        ort::init_from(&library)
            .unwrap_or_else(|e| panic!("{}: {e}; build with network once", library.display()))
            .with_telemetry(false)
            .build()
            .expect("the environment is built once")
    })
}

/// A session of a model, run one call at a time.
pub(crate) struct Runner {
    session: Mutex<Session>,
}

impl Runner {
    pub(crate) fn new(model: &Model) -> Result<Self, String> {
        let bytes = model.encode(Weights::Inline);
        let session = Session::builder(environment())
            .map_err(|e| e.to_string())?
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(|e| e.to_string())?
            .with_intra_threads(1)
            .map_err(|e| e.to_string())?
            .commit_from_memory(&bytes)
            .map_err(|e| e.to_string())?;
        Ok(Self {
            session: Mutex::new(session),
        })
    }

    pub(crate) fn run(&self, inputs: &[(String, Tensor)]) -> Result<Named, String> {
        let mut session = self.session.lock().expect("no run panics");
        let names: Vec<String> = session
            .inputs()
            .iter()
            .map(|i| i.name().to_owned())
            .collect();
        let fed: Vec<(String, SessionInputValue<'_>)> = names
            .into_iter()
            .filter_map(|name| {
                let (_, tensor) = inputs.iter().find(|(n, _)| *n == name)?;
                Some((name, SessionInputValue::from(value(tensor))))
            })
            .collect();
        let outputs = session.run(fed).map_err(|e| e.to_string())?;
        Ok(outputs
            .iter()
            .filter_map(|(name, v)| Some((name.to_owned(), tensor(&v)?)))
            .collect())
    }
}

/// Runs a model once.
pub(crate) fn run(model: &Model, inputs: &[(String, Tensor)]) -> Result<Named, String> {
    Runner::new(model)?.run(inputs)
}

fn value(tensor: &Tensor) -> DynValue {
    fn made<T>(shape: &[usize], values: Vec<T>) -> DynValue
    where
        T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
    {
        ort::value::Tensor::from_array((shape.to_vec(), values))
            .expect("shape and values agree")
            .into_dyn()
    }
    let shape = tensor.shape();
    let bytes = &tensor.bytes()[..];
    match tensor.dtype() {
        DType::F32 => made(shape, tensor.to_f32().unwrap().into_owned()),
        DType::F16 => made(shape, numbers(bytes, half::f16::from_le_bytes)),
        DType::Bf16 => made(shape, numbers(bytes, half::bf16::from_le_bytes)),
        DType::F64 => made(shape, numbers(bytes, f64::from_le_bytes)),
        DType::I8 => made(shape, numbers(bytes, i8::from_le_bytes)),
        DType::I16 => made(shape, numbers(bytes, i16::from_le_bytes)),
        DType::I32 => made(shape, numbers(bytes, i32::from_le_bytes)),
        DType::I64 => made(shape, numbers(bytes, i64::from_le_bytes)),
        DType::U8 => made(shape, numbers(bytes, u8::from_le_bytes)),
        DType::U16 => made(shape, numbers(bytes, u16::from_le_bytes)),
        DType::U32 => made(shape, numbers(bytes, u32::from_le_bytes)),
        DType::U64 => made(shape, numbers(bytes, u64::from_le_bytes)),
        DType::Bool => made(shape, bytes.iter().map(|b| *b != 0).collect::<Vec<bool>>()),
    }
}

fn numbers<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|c| read(*c)).collect()
}

fn tensor(v: &ort::value::ValueRef<'_>) -> Option<Tensor> {
    let ValueType::Tensor { ty, .. } = v.dtype() else {
        return None;
    };
    macro_rules! read {
        ($t:ty, $dtype:expr) => {{
            let (shape, values) = v.try_extract_tensor::<$t>().ok()?;
            let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            Tensor::new($dtype, shape, bytes.into()).ok()
        }};
    }
    Some(match ty {
        TensorElementType::Float32 => read!(f32, DType::F32)?,
        TensorElementType::Float16 => read!(half::f16, DType::F16)?,
        TensorElementType::Bfloat16 => read!(half::bf16, DType::Bf16)?,
        TensorElementType::Float64 => read!(f64, DType::F64)?,
        TensorElementType::Int64 => read!(i64, DType::I64)?,
        TensorElementType::Int32 => read!(i32, DType::I32)?,
        TensorElementType::Int8 => read!(i8, DType::I8)?,
        TensorElementType::Uint8 => read!(u8, DType::U8)?,
        _ => return None,
    })
}

/// Opens a model's folder.
pub(crate) fn open(folder: &Path) -> Result<Model, String> {
    let opened = Folder::open(folder).map_err(|e| e.to_string())?;
    Model::open(&opened, "model.onnx", &Limits::default()).map_err(|e| e.to_string())
}

/// Runs the trials of a model.
pub(crate) fn trials(model: &Model, trace: &Trace) -> Result<Trials, String> {
    let observed = rewrite::observe(model, &trace.observe).map_err(|e| e.to_string())?;
    let runner = Runner::new(&observed.model)?;
    anatomy::measure(trace, |plan| {
        let mut trials = Trials::new(plan);
        for at in 0..trials.runs() {
            let made = runner.run(&trials.plan.runs[at].inputs)?;
            for (name, value) in &observed.outputs {
                if let Some(tensor) = made.get(name) {
                    trials.record(at, *value, tensor.clone());
                }
            }
        }
        Ok(trials)
    })
}

/// The model that rewrites start from, as the worker makes it.
pub(crate) fn unfused(model: &Model) -> Model {
    let unfused = anatomy::normalise::unfuse(model).expect("what the rules write is a graph");
    assert!(unfused.left.is_empty(), "{:?}", unfused.left);
    unfused.model
}

/// The whole way from a model to its anatomy.
pub(crate) fn dissect(model: &Model) -> Result<Anatomy, String> {
    let trace = anatomy::trace(model);
    let trials = trials(model, &trace)?;
    Ok(anatomy::read(model, &trace, &trials))
}

/// Hook points of a model on inputs.
pub(crate) fn captured(
    model: &Model,
    anatomy: &Anatomy,
    hooks: &[&str],
    keep_outputs: bool,
    inputs: &[(String, Tensor)],
) -> Result<Named, String> {
    let what = Exposure {
        hooks: hooks.iter().map(|h| (*h).to_owned()).collect(),
        keep_outputs,
    };
    let made = rewrite::expose(model, anatomy, &what).map_err(|e| e.to_string())?;
    run(&made.model, inputs)
}

/// Arrays of a `reference.npz`.
pub(crate) fn reference(folder: &Path) -> Named {
    let file = File::open(folder.join("reference.npz")).expect("the fixture has reference.npz");
    let mut npz = ndarray_npy::NpzReader::new(file).expect("reference.npz is a zip of arrays");
    let mut found = Named::new();
    for name in npz.names().expect("the zip has a directory") {
        let key = name.trim_end_matches(".npy").to_owned();
        if let Ok(a) = npz.by_name::<ndarray::OwnedRepr<f32>, IxDyn>(&name) {
            let a = a.as_standard_layout().into_owned();
            let t = Tensor::from_f32(a.shape().to_vec(), a.as_slice().unwrap()).unwrap();
            found.insert(key, t);
        } else if let Ok(a) = npz.by_name::<ndarray::OwnedRepr<i64>, IxDyn>(&name) {
            let a = a.as_standard_layout().into_owned();
            let t = Tensor::from_i64(a.shape().to_vec(), a.as_slice().unwrap()).unwrap();
            found.insert(key, t);
        } else if let Ok(a) = npz.by_name::<ndarray::OwnedRepr<bool>, IxDyn>(&name) {
            let bytes: Vec<u8> = a.iter().map(|b| u8::from(*b)).collect();
            let t = Tensor::new(DType::Bool, a.shape().to_vec(), bytes.into()).unwrap();
            found.insert(key, t);
        }
    }
    found
}

/// The model's inputs out of a reference, cast to what the model declares.
pub(crate) fn reference_inputs(model: &Model, reference: &Named) -> Vec<(String, Tensor)> {
    model
        .graph
        .inputs()
        .filter_map(|port| {
            let name = model.graph.name(port.value);
            let tensor = reference.get(&format!("in_{name}"))?.clone();
            Some((name.to_owned(), tensor))
        })
        .collect()
}

/// The folders of the committed models.
pub(crate) fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("the fixtures are committed")
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("model.onnx").is_file())
        .collect();
    folders.sort();
    folders
}

/// Largest difference relative to the largest magnitude.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
    anatomy::certificate::distance(a, b)
}

pub(crate) fn array(tensor: &Tensor) -> ArrayD<f32> {
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), tensor.to_f32().unwrap().into_owned()).unwrap()
}
