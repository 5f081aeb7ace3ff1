//! What reaches the input in one run backwards: saliency (Simonyan et al. 2013), input x gradient (Shrikumar et al. 2016), and relevance
//! (AttnLRP, Achtibat et al. 2024).
//!
//! ```text
//!   saliency:          sum |dF/dx|, or its L2 norm, or its sum      as Captum's `Saliency`
//!   input x gradient:  sum x dF/dx                                  as Captum's `InputXGradient`
//!   relevance:         sum x r, where r is handed on by the rules of AttnLRP in the place of the gradient, as the authors' `lxt`
//! ```

use super::{
    Attributed, Explanation,
    site::{How, Site},
};
use crate::engine::EngineError;

/// From a gradient of many dimensions to one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Norm {
    /// The sum of absolute values.
    #[default]
    L1,
    /// The square root of the sum of squares.
    L2,
    /// The sum, with its sign.
    Sum,
}

/// Options of saliency.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saliency {
    /// How the width becomes one number.
    pub norm: Norm,
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

/// Options of input x gradient.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputXGradient {
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

/// Options of relevance propagation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttnLrp {
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

pub(super) async fn saliency(
    options: &Saliency,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let (how, convention) = match options.norm {
        Norm::L1 => (
            How::AbsoluteSum,
            "absolute gradient, summed over the width of the site",
        ),
        Norm::L2 => (
            How::L2,
            "length of the gradient (L2) over the width of the site",
        ),
        Norm::Sum => (How::Sum, "gradient, summed over the width of the site"),
    };
    at_input(options.site.as_deref(), how, convention, e).await
}

pub(super) async fn input_x_gradient(
    options: &InputXGradient,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let convention = "input times gradient, summed over the width of the site";
    at_input(options.site.as_deref(), How::TimesValue, convention, e).await
}

pub(super) async fn attn_lrp(
    options: &AttnLrp,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let convention =
        "relevance by the rules of AttnLRP, epsilon zero, summed over the width of the site";
    at_input(options.site.as_deref(), How::Relevance, convention, e).await
}

async fn at_input(
    site: Option<&str>,
    how: How,
    convention: &str,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let site = Site::open(&mut e.subject, site).await?;
    let mut numbers = Vec::new();
    site.gradients(
        &mut e.subject,
        (1, how),
        |_| site.rest(),
        |_, _, found, _| numbers = found.to_vec(),
    )
    .await?;
    Ok(Attributed {
        scores: e.features_of(site.units).sums(&numbers),
        site: site.name.clone(),
        convention: convention.to_owned(),
        ..Attributed::default()
    })
}
