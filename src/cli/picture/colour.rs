//! The colour scale: dark violet over teal to yellow, evenly spaced to the eye and readable without colour vision.
//!
//! Stops sampled from the public-domain (CC0) *viridis* map of van der Walt and Smith (2015).

/// Red, green, blue.
pub type Rgb = [u8; 3];

const STOPS: [Rgb; 9] = [
    [68, 1, 84],
    [71, 44, 122],
    [59, 81, 139],
    [44, 113, 142],
    [33, 144, 141],
    [39, 173, 129],
    [92, 200, 99],
    [170, 220, 50],
    [253, 231, 37],
];

/// Colour of a weight; values outside [0, 1] take the end colours, NaN is grey.
pub fn scale(weight: f32) -> Rgb {
    if weight.is_nan() {
        return [128, 128, 128];
    }
    let last = STOPS.len() - 1;
    let place = weight.clamp(0.0, 1.0) * last as f32;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // in [0, last]
    let below = (place as usize).min(last - 1);
    let part = place - below as f32;
    std::array::from_fn(|c| {
        let (a, b) = (f32::from(STOPS[below][c]), f32::from(STOPS[below + 1][c]));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between two bytes
        let byte = (a + (b - a) * part).round() as u8;
        byte
    })
}

/// Colour of a signed part of the greatest: blue at -1, white at 0, red at 1; NaN is grey. Both ends are as dark, and told apart without
/// colour vision of red and green.
pub fn diverging(part: f32) -> Rgb {
    const AGAINST: Rgb = [67, 147, 195];
    const FOR: Rgb = [214, 96, 77];
    if part.is_nan() {
        return [128, 128, 128];
    }
    let end = if part < 0.0 { AGAINST } else { FOR };
    let part = part.abs().min(1.0);
    end.map(|c| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between two bytes
        let byte = (255.0 + (f32::from(c) - 255.0) * part).round() as u8;
        byte
    })
}

/// A CSS gradient of the scale, for pages.
pub fn css_stops() -> String {
    STOPS
        .iter()
        .map(|[r, g, b]| format!("[{r},{g},{b}]"))
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_the_end_stops() {
        assert_eq!(scale(0.0), STOPS[0]);
        assert_eq!(scale(1.0), STOPS[8]);
        assert_eq!(scale(-3.0), STOPS[0]);
        assert_eq!(scale(f32::INFINITY), STOPS[8]);
    }

    #[test]
    fn signs_have_colours_and_nothing_is_white() {
        assert_eq!(diverging(0.0), [255; 3]);
        assert!(diverging(1.0)[0] > diverging(1.0)[2]);
        assert!(diverging(-1.0)[2] > diverging(-1.0)[0]);
        assert_eq!(diverging(5.0), diverging(1.0));
    }

    #[test]
    fn brightness_grows_with_the_weight() {
        let light = |w: f32| {
            let [r, g, b] = scale(w);
            0.299 * f32::from(r) + 0.587 * f32::from(g) + 0.114 * f32::from(b)
        };
        for step in 0..20 {
            let w = step as f32 / 20.0;
            assert!(light(w + 0.05) > light(w), "at {w}");
        }
    }
}
