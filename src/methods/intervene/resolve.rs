//! From edits to stages and operands: finds the places, and makes the values that stand there.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::future::BoxFuture;

use super::{
    Edit, Intervention, Operation, Vector, Within,
    means::named,
    operand::{Grid, Staged, follow, given, joins},
    site::{Site, sites},
};
use crate::{
    engine::{Edits, EngineError, Job, ModelHandle, NamedTensor, PickSpec, RowGroup},
    ipc::{
        info::ModelInfo,
        spec::{Stage, VariantSpec},
    },
    methods::{
        attribute::draw::Draws,
        input::{self, Input, Prepared},
        target::at,
    },
    tensor::Tensor,
};

/// Inputs of a mean that are in the queue at a time.
const AT_A_TIME: usize = 32;

/// What to run a model with, so that it is changed as the intervention says for this input.
///
/// # Errors
/// With paths of fields that begin at the request: `intervention.edits[2].heads`, `input...`.
pub async fn resolve(
    handle: &ModelHandle,
    intervention: &Intervention,
    input: &Input,
    within: Within<'_>,
) -> Result<Edits, EngineError> {
    let prepared = input::prepare(handle, input.clone(), within.ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    resolver(handle, intervention, within)
        .edits(&intervention.edits, &prepared, "intervention.edits", &[])
        .await
}

/// What makes the values of edits.
pub(super) fn resolver<'a>(
    handle: &'a ModelHandle,
    intervention: &'a Intervention,
    within: Within<'a>,
) -> Resolver<'a> {
    Resolver {
        handle,
        info: handle.info(),
        intervention,
        within,
    }
}

/// What an edit does at one hook point.
pub(super) struct Placed {
    pub(super) site: Site,
    pub(super) staged: Staged,
}

pub(super) struct Resolver<'a> {
    handle: &'a ModelHandle,
    info: &'a ModelInfo,
    intervention: &'a Intervention,
    within: Within<'a>,
}

/// What stood at hook points in a run, by name, and how many positions it had.
pub(super) struct Run {
    pub(super) values: BTreeMap<String, Grid>,
    pub(super) length: Option<usize>,
}

impl Resolver<'_> {
    pub(super) fn handle(&self) -> &ModelHandle {
        self.handle
    }

    pub(super) fn info(&self) -> &ModelInfo {
        self.info
    }

    /// `within` are the sources that these edits are made for.
    fn edits<'b>(
        &'b self,
        edits: &'b [Edit],
        row: &'b Prepared,
        field: &'b str,
        within: &'b [String],
    ) -> BoxFuture<'b, Result<Edits, EngineError>> {
        Box::pin(async move {
            let length = row.group.length;
            let mut places = Vec::with_capacity(edits.len());
            for (n, edit) in edits.iter().enumerate() {
                let found = sites(self.info, edit, &row.tokens, length);
                places.push(found.map_err(|e| e.beneath(&format!("{field}[{n}]")))?);
            }
            let runs = self.sources(edits, &places, field, within).await?;
            let mut stages: BTreeMap<String, Vec<Staged>> = BTreeMap::new();
            for (n, (edit, sites)) in edits.iter().zip(&places).enumerate() {
                let made = self.staged(edit, sites, &runs, length).await;
                let made = made.map_err(|e| e.beneath(&format!("{field}[{n}]")))?;
                for (site, staged) in sites.iter().zip(made) {
                    follow(stages.entry(site.hook.clone()).or_default(), staged);
                }
            }
            let edits = self.operands(stages)?;
            let shown = runs.into_values().flat_map(|r| r.values.into_keys());
            Ok(edits.showing(shown.collect()))
        })
    }

    /// The places of edits. Paths of fields begin at an edit, but for the hook point of the edit of a number: `hooks[number]`.
    pub(super) fn sites(
        &self,
        edits: &[Edit],
        row: &Prepared,
    ) -> Result<Vec<Vec<Site>>, EngineError> {
        let found = edits.iter().enumerate().map(|(n, edit)| {
            sites(self.info, edit, &row.tokens, row.group.length).map_err(|e| {
                let hook =
                    matches!(&e, EngineError::InvalidArgument { field, .. } if field == "hook");
                if hook {
                    input::at_field(e, &format!("hooks[{n}]"))
                } else {
                    e
                }
            })
        });
        found.collect()
    }

    /// What edits do at each of their places, each hook point once, in the order of the graph. `runs` are those of the sources that they name.
    pub(super) async fn placed(
        &self,
        edits: &[Edit],
        sites: Vec<Vec<Site>>,
        runs: &BTreeMap<String, Run>,
        row: &Prepared,
    ) -> Result<Vec<Placed>, EngineError> {
        let mut placed: BTreeMap<usize, Placed> = BTreeMap::new();
        for (edit, sites) in edits.iter().zip(sites) {
            let staged = self.staged(edit, &sites, runs, row.group.length).await?;
            for (site, staged) in sites.into_iter().zip(staged) {
                let order = self.info.hooks.iter().position(|h| h.name == site.hook);
                let order = order.unwrap_or(usize::MAX);
                placed.entry(order).or_insert(Placed { site, staged });
            }
        }
        Ok(placed.into_values().collect())
    }

    /// The stages with their operands as inputs of a row. What changes nothing is left out, so that it changes no bit either.
    fn operands(&self, staged: BTreeMap<String, Vec<Staged>>) -> Result<Edits, EngineError> {
        let mut stages = BTreeMap::new();
        let mut inputs = Vec::new();
        for (name, mut all) in staged {
            all.retain(|staged| !staged.is_neutral());
            if all.is_empty() {
                continue;
            }
            let hook = self.info.hook(&name);
            let dtype = hook
                .map(|h| h.dtype)
                .ok_or_else(|| EngineError::internal(format!("hook point \"{name}\" is gone")))?;
            for (number, Staged { stage, operands }) in all.iter().enumerate() {
                for ((name, _), grid) in stage.inputs(number, &name).into_iter().zip(operands) {
                    let mut shape = vec![1];
                    shape.extend(&grid.shape);
                    let tensor = Tensor::from_f32(shape, &grid.values)
                        .and_then(|t| t.cast_float(dtype))
                        .map_err(EngineError::internal)?;
                    inputs.push(NamedTensor { name, tensor });
                }
            }
            let kinds: Vec<Stage> = all.iter().map(|s| s.stage).collect();
            stages.insert(name, kinds);
        }
        Ok(Edits::new(self.info, stages, inputs))
    }

    /// The graph that has these edits, as long as it changes nothing.
    fn frame(&self, edits: &[Edit], places: &[Vec<Site>]) -> Edits {
        let mut stages: BTreeMap<String, Vec<Stage>> = BTreeMap::new();
        for (edit, sites) in edits.iter().zip(places) {
            let stage = edit.operation.stage();
            for site in sites {
                let all = stages.entry(site.hook.clone()).or_default();
                if !all.last().is_some_and(|last| joins(*last, stage)) {
                    all.push(stage);
                }
            }
        }
        Edits::new(self.info, stages, Vec::new())
    }

    /// Runs every source that these edits name, once. One that is not edited itself runs by the graph that its values go to: what is
    /// interchanged with itself then stays as it is.
    async fn sources(
        &self,
        edits: &[Edit],
        places: &[Vec<Site>],
        field: &str,
        within: &[String],
    ) -> Result<BTreeMap<String, Run>, EngineError> {
        let mut wanted: BTreeMap<&String, (String, BTreeSet<String>)> = BTreeMap::new();
        for (n, (edit, sites)) in edits.iter().zip(places).enumerate() {
            if let Operation::Interchange { source, .. } = &edit.operation {
                let field = || format!("{field}[{n}].interchange.source");
                let (_, hooks) = wanted
                    .entry(source)
                    .or_insert_with(|| (field(), BTreeSet::new()));
                hooks.extend(sites.iter().map(|s| s.hook.clone()));
            }
        }
        let mut runs = BTreeMap::new();
        for (name, (field, hooks)) in wanted {
            let Some(source) = self.intervention.sources.get(name) else {
                let known: Vec<&String> = self.intervention.sources.keys().collect();
                return Err(EngineError::invalid(
                    field,
                    format!("there is no source \"{name}\": the sources are {known:?}"),
                ));
            };
            let mut chain = within.to_vec();
            chain.push(name.clone());
            if within.contains(name) {
                return Err(EngineError::invalid(
                    field,
                    format!("a source is made from itself: {}", chain.join(" from ")),
                ));
            }
            let here = format!("intervention.sources[\"{name}\"]");
            let prepared = input::prepare(self.handle, source.input.clone(), self.within.ctx)
                .await
                .map_err(|e| e.beneath(&format!("{here}.input")))?;
            let own = format!("{here}.edits");
            let own = self.edits(&source.edits, &prepared, &own, &chain).await?;
            let length = prepared.group.length;
            let framed = own.is_empty();
            let handle = self.handle.edited(match framed {
                true => self.frame(edits, places),
                false => own,
            });
            let hooks: Vec<String> = hooks.into_iter().collect();
            let mut values = BTreeMap::new();
            let keep = |hook: &str, grid| {
                values.insert(hook.to_owned(), grid);
            };
            self.run(&handle, vec![prepared.group], (&hooks, framed), keep)
                .await?;
            runs.insert(name.clone(), Run { values, length });
        }
        Ok(runs)
    }

    /// The stage of an edit at each of its hook points.
    async fn staged(
        &self,
        edit: &Edit,
        sites: &[Site],
        runs: &BTreeMap<String, Run>,
        length: Option<usize>,
    ) -> Result<Vec<Staged>, EngineError> {
        let zero = |site: &Site| Grid::one(site.axes.len(), 0.0);
        let each = |make: &dyn Fn(&Site) -> Result<Staged, EngineError>| {
            sites.iter().map(make).collect::<Result<Vec<_>, _>>()
        };
        match &edit.operation {
            Operation::Zero => each(&|site| replaced(site, &zero(site), "zero")),
            Operation::Set(values) => {
                let values = given(values, "set")?;
                each(&|site| replaced(site, &values, "set"))
            }
            Operation::Scale(factor) => {
                finite(*factor, "scale")?;
                each(&|site| {
                    let scale = Grid::one(site.axes.len(), *factor);
                    Ok(Staged::moved(
                        spread(&scale, site, 1.0, "scale")?,
                        zero(site),
                    ))
                })
            }
            Operation::Mean(inputs) => {
                let means = self.means(inputs, sites, length, "mean.inputs").await?;
                let pairs = sites.iter().zip(&means);
                pairs
                    .map(|(site, mean)| replaced(site, &mean.cut(&site.chosen), "mean"))
                    .collect()
            }
            Operation::Add { vector, scale } => {
                finite(*scale, "add.scale")?;
                let vectors = self.vectors(vector, sites, length, "add").await?;
                let pairs = sites.iter().zip(&vectors);
                pairs
                    .map(|(site, vector)| added(site, &vector.times(*scale), "add"))
                    .collect()
            }
            Operation::Noise { deviation, seed } => {
                finite(*deviation, "noise.deviation")?;
                if *deviation < 0.0 {
                    return Err(EngineError::invalid(
                        "noise.deviation",
                        format!("is {deviation}: a standard deviation is not negative"),
                    ));
                }
                let mut draws = Draws::new(*seed);
                let mut staged = Vec::with_capacity(sites.len());
                for site in sites {
                    let shape = site.edited();
                    let values = draws.noise(shape.iter().product(), f64::from(*deviation));
                    staged.push(added(site, &Grid { shape, values }, "noise")?);
                }
                Ok(staged)
            }
            Operation::Interchange { source, positions } => {
                let run = runs.get(source).ok_or_else(|| {
                    EngineError::internal(format!("source \"{source}\" was not run"))
                })?;
                each(&|site| interchanged(site, run, positions, length))
            }
            Operation::ProjectOut(vector) => {
                let vectors = self.vectors(vector, sites, length, "project_out").await?;
                let pairs = sites.iter().zip(&vectors);
                pairs
                    .map(|(site, vector)| projected(site, vector))
                    .collect()
            }
            Operation::Clamp { low, high } => {
                if low.is_nan() || high.is_nan() || low > high {
                    return Err(EngineError::invalid(
                        "clamp",
                        format!(
                            "has the bounds {low} and {high}: the first must not be above the second"
                        ),
                    ));
                }
                each(&|site| {
                    let rank = site.axes.len();
                    let bound = |at: f32, rest| spread(&Grid::one(rank, at), site, rest, "clamp");
                    Ok(Staged {
                        stage: Stage::Clamp,
                        operands: vec![
                            bound(*low, f32::NEG_INFINITY)?,
                            bound(*high, f32::INFINITY)?,
                        ],
                    })
                })
            }
        }
    }

    /// A vector at each site, as it broadcasts to what is edited there.
    async fn vectors(
        &self,
        vector: &Vector,
        sites: &[Site],
        length: Option<usize>,
        field: &str,
    ) -> Result<Vec<Grid>, EngineError> {
        match vector {
            Vector::Given(values) => {
                let values = given(values, &format!("{field}.values"))?;
                Ok(sites.iter().map(|_| values.clone()).collect())
            }
            Vector::Difference { positive, negative } => {
                let field = format!("{field}.difference");
                let more = self
                    .means(positive, sites, length, &format!("{field}.positive"))
                    .await?;
                let less = self
                    .means(negative, sites, length, &format!("{field}.negative"))
                    .await?;
                let pairs = sites.iter().zip(more.iter().zip(&less));
                Ok(pairs
                    .map(|(site, (more, less))| more.with(less, |a, b| a - b).cut(&site.chosen))
                    .collect())
            }
        }
    }

    /// The mean at each site over inputs, and over positions unless the site is an attention's.
    async fn means(
        &self,
        inputs: &[Input],
        sites: &[Site],
        length: Option<usize>,
        field: &str,
    ) -> Result<Vec<Grid>, EngineError> {
        if inputs.is_empty() {
            return Err(EngineError::invalid(
                field,
                "is empty: give at least one input",
            ));
        }
        let attention = sites.iter().any(Site::is_attention);
        let mut groups = Vec::with_capacity(inputs.len());
        for (n, input) in inputs.iter().enumerate() {
            let here = format!("{field}[{n}]");
            let prepared = input::prepare(self.handle, input.clone(), self.within.ctx).await;
            let prepared = prepared.map_err(|e| e.beneath(&here))?;
            if attention && prepared.group.length != length {
                return Err(EngineError::invalid(
                    here,
                    format!(
                        "has {} tokens and the input {}: the mean of an attention is over texts of one length",
                        prepared.group.length.unwrap_or_default(),
                        length.unwrap_or_default()
                    ),
                ));
            }
            groups.push(prepared.group);
        }
        let (means, of) = (self.within.means, named(self.handle, &groups));
        let known = |site: &Site| means.get(&of, &site.hook, !attention);
        let mut found: BTreeMap<&str, Arc<Grid>> = BTreeMap::new();
        found.extend(sites.iter().filter_map(|s| Some((&s.hook[..], known(s)?))));
        let missing = sites.iter().map(|s| &s.hook);
        let missing = missing.filter(|h| !found.contains_key(&h[..]));
        let hooks: Vec<String> = missing.cloned().collect();
        let mut sums: BTreeMap<String, (Vec<usize>, Vec<f64>, usize)> = BTreeMap::new();
        let chunks = groups.chunks(AT_A_TIME).filter(|_| !hooks.is_empty());
        for some in chunks {
            self.run(self.handle, some.to_vec(), (&hooks, false), |hook, grid| {
                let over = sites.iter().find(|s| s.hook == hook);
                let over = over.and_then(Site::positions).filter(|_| !attention);
                let (shape, rows) = grid.by(over);
                let (_, sum, count) = sums
                    .entry(hook.to_owned())
                    .or_insert_with(|| (shape, vec![0.0; rows[0].len()], 0));
                for row in &rows {
                    for (sum, value) in sum.iter_mut().zip(row) {
                        *sum += f64::from(*value);
                    }
                }
                *count += rows.len();
            })
            .await?;
        }
        for (hook, (shape, sum, count)) in &sums {
            #[allow(clippy::cast_possible_truncation)] // as precise as what it is the mean of
            let values = sum.iter().map(|s| (s / *count as f64) as f32).collect();
            let shape = shape.clone();
            let grid = Arc::new(Grid { shape, values });
            means.put(&of, hook, !attention, &grid);
            found.insert(hook, grid);
        }
        let of_site = |site: &Site| {
            let grid = found.get(&site.hook[..]).ok_or_else(|| {
                EngineError::internal(format!("\"{}\" came back from no run", site.hook))
            })?;
            Ok(Grid::clone(grid))
        };
        sites.iter().map(of_site).collect()
    }

    /// Runs rows for what stands at hook points, to the model's output or no further than these.
    pub(super) async fn run(
        &self,
        handle: &ModelHandle,
        groups: Vec<RowGroup>,
        (hooks, keep_outputs): (&[String], bool),
        mut each: impl FnMut(&str, Grid),
    ) -> Result<(), EngineError> {
        let picks: Vec<PickSpec> = hooks
            .iter()
            .map(|hook| PickSpec {
                output: hook.clone(),
                ..PickSpec::default()
            })
            .collect();
        let job = Job {
            spec: VariantSpec {
                keep_outputs,
                ..VariantSpec::exposing(hooks)
            },
            lane: self.within.lane,
            groups: groups
                .into_iter()
                .map(|group| RowGroup {
                    picks: picks.clone(),
                    ..group
                })
                .collect(),
        };
        let mut rows = handle.submit(job, self.within.ctx).await?;
        while let Some(done) = rows.next().await {
            for (hook, tensor) in hooks.iter().zip(done?.tensors) {
                let values = tensor.to_f32().map_err(EngineError::internal)?.into_owned();
                let shape = tensor.shape().to_vec();
                each(hook, Grid { shape, values });
            }
        }
        Ok(())
    }
}

fn finite(value: f32, field: &str) -> Result<(), EngineError> {
    if value.is_finite() {
        return Ok(());
    }
    Err(EngineError::invalid(
        field,
        format!("is {value}: give a finite number"),
    ))
}

fn spread(grid: &Grid, site: &Site, rest: f32, field: &str) -> Result<Grid, EngineError> {
    grid.spread(site, rest)
        .map_err(|why| EngineError::invalid(field, why))
}

/// These values in the place of what stands there.
fn replaced(site: &Site, values: &Grid, field: &str) -> Result<Staged, EngineError> {
    let gone = Grid::one(site.axes.len(), 0.0);
    Ok(Staged::moved(
        spread(&gone, site, 1.0, field)?,
        spread(values, site, 0.0, field)?,
    ))
}

/// These values added to what stands there.
fn added(site: &Site, values: &Grid, field: &str) -> Result<Staged, EngineError> {
    let stays = Grid::one(site.axes.len(), 1.0);
    Ok(Staged::moved(stays, spread(values, site, 0.0, field)?))
}

/// What stood there in the run of a source.
fn interchanged(
    site: &Site,
    run: &Run,
    positions: &[i32],
    length: Option<usize>,
) -> Result<Staged, EngineError> {
    let values = run
        .values
        .get(&site.hook)
        .ok_or_else(|| EngineError::internal(format!("\"{}\" came back from no run", site.hook)))?;
    let mut from = site.chosen.clone();
    match (positions, site.positions()) {
        ([], _) if run.length == length => {}
        ([], _) => {
            return Err(EngineError::invalid(
                "interchange.positions",
                format!(
                    "is needed: the source has {} tokens and the input {}; name the position of the source for each that is edited",
                    run.length.unwrap_or_default(),
                    length.unwrap_or_default()
                ),
            ));
        }
        (_, Some(axis)) if !site.is_attention() || run.length == length => {
            let edited = site.edited()[axis];
            if positions.len() != edited {
                return Err(EngineError::invalid(
                    "interchange.positions",
                    format!(
                        "has {} entries for {edited} positions that are edited",
                        positions.len()
                    ),
                ));
            }
            let each = positions.iter().enumerate();
            let named = each.map(|(n, p)| {
                at(*p, run.length, &format!("interchange.positions[{n}]")).map(|p| p as usize)
            });
            from[axis] = Some(named.collect::<Result<Vec<_>, _>>()?);
        }
        (_, Some(_)) => {
            return Err(EngineError::invalid(
                "interchange.positions",
                format!(
                    "cannot map \"{}\", which has as many keys as the row has tokens: give a source of the same length",
                    site.hook
                ),
            ));
        }
        (_, None) => {
            return Err(EngineError::invalid(
                "interchange.positions",
                format!("are given, and \"{}\" has no positions", site.hook),
            ));
        }
    }
    replaced(site, &values.cut(&from), "interchange")
}

/// What points along a vector goes.
fn projected(site: &Site, vector: &Grid) -> Result<Staged, EngineError> {
    const FIELD: &str = "project_out";
    let last = site.axes.len() - 1;
    let width = site.extents[last];
    if site.axes[last].is_token() || site.chosen[last].is_some() {
        return Err(EngineError::invalid(
            FIELD,
            format!(
                "takes the whole last axis of a hook point of features, and this is a part of \"{}\" or an attention",
                site.hook
            ),
        ));
    }
    if vector.shape.last() != Some(&width) {
        return Err(EngineError::invalid(
            FIELD,
            format!(
                "has the shape {:?}, and \"{}\" has {width} numbers at each position",
                vector.shape, site.hook
            ),
        ));
    }
    let unit = vector
        .unit(width)
        .ok_or_else(|| EngineError::invalid(FIELD, "has a direction of length zero"))?;
    Ok(Staged {
        stage: Stage::Project,
        operands: vec![spread(&unit, site, 0.0, FIELD)?],
    })
}
