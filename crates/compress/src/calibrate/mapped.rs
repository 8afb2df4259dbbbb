//! Statistics of inputs as the maps at a matrix's input leave them: the one place where steps behind a map get theirs.

use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_contract::{Ask, Gathered, MethodError, Stats, Worked};
use lacuna_format::{Axes, Map};

use super::bytes;

/// What was gathered of `x`, as of `M x`.
pub(crate) struct Mapped {
    tokens: u64,
    found: Arc<(Vec<(Ask, Gathered)>, Worked)>,
    gradients: Vec<(Ask, Gathered)>,
    sequences: u64,
}

impl Mapped {
    /// Those of `asks`. `like`: the same of another matrix with the same inputs and maps.
    pub(crate) fn of(
        stats: &Stats<'_>,
        asks: &[Ask],
        maps: &[Map],
        inputs: usize,
        like: Option<&Mapped>,
    ) -> Result<Mapped, MethodError> {
        let turning = Turning::new(maps, inputs)?;
        let found = match like {
            Some(like) => Arc::clone(&like.found),
            None => {
                let forward = asks.iter().filter(|a| !a.is_gradient());
                Arc::new((turning.all(stats, forward)?, Worked::default()))
            }
        };
        let gradients = turning.all(stats, asks.iter().filter(|a| a.is_gradient()))?;
        Ok(Mapped { tokens: stats.tokens, found, gradients, sequences: stats.sequences })
    }

    /// Bytes that those of `asks` take.
    pub(crate) fn bytes(asks: &[Ask], mixes: bool, inputs: usize) -> u64 {
        asks.iter().filter_map(|a| a.behind(mixes)).map(|a| bytes(a, inputs as u64)).sum()
    }

    pub(crate) fn stats(&self) -> Stats<'_> {
        Stats {
            tokens: self.tokens,
            found: &self.found.0,
            gradients: &self.gradients,
            sequences: self.sequences,
            worked: Some(&self.found.1),
        }
    }
}

/// Maps at work.
struct Turning {
    axes: Axes,
    mixes: bool,
    /// What the maps multiply each of their results by, where they only move and scale.
    by: Vec<f64>,
}

impl Turning {
    fn new(maps: &[Map], inputs: usize) -> Result<Turning, MethodError> {
        let axes = Axes::of(maps, inputs).map_err(|e| MethodError::new(e.what))?;
        let mut by = vec![1.0; inputs];
        axes.inputs(&mut by);
        Ok(Turning { axes, mixes: !maps.iter().all(Map::moves_only), by })
    }

    fn all<'a>(
        &self,
        stats: &Stats<'_>,
        asks: impl Iterator<Item = &'a Ask>,
    ) -> Result<Vec<(Ask, Gathered)>, MethodError> {
        let mut out = Vec::new();
        for &ask in asks {
            let from = ask.behind(self.mixes).ok_or_else(|| MethodError::new(lost(ask)))?;
            // What was not gathered stays absent: whoever reads it says so.
            if let Some(gathered) = stats.get(from) {
                out.push((ask, self.one(ask, gathered)));
            }
        }
        Ok(out)
    }

    /// Of a sum of squares, or of a variance.
    fn squares(&self, v: &[f64]) -> Vec<f64> {
        let mut v = v.to_vec();
        self.axes.inputs(&mut v);
        v.iter_mut().zip(&self.by).for_each(|(v, by)| *v *= by);
        v
    }

    fn one(&self, ask: Ask, gathered: &Gathered) -> Gathered {
        let rows = |m: &Mat, then: &dyn Fn(&mut [f32])| {
            let mut m = m.clone();
            for r in 0..m.rows() {
                self.axes.inputs(m.row_mut(r));
                then(m.row_mut(r));
            }
            Gathered::Matrix(m)
        };
        match (ask, gathered) {
            (Ask::InputSquares, Gathered::Gram(gram)) => {
                Gathered::Vector(gram.turned(|x| self.axes.inputs(x)).diag().iter().map(|v| v.max(0.0)).collect())
            }
            (_, Gathered::Gram(gram)) if ask == Ask::InputGram => Gathered::Gram(gram.turned(|x| self.axes.inputs(x))),
            (Ask::InputSquares, Gathered::Vector(v)) => Gathered::Vector(self.squares(v)),
            (_, Gathered::Vector(v)) => {
                let mut v = v.clone();
                self.axes.inputs(&mut v);
                v.iter_mut().for_each(|v| *v = v.abs());
                Gathered::Vector(v)
            }
            (_, Gathered::Moments { mean, variance }) => {
                let mut mean = mean.clone();
                self.axes.inputs(&mut mean);
                Gathered::Moments { mean, variance: self.squares(variance) }
            }
            // The gradient of W' = W M⁻¹ is G Mᵀ.
            (Ask::GradientMean | Ask::SequenceGradients | Ask::InputRows(_), Gathered::Matrix(m)) => rows(m, &|_| {}),
            (Ask::GradientAbsolute, Gathered::Matrix(m)) => rows(m, &|row| row.iter_mut().for_each(|v| *v = v.abs())),
            (Ask::GradientSquares, Gathered::Matrix(m)) => {
                rows(m, &|row| row.iter_mut().zip(&self.by).for_each(|(v, by)| *v *= *by as f32))
            }
            // Of outputs, which maps of inputs leave as they are.
            _ => gathered.clone(),
        }
    }
}

/// Why a statistic cannot be had behind a map that mixes inputs, and what to do.
pub(crate) fn lost(ask: Ask) -> String {
    format!(
        "{} cannot be told behind a map that mixes inputs: a map that reads them goes before it, any other method that \
         reads them cannot follow it; those that read the Gram matrix or the squares of the inputs can",
        ask.describe()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::{Gram, testkit::random};
    use lacuna_format::Float;

    /// Every statistic from its definition, of rows `x` and gradients `g` of two sequences.
    fn gathered(x: &Mat, g: &[Mat; 2]) -> [Vec<(Ask, Gathered)>; 2] {
        let mut gram = Gram::new(x.cols());
        gram.add(x.view());
        let column = |c: usize| (0..x.rows()).map(move |t| f64::from(x[(t, c)]));
        let of = |f: &dyn Fn(usize) -> f64| (0..x.cols()).map(f).collect::<Vec<f64>>();
        let mean = of(&|c| column(c).sum::<f64>() / x.rows() as f64);
        let variance = of(&|c| column(c).map(|v| (v - mean[c]).powi(2)).sum::<f64>() / x.rows() as f64);
        let weights = |f: &dyn Fn(f32) -> f32| {
            Gathered::Matrix(Mat::from_fn(g[0].rows(), x.cols(), |r, c| (f(g[0][(r, c)]) + f(g[1][(r, c)])) / 2.0))
        };
        [
            vec![
                (Ask::InputGram, Gathered::Gram(gram)),
                (Ask::InputSquares, Gathered::Vector(of(&|c| column(c).map(|v| v * v).sum()))),
                (Ask::InputMagnitudes, Gathered::Vector(of(&|c| column(c).map(f64::abs).sum()))),
                (Ask::InputMoments, Gathered::Moments { mean, variance }),
                (Ask::InputRows(40), Gathered::Matrix(x.clone())),
            ],
            vec![
                (Ask::GradientMean, weights(&|v| v)),
                (Ask::GradientAbsolute, weights(&f32::abs)),
                (Ask::GradientSquares, weights(&|v| v * v)),
            ],
        ]
    }

    fn numbers(g: &Gathered) -> Vec<f64> {
        match g {
            Gathered::Gram(g) => g.data().to_vec(),
            Gathered::Vector(v) => v.clone(),
            Gathered::Moments { mean, variance } => mean.iter().chain(variance).copied().collect(),
            Gathered::Matrix(m) => m.data().iter().map(|v| f64::from(*v)).collect(),
            Gathered::Number(x) => vec![*x],
        }
    }

    #[test]
    fn they_are_those_of_the_mapped_inputs_themselves() {
        let (x, g) = (random(40, 24, 1), [random(3, 24, 2), random(3, 24, 3)]);
        let index: Vec<u32> = (0..24).map(|i| i * 5 % 24).collect();
        let d: Vec<f32> = (0..24).map(|i| if i % 4 == 0 { -0.5 } else { 0.25 + i as f32 / 16.0 }).collect();
        let moves = vec![Map::permutation(&index), Map::diagonal(&d, Float::F32).unwrap()];
        let mixes = [&moves[..], &[Map::hadamard(12, Some(&[true; 24]))]].concat();
        let [found, gradients] = gathered(&x, &g);
        let stats = Stats { tokens: 40, found: &found, gradients: &gradients, sequences: 2, worked: None };
        for maps in [&moves, &mixes] {
            let axes = Axes::of(maps, 24).unwrap();
            let turn = |m: &Mat| {
                let mut m = m.clone();
                (0..m.rows()).for_each(|r| axes.inputs(m.row_mut(r)));
                m
            };
            let want = gathered(&turn(&x), &[turn(&g[0]), turn(&g[1])]).concat();
            let mixing = maps.len() == 3;
            for (ask, want) in &want {
                let got = Mapped::of(&stats, &[*ask], maps, 24, None);
                if ask.behind(mixing).is_none() {
                    let said = got.err().expect("refused").what;
                    assert!(said.contains(ask.describe()) && said.contains("goes before"), "{said}");
                    continue;
                }
                let got = got.unwrap();
                let got = numbers(got.stats().get(*ask).expect("there"));
                let want = numbers(want);
                let near = got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs()));
                assert!(near && got.len() == want.len(), "{ask:?} {mixing}");
            }
        }
    }
}
