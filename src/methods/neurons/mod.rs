//! Neurons: which react most, to what, over a corpus of any size.
//!
//! ```text
//!   text ─▶ row ─▶ [pos, neuron] of each hook point ─┬─▶ sums, maxima, by set      a few numbers for each neuron
//!                       dropped when reduced         ├─▶ best examples             at most k for each neuron
//!                                                    └─▶ activations of the named  back to the caller
//! ```
//!
//! What is held is fixed by the question: it grows with neurons and examples, not with texts, and is taken from the daemon's budget before
//! anything runs. Texts are run side by side and reduced in whatever order they are done; sums are in double precision, and ties are broken by
//! the numbers of the texts, so that the order does not show.

mod examples;
mod sums;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use examples::Best;
pub use examples::Example;
use sums::Sums;

use super::{
    input::{self, Input, Token},
    intervene::Editor,
    rows::{self, Room},
    select::{self, Point},
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, StageTimings, admission::Permit},
    ipc::info::{Axis, HookInfo, ModelInfo},
    tensor::Tensor,
};

/// Hook point when nobody names one.
const DEFAULT: &str = "mlp.hook_post";
/// Most neurons of a search.
const MOST_NEURONS: usize = 1 << 23;
/// Most neurons whose activations at each token are told.
const MOST_WATCHED: usize = 128;
/// Hook points above so many bytes are reduced off the async threads.
const INLINE_BYTES: usize = 64 << 10;
/// Ids that are spelled at a time.
const SPELLED_AT_ONCE: usize = 4096;

/// What neurons are ranked by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranking {
    /// Mean over all tokens.
    #[default]
    Mean,
    /// Greatest activation.
    Max,
    /// Mean over one set less that over the other.
    Contrast,
}

/// A set of texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Set {
    /// Counts positively in a contrast.
    #[default]
    A,
    /// Counts negatively.
    B,
}

/// A neuron that is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name {
    /// Canonical name of its hook point; none to go by the layer.
    pub hook: Option<String>,
    /// Layer of its hook point.
    pub layer: u32,
    /// Index along the last axis.
    pub index: u32,
}

/// What is looked for.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// A name, a kind or a pattern; empty for the activations of perceptrons.
    pub hook: String,
    /// Layers; empty takes all.
    pub layers: Vec<u32>,
    /// What neurons are ranked by.
    pub by: Ranking,
    /// How many are told.
    pub top_k: usize,
    /// So many of each hook point.
    pub per_layer: bool,
    /// Rank by magnitude.
    pub by_magnitude: bool,
    /// Told in the place of the best.
    pub neurons: Vec<Name>,
    /// Examples of each.
    pub examples: usize,
    /// Tokens on both sides of an example's.
    pub context: usize,
    /// Activations of the named at each token of each text.
    pub activations: bool,
    /// What is changed of the model.
    pub editor: Option<Editor>,
}

/// A text of the corpus.
#[derive(Clone, Debug)]
pub struct Text {
    /// The caller's name for it.
    pub id: Arc<str>,
    /// Its number.
    pub number: u64,
    /// What the model is run on.
    pub input: Input,
    /// Its set.
    pub set: Set,
}

/// A hook point whose last axis is neurons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Canonical name.
    pub hook: String,
    /// Its layer, where it has one.
    pub layer: Option<usize>,
    /// Neurons.
    pub width: usize,
}

/// A search that texts are given to.
#[derive(Debug)]
pub struct Neurons {
    /// Where neurons are.
    pub layers: Vec<Layer>,
    handle: ModelHandle,
    search: Search,
    /// Named neurons: layer of [`Self::layers`] and index.
    named: Vec<(usize, usize)>,
    most: usize,
    held: Mutex<Held>,
    _room: Permit,
}

/// What is known so far.
#[derive(Debug)]
struct Held {
    sums: Vec<Sums>,
    /// Of each layer, by index.
    best: Vec<BTreeMap<usize, Best>>,
}

/// What became of a text.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// Positions that were reduced.
    pub positions: usize,
    /// `[neuron, pos]` of the named, where they were asked for.
    pub activations: Option<Tensor>,
    /// Runs that it took.
    pub rows: u64,
    /// Where the time went.
    pub timings: StageTimings,
}

/// A neuron and its numbers.
#[derive(Clone, Debug)]
pub struct Ranked {
    /// Where it is: an index of [`Neurons::layers`].
    pub layer: usize,
    /// Its index.
    pub index: usize,
    /// Mean over all tokens.
    pub mean: f64,
    /// Greatest activation.
    pub max: f32,
    /// Mean over set A less that over set B, with texts of both.
    pub contrast: Option<f64>,
    /// The best first.
    pub examples: Vec<Example>,
}

/// Numbers of all neurons of a layer.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Mean over all tokens.
    pub mean: Vec<f64>,
    /// Greatest activation.
    pub max: Vec<f32>,
    /// Mean over set A less that over set B, with texts of both.
    pub contrast: Option<Vec<f64>>,
}

impl Neurons {
    /// Checks a search, and takes the room that it needs. `most` is the largest hook point of a text in bytes.
    ///
    /// # Errors
    /// With paths of fields that begin at the search; [`EngineError::ResourceExhausted`] when it would hold more than there is room for.
    pub fn begin(handle: ModelHandle, search: Search, most: usize) -> Result<Self, EngineError> {
        let layers = layers(handle.info(), &search)?;
        let neurons: usize = layers.iter().map(|l| l.width).sum();
        if neurons > MOST_NEURONS {
            return Err(EngineError::exhausted(
                format!(
                    "the search is among {neurons} neurons, more than the limit of {MOST_NEURONS}: name fewer layers"
                ),
                None,
            ));
        }
        if search.activations && search.neurons.is_empty() {
            return Err(EngineError::invalid(
                "neurons",
                "is empty: activations at each token are of neurons that are named",
            ));
        }
        if search.activations && search.neurons.len() > MOST_WATCHED {
            return Err(EngineError::invalid(
                "neurons",
                format!(
                    "has {} entries: give at most {MOST_WATCHED} for activations at each token",
                    search.neurons.len()
                ),
            ));
        }
        let named = search.neurons.iter().enumerate();
        let named = named
            .map(|(at, name)| {
                place(&layers, name).map_err(|e| e.beneath(&format!("neurons[{at}]")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let followed = if named.is_empty() {
            neurons
        } else {
            named.len()
        };
        let bytes = neurons
            .saturating_mul(sums::BYTES_EACH)
            .saturating_add(followed.saturating_mul(examples::bytes(&search)));
        let room = handle.buffer(bytes, Lane::Bulk)?;
        let mut best: Vec<BTreeMap<usize, Best>> = vec![BTreeMap::new(); layers.len()];
        for (layer, index) in &named {
            best[*layer].insert(*index, Best::default());
        }
        Ok(Self {
            held: Mutex::new(Held {
                sums: layers.iter().map(|l| Sums::new(l.width)).collect(),
                best,
            }),
            layers,
            handle,
            search,
            named,
            most,
            _room: room,
        })
    }

    /// The model that is asked.
    pub fn handle(&self) -> &ModelHandle {
        &self.handle
    }

    /// Runs a text and adds it. Of a text that fails between two passes, what was shown before counts.
    ///
    /// # Errors
    /// Those of the run; paths of fields begin at the text, or are `intervention...`.
    pub async fn text(self: &Arc<Self>, text: Text, ctx: &Ctx) -> Result<Told, EngineError> {
        let field = input::field_of(&text.input);
        let handle = match &self.search.editor {
            Some(editor) => {
                let edited = editor.edited(&self.handle, &text.input, (Lane::Bulk, ctx));
                edited.await?
            }
            None => self.handle.clone(),
        };
        let prepared = input::prepare(&self.handle, text.input, ctx).await;
        let prepared = prepared.map_err(|e| e.beneath("input"))?;
        let mut timings = StageTimings {
            tokenize: prepared.tokenize,
            ..StageTimings::default()
        };
        let info = self.handle.info().clone();
        let hooks: Vec<&HookInfo> = self
            .layers
            .iter()
            .filter_map(|l| info.hook(&l.hook))
            .collect();
        let tokens = prepared.tokens.len();
        let length = prepared.group.length.or((tokens > 0).then_some(tokens));
        let source = Arc::new(Source {
            id: text.id,
            number: text.number,
            set: text.set,
            ids: prepared.tokens.iter().map(|t| t.id).collect(),
        });
        let mut activations = vec![Vec::new(); self.named.len()];
        let (mut positions, mut rows) = (0, 0);
        for pass in rows::passes(&hooks, length, self.most)? {
            let some = &hooks[pass.clone()];
            let urgency = (Lane::Bulk, ctx);
            let shown = rows::show(&handle, &prepared.group, some, Room::Wait, urgency);
            let mut shown = shown.await.map_err(|e| input::at_field(e, field))?;
            timings += shown.timings;
            rows += 1;
            let begun = Instant::now();
            let tensors = std::mem::take(&mut shown.tensors);
            for tensor in &tensors {
                let [n, _] = *tensor.shape() else {
                    return Err(EngineError::internal(format!(
                        "neurons came back as {:?}",
                        tensor.shape()
                    )));
                };
                positions = n;
            }
            for (named, (layer, index)) in self.named.iter().enumerate() {
                if self.search.activations && pass.contains(layer) {
                    activations[named] = column(&tensors[layer - pass.start], *index)?;
                }
            }
            let bytes: usize = tensors.iter().map(|t| t.bytes().len()).sum();
            let (this, source) = (self.clone(), source.clone());
            let reduce = move || {
                for (layer, tensor) in pass.zip(&tensors) {
                    this.take(layer, tensor, &source)?;
                }
                Ok::<_, EngineError>(())
            };
            if bytes <= INLINE_BYTES {
                reduce()?;
            } else {
                let done = tokio::task::spawn_blocking(reduce).await;
                done.map_err(EngineError::internal)??;
            }
            timings.reduce += begun.elapsed();
        }
        let activations = match self.search.activations {
            true => Some(
                Tensor::from_f32(vec![self.named.len(), positions], &activations.concat())
                    .map_err(EngineError::internal)?,
            ),
            false => None,
        };
        Ok(Told {
            tokens: prepared.tokens,
            truncated: prepared.truncated,
            positions,
            activations,
            rows,
            timings,
        })
    }

    /// Adds `[pos, neuron]` of a layer.
    fn take(&self, layer: usize, tensor: &Tensor, source: &Source) -> Result<(), EngineError> {
        let width = self.layers[layer].width;
        let values = tensor.to_f32().map_err(EngineError::internal)?;
        let reduced = sums::reduce(&values, width);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.sums[layer].add(&reduced, source.set);
        let best = &mut held.best[layer];
        if self.search.examples == 0 {
            return Ok(());
        }
        let offer = |index: usize, best: &mut Best| {
            let (activation, position) = reduced.best[index];
            best.offer(self.search.examples, (activation, source.number), || {
                examples::made(
                    (&values, width, index),
                    (activation, position as usize, self.search.context),
                    source,
                )
            });
        };
        if self.named.is_empty() {
            for index in 0..width {
                offer(index, best.entry(index).or_default());
            }
        } else {
            for (index, best) in best.iter_mut() {
                offer(*index, best);
            }
        }
        Ok(())
    }

    /// The neurons that are told, with their numbers and examples.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for a contrast without texts of both sets.
    pub fn ranked(&self) -> Result<Vec<Ranked>, EngineError> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if self.search.by == Ranking::Contrast
            && let Some(set) = held.sums.iter().find_map(Sums::lacks)
        {
            let set = match set {
                Set::A => "A",
                Set::B => "B",
            };
            return Err(EngineError::invalid(
                "by",
                format!("no text of set {set} was run: a contrast is between two sets"),
            ));
        }
        let told = if self.named.is_empty() {
            self.chosen(&held.sums)
        } else {
            self.named.clone()
        };
        let ranked = told.into_iter().map(|(layer, index)| {
            let sums = &held.sums[layer];
            let best = held.best[layer].get(&index);
            Ranked {
                layer,
                index,
                mean: sums.mean(index),
                max: sums.max(index),
                contrast: sums.contrast(index),
                examples: best.map(Best::examples).unwrap_or_default(),
            }
        });
        Ok(ranked.collect())
    }

    /// The best neurons: layers and indices.
    fn chosen(&self, sums: &[Sums]) -> Vec<(usize, usize)> {
        let number = |layer: usize, index: usize| {
            let sums = &sums[layer];
            let number = match self.search.by {
                Ranking::Mean => sums.mean(index),
                Ranking::Max => f64::from(sums.max(index)),
                Ranking::Contrast => sums.contrast(index).unwrap_or(f64::NAN),
            };
            if self.search.by_magnitude {
                number.abs()
            } else {
                number
            }
        };
        let of_layer = |layer: usize| {
            let indices = 0..self.layers[layer].width;
            indices.map(move |index| (number(layer, index), layer, index))
        };
        let best = |mut all: Vec<(f64, usize, usize)>| {
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            all.truncate(self.search.top_k);
            all.into_iter().map(|(_, layer, index)| (layer, index))
        };
        let layers = 0..self.layers.len();
        if self.search.per_layer {
            layers
                .flat_map(|layer| best(of_layer(layer).collect()))
                .collect()
        } else {
            best(layers.flat_map(of_layer).collect()).collect()
        }
    }

    /// The numbers of all neurons of a layer.
    pub fn statistics(&self, layer: usize) -> Statistics {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = &held.sums[layer];
        let all = 0..self.layers[layer].width;
        Statistics {
            mean: all.clone().map(|i| sums.mean(i)).collect(),
            max: all.clone().map(|i| sums.max(i)).collect(),
            contrast: all.map(|i| sums.contrast(i)).collect(),
        }
    }

    /// The tokens of examples as the vocabulary spells them, by id.
    ///
    /// # Errors
    /// Those of the worker.
    pub async fn spelled(
        &self,
        ranked: &[Ranked],
        ctx: &Ctx,
    ) -> Result<BTreeMap<u32, Token>, EngineError> {
        let info = self.handle.info();
        let examples = ranked.iter().flat_map(|r| &r.examples);
        let mut tokens: BTreeMap<u32, Token> = BTreeMap::new();
        for id in examples.flat_map(|e| e.ids.iter()) {
            tokens.entry(*id).or_insert_with(|| Token {
                id: *id,
                special: info
                    .tokenizer
                    .as_ref()
                    .is_some_and(|t| t.special_ids.contains(id)),
                ..Token::default()
            });
        }
        if info.tokenizer.is_none() {
            return Ok(tokens);
        }
        let ids: Vec<u32> = tokens.keys().copied().collect();
        for some in ids.chunks(SPELLED_AT_ONCE) {
            let texts = self.handle.decode(some.to_vec(), ctx).await?;
            for (id, text) in some.iter().zip(texts) {
                if let Some(token) = tokens.get_mut(id) {
                    token.text = text;
                }
            }
        }
        Ok(tokens)
    }
}

/// A text as examples remember it.
#[derive(Debug)]
struct Source {
    id: Arc<str>,
    number: u64,
    set: Set,
    ids: Vec<u32>,
}

/// The hook points of a search.
fn layers(info: &ModelInfo, search: &Search) -> Result<Vec<Layer>, EngineError> {
    let name = if search.hook.is_empty() {
        DEFAULT
    } else {
        &search.hook
    };
    let names = [name.to_owned()];
    let points = select::points(info, &names, &search.layers, "").map_err(renamed)?;
    let of = |point: &Point<'_>| match point {
        Point::Hook(hook) => match (&hook.axes[..], hook.dims.last()) {
            ([Axis::Batch, Axis::Pos, last], Some(Some(width)))
                if hook.dtype.is_float() && !last.is_head() =>
            {
                Ok(Layer {
                    hook: hook.name.clone(),
                    layer: hook.layer,
                    width: *width,
                })
            }
            _ => {
                let axes: Vec<&str> = hook.axes.iter().map(Axis::name).collect();
                Err(EngineError::invalid(
                    "hook",
                    format!(
                        "\"{}\" has the axes {}: neurons are at hook points of batch, pos and features",
                        hook.name,
                        axes.join(", ")
                    ),
                ))
            }
        },
        Point::Value(name) => Err(EngineError::invalid(
            "hook",
            format!("\"{name}\" has no axes that anybody has read: name a hook point"),
        )),
    };
    points.iter().map(of).collect()
}

/// Fields of a selection as a search calls them.
fn renamed(error: EngineError) -> EngineError {
    let EngineError::InvalidArgument { field, message } = error else {
        return error;
    };
    let field = match field.trim_start_matches('.') {
        other if other.starts_with("hooks") => "hook".to_owned(),
        other => other.to_owned(),
    };
    EngineError::InvalidArgument { field, message }
}

/// Where a named neuron is. Paths of fields begin at its name.
fn place(layers: &[Layer], name: &Name) -> Result<(usize, usize), EngineError> {
    let layer = match &name.hook {
        Some(hook) => layers.iter().position(|l| l.hook == *hook).ok_or_else(|| {
            EngineError::invalid(
                "hook",
                format!("\"{hook}\" is none of the hook points that are searched"),
            )
        })?,
        None => {
            let there = layers.iter().enumerate();
            let mut there = there.filter(|(_, l)| l.layer == Some(name.layer as usize));
            match (there.next(), there.next()) {
                (Some((at, _)), None) => at,
                (Some(_), Some(_)) => {
                    return Err(EngineError::invalid(
                        "hook",
                        format!("is needed: layer {} has several hook points", name.layer),
                    ));
                }
                (None, _) => {
                    return Err(EngineError::invalid(
                        "layer",
                        format!("layer {} is none of those that are searched", name.layer),
                    ));
                }
            }
        }
    };
    let width = layers[layer].width;
    if name.index as usize >= width {
        return Err(EngineError::invalid(
            "index",
            format!(
                "is {}: \"{}\" has {width} neurons",
                name.index, layers[layer].hook
            ),
        ));
    }
    Ok((layer, name.index as usize))
}

/// One neuron at each position of `[pos, neuron]`.
fn column(tensor: &Tensor, index: usize) -> Result<Vec<f32>, EngineError> {
    let width = tensor.shape().last().copied().unwrap_or(1);
    let values = tensor.to_f32().map_err(EngineError::internal)?;
    Ok(values.iter().skip(index).step_by(width).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<Layer> {
        let layer = |hook: &str, layer| Layer {
            hook: hook.to_owned(),
            layer,
            width: 8,
        };
        vec![
            layer("a", Some(0)),
            layer("b", Some(1)),
            layer("c", Some(1)),
        ]
    }

    #[test]
    fn neurons_are_named_by_hook_point_or_layer() {
        let name = |hook: Option<&str>, layer, index| Name {
            hook: hook.map(str::to_owned),
            layer,
            index,
        };
        let found = |name| place(&layers(), &name);
        assert_eq!(found(name(Some("c"), 0, 3)).unwrap(), (2, 3));
        assert_eq!(found(name(None, 0, 7)).unwrap(), (0, 7));
        for (wrong, wanted) in [
            (name(Some("d"), 0, 0), "hook"),
            (name(None, 1, 0), "hook"),
            (name(None, 2, 0), "layer"),
            (name(None, 0, 8), "index"),
        ] {
            let error = found(wrong).unwrap_err();
            assert!(
                matches!(&error, EngineError::InvalidArgument { field, .. } if field == wanted),
                "{error}"
            );
        }
    }
}
