//! What the codes of one GGUF block stand for.
//!
//! Every type is the same: a block is cut into runs that share a scale and, in some types, a minimum, and
//! `value = d * scale * level(code) - dmin * minimum`. The scales and minima of the runs are small integers under two
//! f16 (K types), or there is one run and the f16 are all (blocks of 32). Levels are evenly spaced or a table.

use half::f16;

use crate::GgufType;
use crate::gguf::IQ4;

/// How the values of a type are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    /// Values that share a scale.
    pub run: usize,
    /// The lowest and the highest level; evenly spaced by 1 unless they come from the table.
    pub levels: (f32, f32),
    /// The code of level 0 (evenly spaced ones).
    pub zero: i32,
    /// Whether levels are those of the IQ4 table.
    pub table: bool,
    /// The range of the integer scales; `(1, 1)`: the f16 is the scale.
    pub scales: (i32, i32),
    /// The largest integer minimum: 0 for none, 1: the f16 is the minimum, of either sign.
    pub mins: i32,
}

impl GgufType {
    /// How the type makes its values. Panics for types that are only read.
    #[inline]
    #[track_caller]
    pub(crate) fn form(self) -> Form {
        let even = |run, zero: i32, top: i32, scales, mins| Form {
            run,
            levels: (-zero as f32, (top - zero) as f32),
            zero,
            table: false,
            scales,
            mins,
        };
        let table = |scales| Form { table: true, levels: (-127.0, 113.0), ..even(32, 0, 15, scales, 0) };
        match self {
            GgufType::Q4_0 => even(32, 8, 15, (1, 1), 0),
            GgufType::Q4_1 => even(32, 0, 15, (1, 1), 1),
            GgufType::Q5_0 => even(32, 16, 31, (1, 1), 0),
            GgufType::Q5_1 => even(32, 0, 31, (1, 1), 1),
            // -128 is left out: products of signed bytes may not say its opposite.
            GgufType::Q8_0 => Form { levels: (-127.0, 127.0), ..even(32, 128, 255, (1, 1), 0) },
            GgufType::Q2_K => even(16, 0, 3, (0, 15), 15),
            GgufType::Q3_K => even(16, 4, 7, (-32, 31), 0),
            GgufType::Q4_K => even(32, 0, 15, (0, 63), 63),
            GgufType::Q5_K => even(32, 0, 31, (0, 63), 63),
            GgufType::Q6_K => even(16, 32, 63, (-128, 127), 0),
            GgufType::IQ4_NL => table((1, 1)),
            GgufType::IQ4_XS => table((-32, 31)),
            _ => panic!("{self:?} is read, not written"),
        }
    }
}

impl Form {
    /// The level of a code.
    #[inline]
    pub fn level(&self, code: u8) -> f32 {
        if self.table { f32::from(IQ4[usize::from(code & 15)]) } else { (i32::from(code) - self.zero) as f32 }
    }

    /// The level nearest to `y`.
    #[inline]
    pub fn nearest(&self, y: f32) -> f32 {
        if self.table { f32::from(IQ4[usize::from(iq4_code(y))]) } else { even_level(y, self.levels) }
    }

    /// The code of the level nearest to `y`.
    #[inline]
    pub fn code(&self, y: f32) -> u8 {
        if self.table { iq4_code(y) } else { (even_level(y, self.levels) as i32 + self.zero) as u8 }
    }
}

/// The whole number nearest to `y` within `levels`; 0 for what is no number.
#[inline]
pub(crate) fn even_level(y: f32, levels: (f32, f32)) -> f32 {
    // Adding and taking off 1.5 * 2^23 rounds without a call, so that loops over it run in vectors.
    const ROUND: f32 = 12_582_912.0;
    let y = y.max(levels.0).min(levels.1);
    (y + ROUND) - ROUND
}

/// The code of the IQ4 level nearest to `y`. All bounds between two levels are multiples of a half.
#[inline]
fn iq4_code(y: f32) -> u8 {
    const NEAREST: [u8; 512] = {
        let mut codes = [0; 512];
        let (mut i, mut code) = (0, 0);
        while i < 512 {
            // Twice the bound to the next level is their sum.
            while code < 15 && i as i32 - 256 >= IQ4[code] as i32 + IQ4[code + 1] as i32 {
                code += 1;
            }
            codes[i] = code as u8;
            i += 1;
        }
        codes
    };
    let at = (2.0 * y.clamp(-128.0, 127.0)).floor() as i32 + 256;
    NEAREST[at.clamp(0, 511) as usize]
}

/// The scales of one block, as its type stores them: what each of its codes is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockGrid {
    pub(crate) kind: GgufType,
    /// What an f16 holds.
    pub(crate) d: f32,
    /// What an f16 holds.
    pub(crate) dmin: f32,
    pub(crate) scales: [i16; 16],
    pub(crate) mins: [u8; 16],
}

/// The nearest value that an f16 holds, of finite ones.
pub(crate) fn as_f16(d: f32) -> f32 {
    f16::from_f32(d.clamp(-65504.0, 65504.0)).to_f32()
}

impl BlockGrid {
    /// Whose block it is.
    pub fn kind(&self) -> GgufType {
        self.kind
    }

    /// Consecutive values that share a scale.
    pub fn run(&self) -> usize {
        self.kind.form().run
    }

    /// What a level and 1 are multiplied with in run `r`: `value = scale * level - minimum`.
    #[inline]
    pub(crate) fn affine(&self, r: usize) -> (f32, f32) {
        (self.d * f32::from(self.scales[r]), self.dmin * f32::from(self.mins[r]))
    }

    /// What codes are worth in run `r`.
    #[inline]
    pub fn of_run(&self, r: usize) -> RunGrid {
        let (scale, min) = self.affine(r);
        RunGrid { form: self.kind.form(), scale, min, inverse: inverse(scale) }
    }

    /// The code for the `i`-th value of the block that comes nearest to `x`; finite or not, it is a code.
    pub fn code(&self, i: usize, x: f32) -> u8 {
        self.of_run(i / self.run()).code(x)
    }

    /// The value of a code at the `i`-th place of the block: exactly what the decoder gives.
    pub fn value(&self, i: usize, code: u8) -> f32 {
        self.of_run(i / self.run()).value(code)
    }

    /// What the two f16 of the block are multiplied with at place `i` under `code`: `value = d * a - dmin * b`.
    #[inline]
    pub fn parts(&self, i: usize, code: u8) -> (f32, f32) {
        let form = self.kind.form();
        let r = i / form.run;
        (f32::from(self.scales[r]) * form.level(code), f32::from(self.mins[r]))
    }

    /// The two f16.
    pub fn units(&self) -> (f32, f32) {
        (self.d, self.dmin)
    }

    /// The same block under other f16, rounded to such; `None` where the type does not allow their sign.
    pub fn with_units(&self, d: f32, dmin: f32) -> Option<BlockGrid> {
        let form = self.kind.form();
        let allowed = d.is_finite() && dmin.is_finite() && (form.mins <= 1 || dmin >= 0.0);
        allowed.then(|| BlockGrid { d: as_f16(d), dmin: as_f16(dmin), ..*self })
    }

    /// Grids a little finer, coarser or shifted in run `r`: its integer scale and minimum moved by one, or, where the
    /// f16 are all, those moved by less than half a step of the outermost level.
    pub fn neighbours(&self, r: usize) -> impl Iterator<Item = BlockGrid> + '_ {
        let form = self.kind.form();
        let single = form.scales == (1, 1);
        let scales = if single { 2 } else { 1 };
        let mins = i32::from(form.mins > 0);
        let all = (-scales..=scales).flat_map(move |s| (-mins..=mins).map(move |m| (s, m)));
        all.filter(|&moved| moved != (0, 0)).filter_map(move |(s, m)| {
            let mut moved = *self;
            if single {
                let reach = form.levels.1 - form.levels.0;
                let step = if form.table { 1.0 / 32.0 } else { 0.5 / reach };
                moved.d = as_f16(self.d * (1.0 + step * s as f32));
                moved.dmin = as_f16(self.dmin + 0.25 * self.d * m as f32);
            } else {
                let (s, m) = (i32::from(self.scales[r]) + s, i32::from(self.mins[r]) + m);
                if !(form.scales.0..=form.scales.1).contains(&s) || !(0..=form.mins).contains(&m) {
                    return None;
                }
                (moved.scales[r], moved.mins[r]) = (s as i16, m as u8);
            }
            Some(moved)
        })
    }
}

/// What the codes of one run of a block are worth.
#[derive(Clone, Copy, Debug)]
pub struct RunGrid {
    form: Form,
    scale: f32,
    min: f32,
    inverse: f32,
}

impl RunGrid {
    /// The code whose value is nearest to `x`; finite or not, it is a code.
    #[inline]
    pub fn code(&self, x: f32) -> u8 {
        self.form.code((x + self.min) * self.inverse)
    }

    /// The value of a code.
    #[inline]
    pub fn value(&self, code: u8) -> f32 {
        self.scale * self.form.level(code) - self.min
    }
}

/// 1 / d; 0 where that is no number.
pub(crate) fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}
