//! The affine grid of one group: what an integer code means.

/// `value = scale * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Distance of two neighbouring values; may be negative (symmetric grids put the signed extreme on the lowest
    /// code).
    pub scale: f32,
    /// The code of the value 0.
    pub zero: u8,
}

impl Affine {
    /// The code of `bits` bits whose value is nearest to `v` (halves to even, as hardware rounds). A zero scale maps
    /// all to `zero`.
    pub fn code(self, v: f32, bits: u8) -> u8 {
        if self.scale == 0.0 {
            return self.zero;
        }
        let top = (1u32 << bits) as f32 - 1.0;
        ((v / self.scale).round_ties_even() + f32::from(self.zero)).clamp(0.0, top) as u8
    }

    /// The value of a code.
    pub fn value(self, code: u8) -> f32 {
        self.scale * (f32::from(code) - f32::from(self.zero))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_code_and_exact_zero() {
        let g = Affine { scale: 0.5, zero: 3 };
        for code in 0..16 {
            assert_eq!(g.code(g.value(code), 4), code);
        }
        assert_eq!((g.code(100.0, 4), g.code(-100.0, 4), g.value(g.code(0.0, 4))), (15, 0, 0.0));
        let s = Affine { scale: -0.25, zero: 8 };
        assert_eq!((s.value(0), s.code(2.0, 4), s.code(-9.0, 4)), (2.0, 0, 15));
        assert_eq!(Affine { scale: 0.0, zero: 8 }.code(f32::NAN, 4), 8);
    }
}
