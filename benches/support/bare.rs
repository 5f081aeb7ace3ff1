//! The bare runtime: what one writes with `ort` alone, with the settings of a worker (threads of one pool that do not spin, no arena, no
//! memory patterns, every optimisation).

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use introspectd::{
    onnx::{Folder, Limits, Model, Patch, Weights},
    worker::runtime,
};
use ort::{
    environment::{Environment, GlobalThreadPoolOptions},
    ep,
    session::{Session, SessionInputValue, SessionOutputs, builder::GraphOptimizationLevel},
    value::Tensor,
};

const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// Must be called first in a bench: starts the program again without the runtime's telemetry, which it reads from the environment.
pub fn without_telemetry() {
    if std::env::var_os(NO_TELEMETRY).is_none_or(|v| v != "1") {
        let why = Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .env(NO_TELEMETRY, "1")
            .exec();
        panic!("the bench cannot start itself again: {why}");
    }
}

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let found = runtime::probe(None).expect("ONNX Runtime is where the build puts it");
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = GlobalThreadPoolOptions::default()
            .with_intra_threads(threads)
            .and_then(|p| p.with_inter_threads(1))
            .and_then(|p| p.with_spin_control(false))
            .expect("a pool has these options");
        ort::init_from(found.library)
            .expect("the library loads")
            .with_telemetry(false)
            .with_global_thread_pool(pool)
            .build()
            .expect("the first environment of the process")
    })
}

/// A row of a batch, of token ids.
pub type Row<'a> = &'a [i64];

/// A session.
pub struct Bare {
    session: Session,
}

impl Bare {
    /// Of a model as the file is.
    pub fn open(folder: &Path) -> Self {
        let session = builder()
            .commit_from_file(folder.join("model.onnx"))
            .expect("the runtime takes the model");
        Self { session }
    }

    /// Of a model whose inner values of these names are outputs too. A name that comes twice is shown once.
    pub fn showing(folder: &Path, values: &[String]) -> Self {
        let opened = Folder::open(folder).expect("the folder opens");
        let model = Model::open(&opened, "model.onnx", &Limits::default()).expect("the file opens");
        let mut patch = Patch::new(&model.graph, "bench");
        for name in values {
            let value = patch.draft().value(name).expect("a value of the graph");
            if !patch.draft().is_output(value) {
                patch.output(value);
            }
        }
        let graph = patch.apply().expect("outputs break no graph");
        let session = builder()
            .commit_from_memory(&model.with_graph(graph).encode(Weights::Inline))
            .expect("the runtime takes the model");
        Self { session }
    }

    /// One run: ids, a mask, no second segment; rows padded to the longest. What came out goes to `look`, the time it took comes back.
    pub fn run(&mut self, rows: &[Row<'_>], look: impl FnOnce(&SessionOutputs<'_>)) -> Duration {
        let begun = Instant::now();
        let longest = rows.iter().map(|r| r.len()).max().unwrap_or(0);
        let shape = [rows.len(), longest];
        let padded = |of: &dyn Fn(Option<&i64>) -> i64| -> SessionInputValue<'static> {
            let cells = rows
                .iter()
                .flat_map(|row| (0..longest).map(|at| of(row.get(at))));
            let tensor = Tensor::from_array((shape, cells.collect::<Vec<i64>>()));
            tensor.expect("a cell for each place").into()
        };
        let inputs: Vec<(String, SessionInputValue<'static>)> = self
            .session
            .inputs()
            .iter()
            .map(|input| {
                let value = match input.name() {
                    "input_ids" => padded(&|id| id.copied().unwrap_or(0)),
                    "attention_mask" => padded(&|id| i64::from(id.is_some())),
                    _ => padded(&|_| 0),
                };
                (input.name().to_owned(), value)
            })
            .collect();
        let outputs = self.session.run(inputs).expect("the model runs");
        look(&outputs);
        drop(outputs);
        begun.elapsed()
    }
}

fn builder() -> ort::session::builder::SessionBuilder {
    Session::builder(environment())
        .and_then(|b| {
            Ok(b.with_optimization_level(GraphOptimizationLevel::All)?
                .with_execution_providers([ep::CPU::default()
                    .with_arena_allocator(false)
                    .build()
                    .error_on_failure()])?
                .with_memory_pattern(false)?)
        })
        .expect("the settings of a worker")
}
