//! L-BFGS (Nocedal and Wright 2006, algorithms 7.4 and 7.5) with a line search for the weak Wolfe conditions by bisection.

/// Corrections that are remembered.
const MEMORY: usize = 10;
/// Of the Wolfe conditions.
const DECREASE: f64 = 1e-4;
const CURVATURE: f64 = 0.9;
/// Trials of a line search.
const TRIALS: usize = 40;
/// Of a value, what rounding may hide: nearer than that to the end, the slope tells of a decrease (Hager and Zhang 2005).
const HIDDEN: f64 = 8.0 * f64::EPSILON;

/// Vectors of the length of the point that a minimisation holds at its most.
pub const VECTORS: usize = 2 * MEMORY + 8;

/// Where a minimisation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Minimum {
    /// The point.
    pub x: Vec<f64>,
    /// Steps that were made.
    pub iterations: usize,
    /// Whether the gradient fell below the tolerance.
    pub converged: bool,
}

/// When a minimisation ends.
#[derive(Clone, Copy, Debug)]
pub struct Until {
    /// Greatest entry of the gradient.
    pub tolerance: f64,
    /// Steps.
    pub iterations: usize,
}

/// Minimises a function that gives its value and writes its gradient. Asked to stop, it ends where it is.
pub fn minimise(
    mut f: impl FnMut(&[f64], &mut [f64]) -> f64,
    mut x: Vec<f64>,
    until: Until,
    stop: &dyn Fn() -> bool,
) -> Minimum {
    let n = x.len();
    let mut gradient = vec![0.0; n];
    let mut value = f(&x, &mut gradient);
    let mut steps: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::with_capacity(MEMORY);
    let mut iterations = 0;
    let small = |g: &[f64]| g.iter().all(|v| v.abs() <= until.tolerance);
    while iterations < until.iterations && !small(&gradient) && !stop() {
        let mut direction = descent(&gradient, &steps);
        let mut slope = dot(&direction, &gradient);
        if slope >= 0.0 {
            // Rounding spoiled the memory: begin anew.
            steps.clear();
            direction = gradient.iter().map(|g| -g).collect();
            slope = -dot(&gradient, &gradient);
        }
        let first = if steps.is_empty() {
            1.0 / dot(&gradient, &gradient).sqrt().max(1.0)
        } else {
            1.0
        };
        let line = Line {
            x: &x,
            direction: &direction,
            value,
            slope,
        };
        let Some((next, next_value, next_gradient)) = line.search(&mut f, first) else {
            // No step makes it smaller: this is as far as doubles go.
            break;
        };
        let moved: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        let turned: Vec<f64> = next_gradient
            .iter()
            .zip(&gradient)
            .map(|(a, b)| a - b)
            .collect();
        let curvature = dot(&moved, &turned);
        if curvature > f64::EPSILON * dot(&turned, &turned) {
            if steps.len() == MEMORY {
                steps.remove(0);
            }
            steps.push((moved, turned, curvature));
        }
        (x, value, gradient) = (next, next_value, next_gradient);
        iterations += 1;
    }
    Minimum {
        converged: small(&gradient),
        x,
        iterations,
    }
}

/// The two loops: minus the gradient times the inverse Hessian, as remembered.
fn descent(gradient: &[f64], steps: &[(Vec<f64>, Vec<f64>, f64)]) -> Vec<f64> {
    let mut q = gradient.to_vec();
    let mut shares = Vec::with_capacity(steps.len());
    for (moved, turned, curvature) in steps.iter().rev() {
        let share = dot(moved, &q) / curvature;
        add(&mut q, turned, -share);
        shares.push(share);
    }
    if let Some((_, turned, curvature)) = steps.last() {
        let scale = curvature / dot(turned, turned);
        q.iter_mut().for_each(|v| *v *= scale);
    }
    for ((moved, turned, curvature), share) in steps.iter().zip(shares.into_iter().rev()) {
        let back = dot(turned, &q) / curvature;
        add(&mut q, moved, share - back);
    }
    q.iter_mut().for_each(|v| *v = -*v);
    q
}

struct Line<'a> {
    x: &'a [f64],
    direction: &'a [f64],
    value: f64,
    slope: f64,
}

impl Line<'_> {
    /// A point that is low enough and less steep, with value and gradient.
    fn search(
        &self,
        f: &mut impl FnMut(&[f64], &mut [f64]) -> f64,
        mut step: f64,
    ) -> Option<(Vec<f64>, f64, Vec<f64>)> {
        let (mut low, mut high) = (0.0, f64::INFINITY);
        let mut best = None;
        for _ in 0..TRIALS {
            let at: Vec<f64> = self
                .x
                .iter()
                .zip(self.direction)
                .map(|(x, d)| x + step * d)
                .collect();
            let mut gradient = vec![0.0; at.len()];
            let value = f(&at, &mut gradient);
            let along = dot(&gradient, self.direction);
            let hidden = (value - self.value).abs() <= HIDDEN * self.value.abs()
                && along.abs() <= -CURVATURE * self.slope;
            let low_enough = hidden || value <= self.value + DECREASE * step * self.slope;
            if !low_enough || !value.is_finite() {
                high = step;
            } else if along < CURVATURE * self.slope {
                low = step;
                best = Some((at, value, gradient));
            } else {
                return Some((at, value, gradient));
            }
            step = if high.is_finite() {
                (low + high) / 2.0
            } else {
                2.0 * step
            };
        }
        best
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &mut [f64], b: &[f64], factor: f64) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += factor * b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNTIL: Until = Until {
        tolerance: 1e-9,
        iterations: 500,
    };

    #[test]
    fn the_valley_of_rosenbrock_is_walked_to_its_end() {
        let f = |x: &[f64], g: &mut [f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            g[0] = -2.0 * a - 400.0 * x[0] * b;
            g[1] = 200.0 * b;
            a * a + 100.0 * b * b
        };
        let found = minimise(f, vec![-1.2, 1.0], UNTIL, &|| false);
        assert!(found.converged, "{found:?}");
        assert!(found.x.iter().all(|v| (v - 1.0).abs() < 1e-7), "{found:?}");
    }

    #[test]
    fn asked_to_stop_it_stops() {
        let f = |x: &[f64], g: &mut [f64]| {
            g[0] = 2.0 * x[0];
            x[0] * x[0]
        };
        let found = minimise(f, vec![3.0], UNTIL, &|| true);
        assert_eq!((found.iterations, found.converged), (0, false));
    }
}
