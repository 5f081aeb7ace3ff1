//! Probes: small models that read a property off a hook point (Alain and Bengio 2017; Belinkov 2022).
//!
//! ```text
//!   examples ─▶ extract: a run each, all hook points ─▶ matrices ─▶ judge: fit, held-out rows, control task ─▶ card + weights ─▶ store
//!   input ────▶ score: one run, early exit ─▶ scorer, for each probe that is asked
//! ```
//!
//! - [`train`] puts a training together; [`fit`] has every kind of probe, [`judge`] and [`metrics`] what is said of it, [`direction`] what is judged by nothing;
//! - [`store`] keeps probes on the disk as [`card`] and weights, [`ready`] keeps those that are used in memory;
//! - [`score`] runs inputs, [`scorer`] does the arithmetic.

pub mod card;
pub mod direction;
pub mod extract;
pub mod fit;
pub mod judge;
pub mod matrices;
pub mod metrics;
pub mod ready;
pub mod score;
pub mod scorer;
pub mod split;
pub mod store;
pub mod train;
