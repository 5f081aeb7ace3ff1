//! Windows that slide over the input, as Captum's `Occlusion`: a feature's score is the mean over the windows that cover it of
//! `F(x) - F(x with the window replaced by the baseline)`.
//!
//! A window of `w` features moves by `s <= w`, `ceil((n - w) / s) + 1` of them; the last one is cut where the input ends. Of images, a window
//! is a square that slides over both axes and covers every channel.

use std::ops::Range;

use super::{
    Attributed, Cost, Explanation, Extent,
    game::{Coalition, Game},
};
use crate::engine::EngineError;

/// Options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occlusion {
    /// Features, or pixels along an edge; 3 or 8 unless said.
    pub window: Option<usize>,
    /// From window to window; 1, or half a window of pixels, unless said.
    pub stride: Option<usize>,
}

impl Occlusion {
    fn sizes(self, image: bool) -> (usize, usize) {
        let window = self.window.unwrap_or(if image { 8 } else { 3 });
        let stride = self
            .stride
            .unwrap_or(if image { window.div_ceil(2) } else { 1 });
        (window, stride)
    }

    pub(super) fn cost(self, features: usize, extent: Extent) -> Cost {
        let (window, stride) = self.sizes(extent.image.is_some());
        match extent.image {
            Some([_, height, width]) => {
                let count = |n| windows(n, window, stride).len();
                Cost::forward(count(height) * count(width))
            }
            None => Cost::forward(windows(features, window, stride).len()).at_most(),
        }
    }
}

/// What windows cover, along one axis.
fn windows(n: usize, window: usize, stride: usize) -> Vec<Range<usize>> {
    if n == 0 || window == 0 || stride == 0 {
        return Vec::new();
    }
    let window = window.min(n);
    let count = (n - window).div_ceil(stride) + 1;
    (0..count)
        .map(|k| k * stride..n.min(k * stride + window))
        .collect()
}

pub(super) async fn run(
    options: &Occlusion,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let game = Game::new(e.compared()?, &e.features)?;
    let players = game.players();
    let image = super::image_of(&e.subject);
    let (window, stride) = options.sizes(image.is_some());
    let covers: Vec<Vec<usize>> = match image {
        None => {
            let along = windows(players, window, stride).into_iter();
            along.map(Iterator::collect).collect()
        }
        Some(shape) => {
            let [channels, height, width] = shape[..] else {
                return Err(EngineError::precondition(format!(
                    "windows slide over images of channel, height and width: the input has the extents {shape:?}"
                )));
            };
            squares([channels, height, width], window, stride)
        }
    };
    let mut covered = vec![0.0; players];
    for cover in &covers {
        for player in cover {
            covered[*player] += 1.0;
        }
    }
    let coalitions: Vec<Coalition> = covers
        .iter()
        .map(|cover| {
            let mut there = vec![true; players];
            for player in cover {
                there[*player] = false;
            }
            there
        })
        .collect();
    let mut sums = vec![0.0; players];
    let value = e.value;
    game.play(&mut e.subject, &coalitions, |subject, row, without| {
        for player in &covers[row] {
            sums[*player] += (value - without) / f64::max(covered[*player], 1.0);
        }
        subject.report(game.scores(&sums), None);
    })
    .await?;
    Ok(Attributed {
        scores: game.scores(&sums),
        convention: format!(
            "mean of F(x) - F(x with a window replaced) over the windows that cover the feature, window {window}, stride {stride}"
        ),
        ..Attributed::default()
    })
}

/// The numbers that each square window covers.
fn squares([channels, height, width]: [usize; 3], window: usize, stride: usize) -> Vec<Vec<usize>> {
    let mut covers = Vec::new();
    for rows in windows(height, window, stride) {
        for columns in windows(width, window, stride) {
            let mut cover = Vec::with_capacity(channels * rows.len() * columns.len());
            for channel in 0..channels {
                for y in rows.clone() {
                    let row = (channel * height + y) * width;
                    cover.extend(row + columns.start..row + columns.end);
                }
            }
            covers.push(cover);
        }
    }
    covers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_window_is_cut_where_the_input_ends() {
        assert_eq!(windows(5, 3, 1), [0..3, 1..4, 2..5]);
        assert_eq!(windows(10, 4, 4), [0..4, 4..8, 8..10]);
        assert_eq!(windows(3, 9, 2), vec![0..3]);
    }

    proptest! {
        #[test]
        fn windows_cover_everything(n in 1usize..60, window in 1usize..60, stride in 1usize..60) {
            let window = window.min(n);
            let stride = stride.min(window);
            let all = windows(n, window, stride);
            prop_assert_eq!(all.len(), (n - window).div_ceil(stride) + 1);
            for at in 0..n {
                prop_assert!(all.iter().any(|w| w.contains(&at)));
            }
        }

        #[test]
        fn squares_cover_every_channel_alike(h in 1usize..9, w in 1usize..9, window in 1usize..5) {
            let covers = squares([2, h, w], window, 1);
            for cover in covers {
                let first: Vec<usize> = cover.iter().copied().filter(|i| *i < h * w).collect();
                let second: Vec<usize> = cover.iter().filter(|i| **i >= h * w).map(|i| i - h * w).collect();
                prop_assert_eq!(first, second);
            }
        }
    }
}
