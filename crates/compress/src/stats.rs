//! The statistics that methods asked for, gathered in one forward of a block.

use std::collections::{HashMap, HashSet};

use lacuna_base::{MatRef, dense::Gram};
use lacuna_contract::{DropPart, Needs, Stats};
use lacuna_model::{BlockPart, Tap, Wants};
use lacuna_spec::{Place, Role, Spec};

/// Gathers statistics of the inputs of one block's matrices. Matrices that read the same input share one entry.
pub struct Gather {
    wants: HashMap<Place, Needs>,
    seen: HashMap<Place, Inputs>,
}

#[derive(Default)]
struct Inputs {
    tokens: u64,
    gram: Option<Gram>,
    squares: Option<Vec<f64>>,
}

/// The matrix in whose name the input of `place` is gathered: q for k and v, gate for up.
fn reader(spec: &Spec, place: &Place) -> Place {
    let gated = place.layer.and_then(|l| spec.layers[l as usize].ffn.as_ref()).is_some_and(|f| f.gated);
    let role = match place.role {
        Role::K | Role::V => Role::Q,
        Role::Up if gated => Role::Gate,
        r => r,
    };
    Place { role, ..*place }
}

impl Gather {
    /// For the union of what `asks` need, `(matrix, needs)` each.
    pub fn new(spec: &Spec, asks: impl IntoIterator<Item = (Place, Needs)>) -> Gather {
        let mut wants: HashMap<Place, Needs> = HashMap::new();
        for (place, needs) in asks {
            if needs.gram || needs.squares {
                let w = wants.entry(reader(spec, &place)).or_default();
                *w = w.union(needs);
            }
        }
        Gather { wants, seen: HashMap::new() }
    }

    /// Whether anything is to be gathered.
    pub fn is_needed(&self) -> bool {
        !self.wants.is_empty()
    }

    /// What was gathered for `place`.
    pub fn stats(&self, spec: &Spec, place: &Place) -> Stats<'_> {
        match self.seen.get(&reader(spec, place)) {
            Some(i) => Stats { tokens: i.tokens, gram: i.gram.as_ref(), squares: i.squares.as_deref() },
            None => Stats::default(),
        }
    }

    /// Bytes of the statistics that a block of `spec` would need at the most.
    pub fn bytes(spec: &Spec, layer: usize, asks: impl IntoIterator<Item = (Place, Needs)>) -> u64 {
        let mut readers = HashSet::new();
        let mut bytes = 0;
        for (place, needs) in asks.into_iter().filter(|(p, _)| p.layer == Some(layer as u32)) {
            if let (true, Some((_, n))) = (needs.gram && readers.insert(reader(spec, &place)), spec.shape(&place)) {
                bytes += 8 * (n as u64) * (n as u64);
            }
        }
        bytes
    }
}

impl Tap for Gather {
    fn wants(&self) -> Wants {
        Wants { inputs: self.is_needed(), ..Wants::default() }
    }

    fn input(&mut self, place: &Place, x: MatRef<'_>) {
        let Some(needs) = self.wants.get(place) else { return };
        let seen = self.seen.entry(*place).or_default();
        seen.tokens += x.rows() as u64;
        if needs.gram {
            seen.gram.get_or_insert_with(|| Gram::new(x.cols())).add(x);
        }
        if needs.squares {
            let sums = seen.squares.get_or_insert_with(|| vec![0.0; x.cols()]);
            for r in 0..x.rows() {
                for (s, v) in sums.iter_mut().zip(x.row(r)) {
                    *s += f64::from(*v) * f64::from(*v);
                }
            }
        }
    }
}

/// Gathers how alike the input and the output of blocks, attentions or FFNs are: the mean over tokens of the cosine.
pub struct Similarity {
    part: DropPart,
    sums: Vec<(f64, u64)>,
}

impl Similarity {
    /// For one kind of part over `layers` blocks.
    pub fn new(part: DropPart, layers: usize) -> Similarity {
        Similarity { part, sums: vec![(0.0, 0); layers] }
    }

    /// By layer; `None` where no token passed the part.
    pub fn means(&self) -> Vec<Option<f64>> {
        self.sums.iter().map(|(s, n)| (*n > 0).then(|| s / *n as f64)).collect()
    }
}

impl Tap for Similarity {
    fn wants(&self) -> Wants {
        Wants { residuals: true, ..Wants::default() }
    }

    fn residual(&mut self, layer: usize, part: BlockPart, before: MatRef<'_>, after: MatRef<'_>) {
        let mine = match self.part {
            DropPart::Block => BlockPart::Block,
            DropPart::Attention => BlockPart::Attention,
            DropPart::Ffn => BlockPart::Ffn,
        };
        if part != mine {
            return;
        }
        let (sum, n) = &mut self.sums[layer];
        for r in 0..before.rows() {
            let (mut ab, mut aa, mut bb) = (0.0f64, 0.0f64, 0.0f64);
            for (a, b) in before.row(r).iter().zip(after.row(r)) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                ab += a * b;
                aa += a * a;
                bb += b * b;
            }
            let norm = (aa * bb).sqrt();
            *sum += if norm > 0.0 { ab / norm } else { 1.0 };
            *n += 1;
        }
    }
}
