//! Explanations as messages.

use crate::{
    engine::EngineError,
    ipc::spec::Quantity,
    methods::{
        Partial, Spent,
        attribute::{self, Attributed, Evaluated, Features, Started},
        target,
    },
    service::{messages::Pieces, to_proto, wire::introspect as pb},
    tensor::Tensor,
};

/// Partial answers above so many numbers are not sent: images.
const MOST_PARTIAL: usize = 65_536;

pub(super) fn header(started: &Started) -> pb::AttributionHeader {
    let info = started.handle().info();
    pb::AttributionHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: started.handle().generation(),
        provider: info.provider.clone(),
        method: started.method().to_owned(),
        tokens: started
            .tokens
            .iter()
            .cloned()
            .map(to_proto::token)
            .collect(),
        features: started
            .features
            .listed()
            .iter()
            .map(|f| feature(f, &started.texts))
            .collect(),
        terms: started.objective.terms.iter().map(term).collect(),
        quantity: quantity(started.objective.quantity).into(),
        value: started.value,
        cost: Some(planned(started)),
        site: started.site.clone(),
        baseline: started.baseline.to_owned(),
    }
}

/// What an explanation will take, the row that was run included.
pub(super) fn planned(started: &Started) -> pb::Cost {
    let cost = &started.cost;
    let tokens = started.tokens.len().max(1) as u64;
    pb::Cost {
        forward_rows: cost.forward_rows as u64,
        gradient_rows: cost.gradient_rows as u64,
        tokens: tokens.saturating_mul(cost.rows() as u64),
        at_most: cost.at_most,
    }
}

fn spent(spent: &Spent) -> pb::Cost {
    pb::Cost {
        forward_rows: spent.forward_rows,
        gradient_rows: spent.gradient_rows,
        tokens: spent.tokens,
        at_most: false,
    }
}

fn feature(feature: &attribute::features::Feature, texts: &[String]) -> pb::Feature {
    let text = texts.get(feature.sequence as usize);
    let span = feature.span.0 as usize..feature.span.1 as usize;
    let at = |n: &usize| u32::try_from(*n).unwrap_or(u32::MAX);
    pb::Feature {
        text: text
            .and_then(|t| t.get(span))
            .unwrap_or_default()
            .to_owned(),
        start: feature.span.0,
        end: feature.span.1,
        sequence: feature.sequence,
        tokens: feature.tokens.iter().map(at).collect(),
    }
}

pub(in crate::service) fn term(term: &target::Term) -> pb::Term {
    pb::Term {
        index: term.label,
        label: term.name.clone(),
        position: term.position,
        weight: f64::from(term.weight),
    }
}

pub(in crate::service) const fn quantity(quantity: Quantity) -> pb::Quantity {
    match quantity {
        Quantity::Logit => pb::Quantity::Logit,
        Quantity::LogProbability => pb::Quantity::LogProbability,
        Quantity::Probability => pb::Quantity::Probability,
        Quantity::Readout => pb::Quantity::Readout,
        Quantity::Divergence => pb::Quantity::Divergence,
    }
}

pub(super) fn progress(partial: &Partial, elapsed: std::time::Duration) -> pb::AttributionProgress {
    let some = !partial.scores.is_empty() && partial.scores.len() <= MOST_PARTIAL;
    let tensor = some.then(|| floats(vec![partial.scores.len()], &partial.scores));
    pb::AttributionProgress {
        rows_done: partial.rows_done,
        rows_planned: partial.rows_planned.max(partial.rows_done),
        elapsed_seconds: elapsed.as_secs_f64(),
        partial: tensor.and_then(|t| {
            let name = "attributions".to_owned();
            Pieces::new(name, vec!["feature".to_owned()], t.ok()?).next()
        }),
        error: partial.error,
    }
}

pub(super) fn result(attributed: &Attributed) -> pb::AttributionResult {
    pb::AttributionResult {
        method: attributed.method.to_owned(),
        value: attributed.value,
        baseline_value: attributed.baseline_value,
        delta: attributed.delta,
        residual_ratio: attributed.residual_ratio(),
        error: attributed.error(),
        error_kind: if attributed.errors.is_some() {
            attributed.error_kind.to_owned()
        } else {
            String::new()
        },
        seed: attributed.seed,
        site: attributed.site.clone(),
        precision: attributed.precision.clone(),
        cost: Some(spent(&attributed.spent)),
        convention: attributed.convention.clone(),
        steps: attributed.steps.and_then(|s| u32::try_from(s).ok()),
        exact: attributed.exact,
    }
}

/// The tensors of an answer, whole.
pub(super) fn tensors(
    attributed: &Attributed,
    features: &Features,
) -> Result<Vec<Pieces>, EngineError> {
    let shape = || attributed.shape.clone();
    let axes = attributed.axes(features);
    let mut all = vec![Pieces::new(
        "attributions".to_owned(),
        axes.clone(),
        floats(shape(), &attributed.scores)?,
    )];
    if let Some(errors) = &attributed.errors {
        all.push(Pieces::new(
            "error".to_owned(),
            axes,
            floats(shape(), errors)?,
        ));
    }
    for extra in &attributed.extras {
        let axes = extra.axes.iter().map(|a| (*a).to_owned()).collect();
        all.push(Pieces::new(
            extra.name.to_owned(),
            axes,
            extra.tensor.clone(),
        ));
    }
    Ok(all)
}

/// Numbers as they are sent: in single precision, as the models compute them.
pub(in crate::service) fn floats(shape: Vec<usize>, values: &[f64]) -> Result<Tensor, EngineError> {
    #[allow(clippy::cast_possible_truncation)] // what the model computes is no more exact
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_f32(shape, &values).map_err(EngineError::internal)
}

pub(super) fn evaluation(
    at: usize,
    evaluated: &Evaluated,
    features: &Features,
) -> Result<pb::Evaluation, EngineError> {
    let fractions = attribute::evaluate::FRACTIONS
        .iter()
        .zip(&evaluated.effects);
    let effect =
        |(fraction, (comprehensiveness, sufficiency)): (&f64, &(f64, f64))| pb::FractionEffect {
            fraction: *fraction,
            comprehensiveness: *comprehensiveness,
            sufficiency: *sufficiency,
        };
    let attributions = tensors(&evaluated.attributed, features)?;
    Ok(pb::Evaluation {
        index: u32::try_from(at).unwrap_or(u32::MAX),
        result: Some(result(&evaluated.attributed)),
        attributions: attributions.into_iter().next().and_then(|mut t| t.next()),
        infidelity: evaluated.infidelity,
        infidelity_scaled: evaluated.infidelity_scaled,
        sensitivity_max: evaluated.sensitivity_max,
        comprehensiveness: evaluated.comprehensiveness(),
        sufficiency: evaluated.sufficiency(),
        fractions: fractions.map(effect).collect(),
    })
}
