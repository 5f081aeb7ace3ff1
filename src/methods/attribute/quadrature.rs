//! Rules of integration over [0, 1]: where to look, and how much each look counts.

use std::f64::consts::PI;

/// A rule. The names are Captum's where it has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quadrature {
    /// Gauss-Legendre: exact for polynomials of degree `2 n - 1`.
    #[default]
    GaussLegendre,
    /// `alpha` from 0 to `1 - 1/n`, `w = 1/n`.
    RiemannLeft,
    /// `alpha` from `1/2n` to `1 - 1/2n`, `w = 1/n`.
    RiemannMiddle,
    /// `alpha` from `1/n` to 1, `w = 1/n`.
    RiemannRight,
    /// `alpha` from 0 to 1, `w = 1/(n-1)`, half of it at both ends.
    Trapezoid,
    /// The same points with `w = 1/n`, half of it at both ends, so that the weights sum to `(n-1)/n`: what Captum calls
    /// `riemann_trapezoid`.
    CaptumTrapezoid,
}

/// A point of a path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Part of the way from the baseline to the input.
    pub alpha: f64,
    /// Weight.
    pub weight: f64,
}

impl Quadrature {
    /// The rule's name, as answers tell it.
    pub const fn name(self) -> &'static str {
        match self {
            Quadrature::GaussLegendre => "gauss_legendre",
            Quadrature::RiemannLeft => "riemann_left",
            Quadrature::RiemannMiddle => "riemann_middle",
            Quadrature::RiemannRight => "riemann_right",
            Quadrature::Trapezoid => "trapezoid",
            Quadrature::CaptumTrapezoid => "captum_trapezoid",
        }
    }

    /// The rule of `n` points, in the order of the path. The trapezoid rules have at least two.
    pub fn nodes(self, n: usize) -> Vec<Node> {
        let n = match self {
            Quadrature::Trapezoid | Quadrature::CaptumTrapezoid => n.max(2),
            Quadrature::GaussLegendre
            | Quadrature::RiemannLeft
            | Quadrature::RiemannMiddle
            | Quadrature::RiemannRight => n.max(1),
        };
        let count = n as f64;
        let even = |offset: f64| {
            (0..n)
                .map(|k| Node {
                    alpha: (k as f64 + offset) / count,
                    weight: 1.0 / count,
                })
                .collect()
        };
        let ends = |weight: f64| {
            (0..n)
                .map(|k| Node {
                    alpha: k as f64 / (count - 1.0),
                    weight: if k == 0 || k == n - 1 {
                        weight / 2.0
                    } else {
                        weight
                    },
                })
                .collect()
        };
        match self {
            Quadrature::GaussLegendre => gauss_legendre(n),
            Quadrature::RiemannLeft => even(0.0),
            Quadrature::RiemannMiddle => even(0.5),
            Quadrature::RiemannRight => even(1.0),
            Quadrature::Trapezoid => ends(1.0 / (count - 1.0)),
            Quadrature::CaptumTrapezoid => ends(1.0 / count),
        }
    }
}

/// Nodes by Newton's method on the Legendre polynomial, from Chebyshev's guess; weights `2 / ((1 - x^2) P'(x)^2)`, both halved for an
/// interval of length one.
fn gauss_legendre(n: usize) -> Vec<Node> {
    let mut nodes: Vec<Node> = (0..n)
        .map(|k| {
            let mut x = (PI * (k as f64 + 0.75) / (n as f64 + 0.5)).cos();
            let mut slope = 1.0;
            for _ in 0..100 {
                let (value, derivative) = legendre(n, x);
                slope = derivative;
                let step = value / derivative;
                x -= step;
                if step.abs() < 1e-15 {
                    break;
                }
            }
            Node {
                alpha: f64::midpoint(1.0, x),
                weight: 1.0 / ((1.0 - x * x) * slope * slope),
            }
        })
        .collect();
    nodes.reverse();
    nodes
}

/// The Legendre polynomial of degree `n` and its derivative, by recurrence.
fn legendre(n: usize, x: f64) -> (f64, f64) {
    let (mut before, mut value) = (1.0, x);
    for k in 2..=n {
        let k = k as f64;
        let next = ((2.0 * k - 1.0) * x * value - (k - 1.0) * before) / k;
        (before, value) = (value, next);
    }
    (value, n as f64 * (x * value - before) / (x * x - 1.0))
}

/// The Clenshaw-Curtis rule of `n + 1` points, `n` even, at `(1 - cos(k pi / n)) / 2`: the points of `n` are every other one of `2 n`,
/// so that a rule is refined without losing what was computed.
pub fn clenshaw_curtis(n: usize) -> Vec<Node> {
    let n = n.max(2) & !1;
    let count = n as f64;
    (0..=n)
        .map(|k| {
            let angle = PI * k as f64 / count;
            let mut sum = 1.0;
            for j in 1..=n / 2 {
                let b = if j == n / 2 { 1.0 } else { 2.0 };
                let j = j as f64;
                sum -= b / (4.0 * j * j - 1.0) * (2.0 * j * angle).cos();
            }
            let c = if k == 0 || k == n { 1.0 } else { 2.0 };
            Node {
                alpha: (1.0 - angle.cos()) / 2.0,
                weight: c * sum / count / 2.0,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUNDING: f64 = 1e-12;

    const ALL: [Quadrature; 6] = [
        Quadrature::GaussLegendre,
        Quadrature::RiemannLeft,
        Quadrature::RiemannMiddle,
        Quadrature::RiemannRight,
        Quadrature::Trapezoid,
        Quadrature::CaptumTrapezoid,
    ];

    fn integral(nodes: &[Node], f: impl Fn(f64) -> f64) -> f64 {
        nodes.iter().map(|n| n.weight * f(n.alpha)).sum()
    }

    #[test]
    fn the_first_of_fifty_points_is_where_numpy_puts_it() {
        // (1 + numpy.polynomial.legendre.leggauss(50)[0][0]) / 2, and half of its weight
        let nodes = Quadrature::GaussLegendre.nodes(50);
        assert!((nodes[0].alpha - 5.667_977_899_644_91e-4).abs() < ROUNDING);
        assert!((nodes[0].weight - 1.454_311_276_578_963_3e-3).abs() < ROUNDING);
    }

    #[test]
    fn what_captum_calls_trapezoid_sums_to_less_than_one() {
        let sum = integral(&Quadrature::CaptumTrapezoid.nodes(20), |_| 1.0);
        assert!((sum - 19.0 / 20.0).abs() < ROUNDING);
    }

    #[test]
    fn a_refined_rule_keeps_its_points() {
        let (coarse, fine) = (clenshaw_curtis(4), clenshaw_curtis(8));
        for (k, node) in coarse.iter().enumerate() {
            assert!((node.alpha - fine[2 * k].alpha).abs() < ROUNDING);
        }
    }

    proptest! {
        #[test]
        fn weights_sum_to_one_and_points_lie_on_the_path_in_order(n in 2usize..200) {
            for rule in ALL {
                let nodes = rule.nodes(n);
                prop_assert_eq!(nodes.len(), n);
                prop_assert!(nodes.windows(2).all(|w| w[0].alpha < w[1].alpha));
                prop_assert!(nodes.iter().all(|n| (0.0..=1.0).contains(&n.alpha)));
                if rule != Quadrature::CaptumTrapezoid {
                    prop_assert!((integral(&nodes, |_| 1.0) - 1.0).abs() < 1e-10);
                }
            }
            prop_assert!((integral(&clenshaw_curtis(n), |_| 1.0) - 1.0).abs() < 1e-10);
        }

        #[test]
        fn gauss_legendre_is_exact_for_polynomials(n in 1usize..40, degree in 0i32..79) {
            prop_assume!(degree < 2 * n as i32);
            let found = integral(&Quadrature::GaussLegendre.nodes(n), |x| x.powi(degree));
            prop_assert!((found - 1.0 / f64::from(degree + 1)).abs() < 1e-10);
        }

        #[test]
        fn clenshaw_curtis_is_exact_for_polynomials(half in 1usize..20, degree in 0i32..40) {
            prop_assume!(degree <= 2 * half as i32);
            let found = integral(&clenshaw_curtis(2 * half), |x| x.powi(degree));
            prop_assert!((found - 1.0 / f64::from(degree + 1)).abs() < 1e-10);
        }
    }
}
