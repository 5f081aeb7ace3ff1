//! A bitmap to draw rectangles and short ASCII labels on.

use std::convert::Infallible;

use embedded_graphics::{
    mono_font::{MonoTextStyle, iso_8859_1::FONT_6X10},
    pixelcolor::BinaryColor,
    prelude::*,
    text::{Baseline, Text},
};

use super::colour::Rgb;

/// Width of a character of the one font in pixels.
pub const CHAR_WIDTH: usize = 6;
/// Height of a character in pixels.
pub const CHAR_HEIGHT: usize = 10;

/// Pixels, row-major, white at first.
#[derive(Clone, Debug)]
pub struct Canvas {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    pixels: Vec<Rgb>,
}

/// Which way a label runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Left to right.
    Across,
    /// Top to bottom, turned a quarter clockwise.
    Down,
}

impl Canvas {
    /// A white canvas.
    pub fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            pixels: vec![[255; 3]; width * height],
        }
    }

    /// The pixels as bytes: red, green, blue for each.
    pub fn rgb(&self) -> &[u8] {
        self.pixels.as_flattened()
    }

    /// Colour of a pixel that lies on the canvas.
    pub fn pixel(&self, x: usize, y: usize) -> Option<Rgb> {
        (x < self.width).then(|| self.pixels.get(y * self.width + x).copied())?
    }

    /// Fills a rectangle; what lies outside the canvas is left out.
    pub fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Rgb) {
        for row in y..(y + height).min(self.height) {
            for column in x..(x + width).min(self.width) {
                self.pixels[row * self.width + column] = colour;
            }
        }
    }

    /// Writes one line, its box's upper left corner at `(x, y)`. Characters outside Latin-1 show as `?`.
    pub fn text(&mut self, x: usize, y: usize, text: &str, direction: Direction, colour: Rgb) {
        let latin: String = text
            .chars()
            .map(|c| if c == '…' { '~' } else { c })
            .collect();
        let mut ink = Ink {
            canvas: self,
            x,
            y,
            direction,
            colour,
        };
        let style = MonoTextStyle::new(&FONT_6X10, BinaryColor::On);
        let Ok(_) = Text::with_baseline(&latin, Point::zero(), style, Baseline::Top).draw(&mut ink);
    }
}

/// Lets the font library draw upright while the pixels land turned.
struct Ink<'a> {
    canvas: &'a mut Canvas,
    x: usize,
    y: usize,
    direction: Direction,
    colour: Rgb,
}

impl OriginDimensions for Ink<'_> {
    fn size(&self) -> Size {
        Size::new(u32::MAX / 4, u32::MAX / 4)
    }
}

impl DrawTarget for Ink<'_> {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(point, colour) in pixels {
            let (Ok(across), Ok(down)) = (usize::try_from(point.x), usize::try_from(point.y))
            else {
                continue;
            };
            if colour.is_off() {
                continue;
            }
            let (x, y) = match self.direction {
                Direction::Across => (self.x + across, self.y + down),
                Direction::Down => (
                    self.x + (CHAR_HEIGHT - 1).saturating_sub(down),
                    self.y + across,
                ),
            };
            self.canvas.fill(x, y, 1, 1, self.colour);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawing_outside_is_left_out() {
        let mut c = Canvas::new(4, 4);
        c.fill(3, 3, 10, 10, [0; 3]);
        assert_eq!(c.pixel(3, 3), Some([0; 3]));
        assert_eq!(c.pixel(4, 3), None);
        c.text(2, 2, "wide label", Direction::Across, [9; 3]);
    }

    #[test]
    fn a_label_running_down_is_the_label_across_turned() {
        let mut across = Canvas::new(60, 60);
        across.text(0, 0, "Lx", Direction::Across, [0; 3]);
        let mut down = Canvas::new(60, 60);
        down.text(0, 0, "Lx", Direction::Down, [0; 3]);
        for y in 0..CHAR_HEIGHT {
            for x in 0..2 * CHAR_WIDTH {
                assert_eq!(across.pixel(x, y), down.pixel(CHAR_HEIGHT - 1 - y, x));
            }
        }
        assert!(across.rgb().contains(&0), "something was drawn");
    }
}
