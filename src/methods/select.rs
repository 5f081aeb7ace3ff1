//! From what a caller names to the hook points that are meant.
//!
//! A name is a canonical one, an alias, a kind (that point of every layer), a pattern with `*`, or `value:NAME`. What a model lacks
//! is told apart from what means nothing: the first is a failed precondition with the reason, the second a bad argument.

use crate::{
    engine::EngineError,
    ipc::{
        info::{Axis, HookInfo, ModelInfo},
        spec::VALUE_PREFIX,
    },
};

/// Most names of a selection.
const MOST_NAMES: usize = 4096;
/// Longest name in bytes.
const LONGEST_NAME: usize = 1024;

/// A value of the graph that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point<'a> {
    /// A hook point.
    Hook(&'a HookInfo),
    /// A value by its name in the graph, prefix included.
    Value(&'a str),
}

impl Point<'_> {
    /// The name that the engine and the answer know it by.
    pub fn name(&self) -> &str {
        match self {
            Point::Hook(h) => &h.name,
            Point::Value(name) => name,
        }
    }

    /// Its axes with the batch in front; empty where nobody has read them.
    pub fn axes(&self) -> &[Axis] {
        match self {
            Point::Hook(h) => &h.axes,
            Point::Value(_) => &[],
        }
    }

    /// Whether it is an attention pattern.
    pub fn is_pattern(&self) -> bool {
        kind(self.name()) == "hook_pattern"
    }
}

/// The points that the names mean, each once: hook points in the order of the graph, then values in the order of their naming. With
/// `layers`, of hook points that belong to a layer only those of these layers. `field` is the path of the selection.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] for a hook point that the model lacks, [`EngineError::InvalidArgument`] for a name that means nothing.
pub fn points<'a>(
    info: &'a ModelInfo,
    names: &'a [String],
    layers: &[u32],
    field: &str,
) -> Result<Vec<Point<'a>>, EngineError> {
    if names.len() > MOST_NAMES {
        return Err(EngineError::invalid(
            format!("{field}.hooks"),
            format!("has {} names: give at most {MOST_NAMES}", names.len()),
        ));
    }
    if let Some(at) = layers.iter().position(|l| *l as usize >= info.dims.layers) {
        return Err(EngineError::invalid(
            format!("{field}.layers[{at}]"),
            format!(
                "layer {} does not exist: the model has {}",
                layers[at], info.dims.layers
            ),
        ));
    }
    let mut chosen = vec![false; info.hooks.len()];
    let mut values: Vec<&str> = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let here = format!("{field}.hooks[{at}]");
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(EngineError::invalid(
                here,
                format!(
                    "a name has 1 to {LONGEST_NAME} bytes, this one {}",
                    name.len()
                ),
            ));
        }
        if name.starts_with(VALUE_PREFIX) {
            if !values.contains(&name.as_str()) {
                values.push(name);
            }
            continue;
        }
        let mut found = false;
        for (hook, chosen) in info.hooks.iter().zip(&mut chosen) {
            if means(name, hook) {
                found = true;
                *chosen |= within(hook, layers);
            }
        }
        if !found {
            return Err(lacking(info, name, here));
        }
    }
    let hooks = info.hooks.iter().zip(chosen).filter(|(_, c)| *c);
    let points: Vec<Point<'_>> = hooks
        .map(|(h, _)| Point::Hook(h))
        .chain(values.into_iter().map(Point::Value))
        .collect();
    if points.is_empty() && !names.is_empty() {
        return Err(EngineError::invalid(
            format!("{field}.layers"),
            "none of the hook points lies in these layers",
        ));
    }
    Ok(points)
}

fn within(hook: &HookInfo, layers: &[u32]) -> bool {
    layers.is_empty()
        || hook
            .layer
            .is_none_or(|l| layers.iter().any(|w| *w as usize == l))
}

/// Whether a name that a caller wrote means this hook point.
fn means(name: &str, hook: &HookInfo) -> bool {
    if name.contains('*') {
        return glob(name, &hook.name) || hook.aliases.iter().any(|a| glob(name, a));
    }
    hook.name == name || hook.aliases.iter().any(|a| a == name) || is_kind(name, &hook.name)
}

/// Last part of a canonical name: `hook_pattern` of `blocks.0.attn.hook_pattern`.
fn kind(canonical: &str) -> &str {
    canonical.rsplit('.').next().unwrap_or(canonical)
}

/// `hook_z`, `z` and `attn.hook_z` mean `blocks.0.attn.hook_z`, in every layer.
fn is_kind(name: &str, canonical: &str) -> bool {
    let kind = kind(canonical);
    let of_block = canonical
        .strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'))
        .map(|(_, place)| place);
    kind == name || kind.strip_prefix("hook_") == Some(name) || of_block == Some(name)
}

/// `*` stands for any run of characters.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

/// Why a name means none of the model's hook points.
fn lacking(info: &ModelInfo, name: &str, field: String) -> EngineError {
    let missing = info.missing.iter().find(|m| {
        m.hook == name
            || glob(&m.hook, name)
            || (name.contains('*') && glob(name, &m.hook))
            || is_kind(name, &m.hook)
    });
    if let Some(missing) = missing {
        return EngineError::precondition(format!(
            "model \"{}\" has no \"{name}\": {}",
            info.name, missing.reason
        ));
    }
    let mut kinds: Vec<&str> = info
        .hooks
        .iter()
        .map(|h| kind(&h.name).trim_start_matches("hook_"))
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    EngineError::invalid(
        field,
        format!(
            "\"{name}\" is no hook point of model \"{}\" ({} layers; kinds: {}): see ModelService.GetModel or `introspectd inspect`",
            info.name,
            info.dims.layers,
            kinds.join(", ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::testing::info;

    fn found<'a>(info: &'a ModelInfo, names: &'a [String], layers: &[u32]) -> Vec<&'a str> {
        let points = points(info, names, layers, "selection").unwrap();
        points
            .into_iter()
            .map(|p| match p {
                Point::Hook(h) => h.name.as_str(),
                Point::Value(v) => v,
            })
            .collect()
    }

    fn field_of(error: &EngineError) -> Option<&str> {
        if let EngineError::InvalidArgument { field, .. } = error {
            return Some(field);
        }
        None
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn every_way_to_name_a_point_means_the_same() {
        let info = info();
        for name in [
            "blocks.1.attn.hook_pattern",
            "attentions.1",
            "blocks.1.attn.*pattern",
            "*s.1.attn.hook_p*n",
        ] {
            let names = names(&[name]);
            assert_eq!(
                found(&info, &names, &[]),
                ["blocks.1.attn.hook_pattern"],
                "{name}"
            );
        }
        for name in [
            "pattern",
            "hook_pattern",
            "attentions.*",
            "blocks.*.attn.hook_pattern",
        ] {
            let names = names(&[name]);
            let both = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"];
            assert_eq!(found(&info, &names, &[]), both, "{name}");
        }
    }

    #[test]
    fn points_come_once_in_the_order_of_the_graph_and_values_last() {
        let info = info();
        let names = names(&[
            "value:/x",
            "pattern",
            "hook_embed",
            "attentions.0",
            "value:/x",
        ]);
        assert_eq!(
            found(&info, &names, &[1]),
            ["hook_embed", "blocks.1.attn.hook_pattern", "value:/x"],
            "a layer keeps what belongs to no layer"
        );
    }

    #[test]
    fn what_the_model_lacks_is_told_apart_from_what_means_nothing() {
        let info = info();
        for name in [
            "blocks.0.hook_resid_mid",
            "resid_mid",
            "blocks.*.hook_resid_mid",
            "hook_resid_mid",
        ] {
            let names = names(&[name]);
            let error = points(&info, &names, &[], "selection").unwrap_err();
            assert!(
                matches!(error, EngineError::FailedPrecondition { .. }),
                "{name}: {error}"
            );
            assert!(error.to_string().contains("parallel"), "{error}");
        }
        for name in ["nothing", "attentions.2", "", "nothing*", "blocks"] {
            let names = names(&[name]);
            let error = points(&info, &names, &[], "selection").unwrap_err();
            assert_eq!(
                field_of(&error),
                Some("selection.hooks[0]"),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn layers_are_checked() {
        let info = info();
        let all = names(&["pattern"]);
        let error = points(&info, &all, &[0, 2], "selection").unwrap_err();
        assert_eq!(field_of(&error), Some("selection.layers[1]"));
        let one = names(&["attentions.0"]);
        assert!(
            points(&info, &one, &[1], "selection").is_err(),
            "nothing is left"
        );
    }
}
