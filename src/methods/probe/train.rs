//! A training: examples come in, one probe for each hook point comes out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use ndarray::Array2;
use sha2::{Digest as _, Sha256};

pub use super::fit::How;
use super::{
    card::{self, Card, FORMAT, Kind, MOST_LABELS, Report, TensorFile},
    direction::direction,
    extract::{self, Part, Plan, Rows, Value},
    fit::{Fitted, Targets},
    judge::{self, Judgement, judge},
    matrices::{Column, Matrices},
    split::Split,
    store::Weights,
};
use crate::{
    engine::{EngineError, ModelHandle},
    methods::reduce::Pooling,
    tensor::Tensor,
};

/// What to train.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Under which name it is stored, if at all.
    pub name: Option<String>,
    /// Hook points; empty for all hidden states.
    pub hooks: Vec<String>,
    /// Of these layers only; empty for all.
    pub layers: Vec<u32>,
    /// How positions become one vector.
    pub pooling: Pooling,
    /// What is trained; by the labels unless said.
    pub how: Option<How>,
    /// Names of the classes; empty for those that come.
    pub labels: Vec<String>,
    /// Where draws begin.
    pub seed: u64,
    /// Part of the examples that is held out.
    pub test_fraction: f64,
    /// The control task, too.
    pub control: bool,
    /// The online code, too.
    pub codelength: bool,
    /// The learning curve, too.
    pub learning_curve: bool,
    /// All examples are trained on and none judges: a direction of two classes.
    pub unjudged: bool,
    /// A probe of the same name may be replaced.
    pub replace: bool,
}

/// A training that collects examples.
#[derive(Debug)]
pub struct Training {
    asked: Asked,
    handle: ModelHandle,
    plan: Arc<Plan>,
    matrices: Matrices,
    terms: Terms,
    labels: Vec<Value>,
    types: Vec<u64>,
    parts: Vec<Option<Part>>,
    /// Which example each row is of; one that says what another said is taken for the same.
    examples: Vec<usize>,
    /// Classes that came, where the header names none.
    classes: BTreeSet<String>,
    came: Came,
    /// Whether rows are tokens.
    tokens: Option<bool>,
}

/// The examples that came.
#[derive(Debug, Default)]
struct Came {
    /// How many.
    count: usize,
    /// Those that are labelled as a whole: the first of each, by what it is of.
    first: HashMap<u64, usize>,
    /// Those that repeat another.
    repeated: usize,
    /// Those without a labelled token.
    empty: usize,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Trained {
    /// What is known of the probes.
    pub card: Card,
    /// Their weights.
    pub weights: Weights,
    /// Bytes of vectors that memory did not hold.
    pub spilled: u64,
    /// What the caller should know of the examples.
    pub notes: Vec<String>,
}

/// Bounds of a training.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Memory for the vectors of all examples and for fitting; what is more goes to temporary files, or waits.
    pub memory: usize,
    /// Largest capture.
    pub max_bytes: usize,
    /// Most hook points that are fitted at a time.
    pub threads: usize,
}

impl Came {
    /// The number of the next one, or that of one that says the same.
    fn next(&mut self, rows: &Rows) -> usize {
        let number = self.count;
        self.count += 1;
        if rows.labels.is_empty() {
            self.empty += 1;
        }
        match rows.types[..] {
            [of] if !rows.of_tokens => {
                let first = *self.first.entry(of).or_insert(number);
                self.repeated += usize::from(first != number);
                first
            }
            _ => number,
        }
    }
}

impl Training {
    /// Begins one.
    ///
    /// # Errors
    /// Beneath `header`: hook points that no probe can read.
    pub fn begin(handle: ModelHandle, asked: Asked, terms: Terms) -> Result<Self, EngineError> {
        let hooks = extract::hooks(handle.info(), (&asked.hooks, &asked.layers), "header")?;
        Ok(Self {
            matrices: Matrices::new(hooks.len(), terms.memory),
            terms,
            plan: Arc::new(Plan {
                hooks,
                pooling: Some(asked.pooling),
                max_bytes: terms.max_bytes,
            }),
            asked,
            handle,
            labels: Vec::new(),
            types: Vec::new(),
            parts: Vec::new(),
            examples: Vec::new(),
            classes: BTreeSet::new(),
            came: Came::default(),
            tokens: None,
        })
    }

    /// What is read of each example.
    pub fn plan(&self) -> Arc<Plan> {
        self.plan.clone()
    }

    /// The model.
    pub fn handle(&self) -> &ModelHandle {
        &self.handle
    }

    /// What was asked.
    pub fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Adds what an example gave.
    ///
    /// # Errors
    /// Beneath the example: labels of another kind than before, that the header does not name, or that nothing unjudged has; [`EngineError::ResourceExhausted`] when the
    /// disk does not take what memory does not hold.
    pub fn push(&mut self, rows: Rows) -> Result<(), EngineError> {
        let first = self.tokens.get_or_insert(rows.of_tokens);
        if *first != rows.of_tokens {
            return Err(EngineError::invalid(
                "tokens",
                "labels tokens, where others label whole inputs: every example of a training has the same kind of label",
            ));
        }
        if self.asked.unjudged {
            of_directions(&rows)?;
        }
        for value in &rows.labels {
            let same = match (value, self.labels.first()) {
                (_, None)
                | (Value::Class(_), Some(Value::Class(_)))
                | (Value::Number(_), Some(Value::Number(_))) => true,
                (Value::Class(_), Some(Value::Number(_)))
                | (Value::Number(_), Some(Value::Class(_))) => false,
            };
            if !same {
                return Err(EngineError::invalid(
                    "label",
                    "is a class where others are numbers, or the other way round: every example of a training has the same kind of label",
                ));
            }
            if let Some(why) = self.asked.how.as_ref().and_then(|how| refusal(how, value)) {
                return Err(EngineError::invalid("label", why));
            }
            if let Value::Class(name) = value {
                self.check_class(name)?;
            }
        }
        if self
            .parts
            .first()
            .is_some_and(|p| p.is_some() != rows.part.is_some())
        {
            return Err(EngineError::invalid(
                "part",
                "is said by some examples and not by others: say it of all, or of none",
            ));
        }
        let example = self.came.next(&rows);
        self.examples.extend(rows.labels.iter().map(|_| example));
        self.parts.extend(rows.labels.iter().map(|_| rows.part));
        self.labels.extend(rows.labels);
        self.types.extend(rows.types);
        self.check_fit(self.asked.labels.len())?;
        self.matrices.push(&rows.vectors).map_err(|e| spill(&e))
    }

    /// # Errors
    /// For a class that the header does not name, or one more than there may be.
    fn check_class(&mut self, name: &str) -> Result<(), EngineError> {
        if !self.asked.labels.is_empty() {
            return match self.asked.labels.iter().any(|label| label == name) {
                true => Ok(()),
                false => Err(EngineError::invalid(
                    "label",
                    format!("\"{name}\" is none of the header's labels"),
                )),
            };
        }
        if !self.classes.contains(name) {
            self.classes.insert(name.to_owned());
        }
        if self.classes.len() > MOST_LABELS {
            return Err(EngineError::invalid(
                "label",
                format!("is one class more than the {MOST_LABELS} that a probe tells apart"),
            ));
        }
        Ok(())
    }

    /// What is trained: by the labels unless said.
    fn how(&self) -> How {
        let by_labels = match self.labels.first() {
            Some(Value::Number(_)) => How::Ridge { alpha: 1.0 },
            Some(Value::Class(_)) | None => How::Logistic {
                c: 1.0,
                choices: Vec::new(),
            },
        };
        self.asked.how.clone().unwrap_or(by_labels)
    }

    /// # Errors
    /// [`EngineError::ResourceExhausted`] for a fit that would not find room.
    fn check_fit(&self, classes: usize) -> Result<(), EngineError> {
        let one = self.bytes_of_a_fit(classes);
        if one > self.terms.memory {
            return Err(EngineError::exhausted(
                format!(
                    "with these examples, a fit takes {one} bytes, and a training may take {}: raise --probe-memory, or give fewer examples",
                    self.terms.memory
                ),
                None,
            ));
        }
        Ok(())
    }

    /// Of the widest hook point.
    fn bytes_of_a_fit(&self, classes: usize) -> usize {
        let width = self.plan.hooks.iter().map(|h| h.width).max().unwrap_or(0);
        self.how().bytes(self.labels.len(), width, classes.max(1))
    }

    /// Fits and judges a probe for each hook point, so many at a time; `each` hears of them as they are done. Blocks.
    ///
    /// # Errors
    /// Of `examples`, for what they lack; [`EngineError::Cancelled`] when asked to stop.
    pub fn fit(
        mut self,
        stop: &AtomicBool,
        each: impl Fn(&Report) + Sync,
    ) -> Result<Trained, EngineError> {
        let (targets, names) = self.targets()?;
        let how = self.how();
        let split = self.split(&targets);
        let notes = self.notes((&targets, &names), &split);
        let named = split_name(&split);
        let options = self.options(&how);
        let judgement = Judgement {
            control: self.asked.control,
            codelength: self.asked.codelength,
            learning_curve: self.asked.learning_curve,
            seed: self.asked.seed,
        };
        self.check_fit(names.len())?;
        let one = self.bytes_of_a_fit(names.len());
        let threads = at_a_time(&mut self.matrices, one, self.terms).map_err(|e| spill(&e))?;
        let spilled = self.matrices.spilled();
        let work: Vec<(usize, Column)> = self
            .matrices
            .into_columns()
            .into_iter()
            .enumerate()
            .collect();
        let work = Mutex::new(work.into_iter());
        let done = Mutex::new(Vec::new());
        let one = |at: usize, column: Column| -> Result<(), EngineError> {
            let hook = &self.plan.hooks[at];
            let rows = rows_of(column, hook.width, &split).map_err(|e| spill(&e))?;
            let stopped = || stop.load(Ordering::Relaxed);
            let judged = if self.asked.unjudged {
                direction(&how, rows.train.view(), &targets, self.asked.seed, &stopped)
            } else {
                judge(
                    &how,
                    &rows,
                    (&targets, &self.types),
                    &split,
                    judgement,
                    &stopped,
                )
            };
            if stopped() {
                return Err(EngineError::Cancelled);
            }
            let (report, fitted) = judged.map_err(|why| EngineError::invalid("examples", why))?;
            let report = Report {
                hook: hook.name.clone(),
                layer: hook.layer,
                ..report
            };
            each(&report);
            lock(&done).push((at, report, fitted));
            Ok(())
        };
        std::thread::scope(|scope| {
            let worker = || loop {
                let Some((at, column)) = lock(&work).next() else {
                    return Ok(());
                };
                one(at, column)?;
            };
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|w| {
                w.join()
                    .map_err(|_| EngineError::internal("a fit panicked"))?
            })
        })?;
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(at, ..)| *at);
        let weights = done
            .iter()
            .map(|(_, report, fitted)| weights_of(&report.hook, fitted))
            .collect::<Result<Vec<_>, _>>()?;
        let reports: Vec<Report> = done.into_iter().map(|(_, report, _)| report).collect();
        let best = best(&reports);
        let info = self.handle.info();
        Ok(Trained {
            card: Card {
                format: FORMAT,
                name: self.asked.name.clone().unwrap_or_default(),
                model: info.name.clone(),
                fingerprint: info.fingerprint.clone(),
                kind: kind(&how),
                options,
                labels: names,
                pooling: (self.tokens != Some(true)).then_some(self.asked.pooling),
                best,
                reports,
                train_examples: split.train.len() as u64,
                test_examples: split.test.len() as u64,
                split: named,
                seed: self.asked.seed,
                created: card::now(),
                made_by: card::MADE_BY.to_owned(),
                tensors: TensorFile::default(),
            },
            weights: weights.into_iter().flatten().collect(),
            spilled,
            notes,
        })
    }

    /// Where the caller says which examples judge, there is no fraction; where C is chosen, the reports have it.
    fn options(&self, how: &How) -> BTreeMap<String, f64> {
        let drawn = !self.parts.iter().any(Option::is_some);
        let fraction = drawn.then_some(("test_fraction", self.asked.test_fraction));
        let of_kind = match how {
            How::Logistic { c, choices } if choices.is_empty() => vec![("c", *c)],
            How::Logistic { .. } | How::MeanDifference | How::Pca => Vec::new(),
            How::Ridge { alpha } => vec![("alpha", *alpha)],
            How::Mlp { hidden, alpha } => vec![("hidden", *hidden as f64), ("alpha", *alpha)],
        };
        let all = of_kind.into_iter().chain(fraction);
        all.map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn split(&self, targets: &Targets) -> Split {
        if self.asked.unjudged {
            return Split::unjudged(targets.len());
        }
        if !self.parts.iter().any(Option::is_some) {
            let Asked {
                test_fraction,
                seed,
                ..
            } = self.asked;
            return Split::drawn(targets, &self.examples, test_fraction, seed);
        }
        let of = |part| -> Vec<usize> {
            let rows = self.parts.iter().enumerate();
            rows.filter(|(_, p)| **p == Some(part))
                .map(|(at, _)| at)
                .collect()
        };
        let (train, test) = (of(Part::Train), of(Part::Test));
        Split::said(&train, &test, &self.examples, self.asked.seed)
    }

    /// Labels as numbers, and the names of the classes.
    fn targets(&self) -> Result<(Targets, Vec<String>), EngineError> {
        if self.labels.is_empty() {
            let message = match self.came.count {
                0 => "there are none: send some after the header",
                _ => "have no token that is labelled: do the spans lie within the texts?",
            };
            return Err(EngineError::invalid("examples", message));
        }
        let numbers: Vec<f64> = self
            .labels
            .iter()
            .filter_map(|label| match label {
                Value::Number(number) => Some(*number),
                Value::Class(_) => None,
            })
            .collect();
        if !numbers.is_empty() {
            return Ok((Targets::Numbers(numbers), Vec::new()));
        }
        let names: Vec<String> = if self.asked.labels.is_empty() {
            self.classes.iter().cloned().collect()
        } else {
            self.asked.labels.clone()
        };
        if !(2..=MOST_LABELS).contains(&names.len()) {
            let classes = match &names[..] {
                [only] => format!("one class, \"{only}\""),
                more => format!("{} classes", more.len()),
            };
            return Err(EngineError::invalid(
                "examples",
                format!("have {classes}: a probe tells 2 to {MOST_LABELS} apart"),
            ));
        }
        let index: BTreeMap<&str, usize> = names.iter().map(String::as_str).zip(0..).collect();
        let of = self.labels.iter().filter_map(|label| match label {
            Value::Class(name) => index.get(name.as_str()).copied(),
            Value::Number(_) => None,
        });
        Ok((Targets::Classes(of.collect(), names.len()), names))
    }

    /// What the caller should know of the examples.
    fn notes(&self, (targets, names): (&Targets, &[String]), split: &Split) -> Vec<String> {
        let mut notes = Vec::new();
        let Came {
            repeated, empty, ..
        } = self.came;
        if empty > 0 {
            notes.push(format!(
                "{empty} examples have no token that is labelled: nothing was read of them"
            ));
        }
        let drawn = !self.asked.unjudged && self.parts.iter().all(Option::is_none);
        if repeated > 0 && drawn {
            notes.push(format!(
                "{repeated} examples repeat others: they are on the side of the first of their kind"
            ));
        }
        let known: BTreeSet<usize> = split.train.iter().map(|r| self.examples[*r]).collect();
        let both = split
            .test
            .iter()
            .filter(|r| known.contains(&self.examples[**r]));
        let both = both.count();
        if both > 0 {
            notes.push(format!(
                "{both} of the examples that judge are trained on as well: the measures are too good"
            ));
        }
        if let Targets::Classes(of, classes) = targets {
            let trained: BTreeSet<usize> = split.train.iter().map(|row| of[*row]).collect();
            let missing = (0..*classes).filter(|class| !trained.contains(class));
            notes.extend(missing.map(|class| {
                format!(
                    "no example of \"{}\" was trained on: no probe knows it",
                    names[class]
                )
            }));
        }
        notes
    }
}

/// Whether a direction that nothing judges can come of an example.
fn of_directions(rows: &Rows) -> Result<(), EngineError> {
    if rows.part.is_some() {
        return Err(EngineError::invalid(
            "part",
            "is said, and the header says that all examples are trained on: leave it out",
        ));
    }
    if rows.labels.iter().any(|v| matches!(v, Value::Number(_))) {
        return Err(EngineError::invalid(
            "number",
            "is no class: what nothing judges leads from one class to another",
        ));
    }
    Ok(())
}

/// Why a kind of probe cannot learn a label, if it cannot: told of the first example, before the others are run.
fn refusal(how: &How, label: &Value) -> Option<&'static str> {
    match (how, label) {
        (How::Ridge { .. }, Value::Class(_)) => {
            Some("is a class, and ridge regression is for numbers: train logistic regression")
        }
        (How::Logistic { .. } | How::Mlp { .. } | How::MeanDifference, Value::Number(_)) => {
            Some("is a number, and this kind of probe is for classes: train ridge regression")
        }
        (How::Ridge { .. } | How::Pca, Value::Number(_))
        | (
            How::Logistic { .. } | How::Mlp { .. } | How::MeanDifference | How::Pca,
            Value::Class(_),
        ) => None,
    }
}

/// The hook point that does best; of equal ones the first.
pub(super) fn best(reports: &[Report]) -> String {
    let best = reports
        .iter()
        .rev()
        .max_by(|a, b| a.merit().total_cmp(&b.merit()));
    best.map(|r| r.hook.clone()).unwrap_or_default()
}

/// How many fits go on at a time beside what is held, which goes to the disk where no fit would find room.
fn at_a_time(matrices: &mut Matrices, one: usize, terms: Terms) -> io::Result<usize> {
    if matrices.held().saturating_add(one) > terms.memory {
        matrices.spill()?;
    }
    let room = terms.memory.saturating_sub(matrices.held());
    Ok((room / one.max(1)).clamp(1, terms.threads.max(1)))
}

/// The rows of both parts, each where its part has it.
fn rows_of(column: Column, width: usize, split: &Split) -> io::Result<judge::Rows> {
    let mut rows = judge::Rows {
        train: Array2::zeros((split.train.len(), width)),
        test: Array2::zeros((split.test.len(), width)),
    };
    let mut places = vec![(false, 0); split.train.len() + split.test.len()];
    for (held_out, part) in [(false, &split.train), (true, &split.test)] {
        for (to, row) in part.iter().enumerate() {
            places[*row] = (held_out, to);
        }
    }
    let mut places = places.into_iter();
    column.each(width, |values| {
        if let Some((held_out, to)) = places.next() {
            let part = if held_out {
                &mut rows.test
            } else {
                &mut rows.train
            };
            part.row_mut(to)
                .iter_mut()
                .zip(values)
                .for_each(|(to, v)| *to = f64::from(*v));
        }
    })?;
    Ok(rows)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spill(e: &io::Error) -> EngineError {
    EngineError::exhausted(
        format!(
            "what memory does not hold of the examples could not be put on the disk ({}): raise --probe-memory, or make room where temporary files go",
            e.kind()
        ),
        None,
    )
}

/// A digest of which rows judge, so that two trainings can be told to have judged alike.
fn split_name(split: &Split) -> String {
    let mut hash = Sha256::new();
    for row in &split.test {
        hash.update((*row as u64).to_le_bytes());
    }
    hash.update(((split.train.len() + split.test.len()) as u64).to_le_bytes());
    let bytes = hash.finalize();
    bytes[..8].iter().map(|b| format!("{b:02x}")).collect()
}

fn kind(how: &How) -> Kind {
    match how {
        How::Logistic { .. } => Kind::Logistic,
        How::Ridge { .. } => Kind::Ridge,
        How::MeanDifference => Kind::MeanDifference,
        How::Pca => Kind::Pca,
        How::Mlp { .. } => Kind::Mlp,
    }
}

fn weights_of(hook: &str, fitted: &Fitted) -> Result<Vec<(String, Tensor)>, EngineError> {
    let layers = fitted.hidden.iter().map(|l| ("hidden_", l));
    let mut parts = Vec::new();
    for (prefix, layer) in layers.chain([("", &fitted.output)]) {
        #[allow(clippy::cast_possible_truncation)] // files hold single precision
        let single = |values: &mut dyn Iterator<Item = &f64>| -> Vec<f32> {
            values.map(|v| *v as f32).collect()
        };
        for (name, shape, values) in [
            (
                "weight",
                layer.weight.shape(),
                single(&mut layer.weight.iter()),
            ),
            ("bias", layer.bias.shape(), single(&mut layer.bias.iter())),
        ] {
            let tensor =
                Tensor::from_f32(shape.to_vec(), &values).map_err(EngineError::internal)?;
            parts.push((format!("{hook}/{prefix}{name}"), tensor));
        }
    }
    Ok(parts)
}
