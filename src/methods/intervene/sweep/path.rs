//! Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023): what a sender does by its direct path to receivers.
//!
//! ```text
//!   1. run the input, the sender as it is for the source, every other head as it is for the input ──▶ what receivers are
//!   2. run the input, the receivers as they were ──▶ F
//! ```
//!
//! Perceptrons on the way are computed anew in the first run, unless they are held too.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        operand::Grid,
        resolve::Resolver,
        site::{Site, sites},
    },
    Path, Swept,
};
use crate::{
    engine::{EngineError, NamedTensor},
    ipc::info::ModelInfo,
    methods::{
        attribute::baseline::moved,
        input::Prepared,
        subject::{Show, Subject, floats},
    },
};

/// Hook points that are held.
const HEADS: &str = "attn.hook_z";
const PERCEPTRONS: &str = "hook_mlp_out";

/// What path patching needs beside the senders.
#[derive(Debug)]
pub(super) struct Paths {
    receivers: Vec<Site>,
    /// What is held at what it is for the input, by name. Receivers among them are not held.
    held: BTreeMap<String, Held>,
}

#[derive(Debug)]
struct Held {
    values: Grid,
    /// Scale and shift of a row.
    operands: [Grid; 2],
}

impl Paths {
    /// Runs the input once for what is held.
    ///
    /// # Errors
    /// With paths of fields that begin at the request.
    pub(super) async fn new(
        path: &Path,
        row: &Prepared,
        resolver: &Resolver<'_>,
    ) -> Result<Self, EngineError> {
        let info = resolver.info();
        let mut receivers: Vec<Site> = Vec::new();
        for (n, receiver) in path.receivers.iter().enumerate() {
            let found = sites(info, receiver, &row.tokens, row.group.length);
            for site in found.map_err(|e| e.beneath(&format!("path.receivers[{n}]")))? {
                if receivers.iter().any(|r| r.hook == site.hook) {
                    return Err(EngineError::invalid(
                        format!("path.receivers[{n}]"),
                        format!(
                            "names \"{}\" again: put its parts into one receiver",
                            site.hook
                        ),
                    ));
                }
                receivers.push(site);
            }
        }
        let mut kinds = vec![HEADS];
        kinds.extend(path.freeze_mlps.then_some(PERCEPTRONS));
        let hooks = info.hooks.iter().map(|h| &h.name);
        let hooks: Vec<String> = hooks
            .filter(|name| kinds.iter().any(|kind| name.ends_with(kind)))
            .cloned()
            .collect();
        if hooks.is_empty() {
            return Err(EngineError::precondition(format!(
                "model \"{}\" has no \"{HEADS}\", so that its heads cannot be held while a path is patched",
                info.name
            )));
        }
        let mut values = BTreeMap::new();
        let rows = vec![row.group.clone()];
        resolver
            .run(resolver.handle(), rows, (&hooks, false), |hook, grid| {
                values.insert(hook.to_owned(), grid);
            })
            .await?;
        let held = values.into_iter().map(|(name, values)| {
            let rank = values.shape.len();
            let receiver = receivers.iter().find(|r| r.hook == name);
            let operands = match receiver {
                None => [Grid::one(rank, 0.0), values.clone()],
                Some(receiver) => {
                    let free = Grid::one(rank, 1.0).spread(receiver, 0.0);
                    let free = free.map_err(EngineError::internal)?;
                    let rest = values.with(&free, |v, free| if free == 0.0 { v } else { 0.0 });
                    [free, rest]
                }
            };
            Ok((name, Held { values, operands }))
        });
        Ok(Self {
            held: held.collect::<Result<_, EngineError>>()?,
            receivers,
        })
    }

    /// The number with the path from each part of a sender patched, by itself.
    ///
    /// # Errors
    /// Those of the runs.
    pub(super) async fn values(
        &self,
        subject: &mut Subject,
        sender: &Swept,
    ) -> Result<Vec<f64>, EngineError> {
        let info = subject.handle.info().clone();
        let (parts, name) = (sender.parts.len(), sender.name());
        let mut intervene: BTreeSet<String> = self.held.keys().cloned().collect();
        intervene.insert(name.to_owned());
        let show = Show {
            intervene,
            expose: self.receivers.iter().map(|r| r.hook.clone()).collect(),
            ..Show::default()
        };
        let held = |part: usize| -> Vec<(&str, [Grid; 2])> {
            let others = self.held.get(name);
            let own = sender
                .parts
                .replaced(part, &sender.new, others.map(|h| &h.values));
            let rest = self.held.iter().filter(|(n, _)| *n != name);
            let rest = rest.map(|(n, h)| (n.as_str(), h.operands.clone()));
            std::iter::once((name, own)).chain(rest).collect()
        };
        // What the receivers are, by part, in the order of their names.
        let mut arrived: Vec<Vec<Vec<f32>>> = vec![Vec::new(); parts];
        subject
            .run(
                &show,
                (parts, bytes(&held(0))),
                |range| of_rows(&info, range.map(&held)),
                |_, range, tensors| {
                    for at in 0..show.expose.len() {
                        let all = floats(tensors, at)?;
                        let row = all.len() / range.len().max(1);
                        for (part, values) in range.clone().zip(all.chunks_exact(row.max(1))) {
                            arrived[part].push(values.to_vec());
                        }
                    }
                    Ok(())
                },
            )
            .await?;
        let mut by_name: Vec<&Site> = self.receivers.iter().collect();
        by_name.sort_by(|a, b| a.hook.cmp(&b.hook));
        let mut show = Show::objective();
        for site in &by_name {
            show = show.moving(&site.hook);
        }
        let received = |part: usize| -> Vec<(&str, [Grid; 2])> {
            let sites = by_name.iter().zip(&arrived[part]);
            sites
                .map(|(site, values)| {
                    let rank = site.axes.len();
                    let whole = Grid {
                        shape: site.extents.clone(),
                        values: values.clone(),
                    };
                    let spread = |grid: Grid, rest| {
                        // What is chosen lies within its site.
                        grid.spread(site, rest)
                            .unwrap_or_else(|_| Grid::one(rank, rest))
                    };
                    let operands = [
                        spread(Grid::one(rank, 0.0), 1.0),
                        spread(whole.cut(&site.chosen), 0.0),
                    ];
                    (site.hook.as_str(), operands)
                })
                .collect()
        };
        let mut found = vec![f64::NAN; parts];
        subject
            .values(
                &show,
                (parts, bytes(&received(0))),
                |range| of_rows(&info, range.map(&received)),
                |_, part, value| found[part] = value,
            )
            .await?;
        Ok(found)
    }
}

fn bytes(operands: &[(&str, [Grid; 2])]) -> usize {
    let grids = operands.iter().flat_map(|(_, both)| both);
    grids.map(|g| g.values.len() * size_of::<f32>()).sum()
}

/// Scales and shifts of rows that move the same hook points.
pub(in crate::methods::intervene) fn of_rows<'a>(
    info: &ModelInfo,
    rows: impl Iterator<Item = Vec<(&'a str, [Grid; 2])>>,
) -> Result<Vec<NamedTensor>, EngineError> {
    let mut all: Vec<(&str, [Grid; 2])> = Vec::new();
    let mut count = 0;
    for row in rows {
        count += 1;
        if all.is_empty() {
            all = row;
            continue;
        }
        for ((_, all), (_, one)) in all.iter_mut().zip(row) {
            for (all, one) in all.iter_mut().zip(one) {
                all.values.extend(one.values);
            }
        }
    }
    let mut inputs = Vec::with_capacity(2 * all.len());
    for (hook, [scale, shift]) in &all {
        let of = |grid: &Grid| [vec![count], grid.shape.clone()].concat();
        let (scale, shift) = (
            (of(scale), &scale.values[..]),
            (of(shift), &shift.values[..]),
        );
        inputs.extend(moved(info, hook, scale, shift)?);
    }
    Ok(inputs)
}
