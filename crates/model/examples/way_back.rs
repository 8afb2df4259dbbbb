//! How long one block takes forward and back, in the shape of a small model: hidden 576, width 1536, 9 heads over 3,
//! 512 tokens, f32.
//!
//! `way_back [TOKENS [RUNS]]` prints the least and the median milliseconds of: the decoder's forward, the recorded
//! forward, the way back with the gradient of the input alone, and the way back with those of all seven matrices.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use lacuna_base::{Mat, MatRef, Rng, dense};
use lacuna_format::{Float, PatternKind, Stored, Weights, WeightsError, pack_float};
use lacuna_model::derive::{GradientSink, RecordedBlock};
use lacuna_model::{Batch, Block, ContiguousKv, NoTap};
use lacuna_spec::{
    Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Place, Positions, Rope, RopeScaling, RopeStyle, Spec,
};

struct Random {
    spec: Spec,
    tensors: HashMap<Place, Arc<Stored>>,
}

impl Weights for Random {
    fn spec(&self) -> &Spec {
        &self.spec
    }
    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        Ok(self.tensors.get(place).cloned())
    }
}

fn spec() -> Spec {
    let rope = Rope { theta: 10_000.0, dims: 64, style: RopeStyle::Half, scaling: RopeScaling::Default };
    let attn = AttnSpec {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        window: None,
        rope: Some(rope),
        qk_norm: false,
        softcap: None,
        qkv_bias: false,
        o_bias: false,
        post_norm: false,
        gate: false,
    };
    let act = Activation::Silu;
    let ffn = FfnSpec { width: 1536, gated: true, act, bias: false, down_bias: false, post_norm: false, experts: None };
    Spec {
        arch: "llama".into(),
        hidden: 576,
        vocab: 64,
        context: 8192,
        embed_scale: 1.0,
        tied: true,
        positions: Positions::None,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, offset: 0.0, divisor: None },
        final_norm: true,
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), ..LayerSpec::default() }],
        logit_softcap: None,
        logit_scale: 1.0,
    }
}

/// Adds every matrix's gradient to memory that stays, as a trainer would.
#[derive(Default)]
struct Gradients(HashMap<Place, Mat>);

impl GradientSink for Gradients {
    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
        let sum = self.0.entry(*place).or_insert_with(|| Mat::zeros(dy.cols(), x.cols()));
        dense::add_matmul_tn(sum.view_mut(), 1.0, dy, x);
    }
}

struct Nobody;
impl GradientSink for Nobody {
    fn wants(&self, _: &Place) -> bool {
        false
    }
    fn gradient(&mut self, _: &Place, _: MatRef<'_>, _: MatRef<'_>) {}
}

fn timed(name: &str, runs: usize, mut f: impl FnMut() -> f64) {
    let mut all: Vec<f64> = (0..runs + 2).map(|_| f()).skip(2).collect();
    all.sort_by(f64::total_cmp);
    println!("{name:<44} {:8.2} {:8.2}", all[0], all[all.len() / 2]);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let tokens = arguments.next().transpose()?.unwrap_or(512);
    let runs = arguments.next().transpose()?.unwrap_or(20).max(1);
    let (spec, mut rng) = (spec(), Rng::new(1));
    let mut tensors = HashMap::new();
    for place in spec.places() {
        let Some((rows, cols)) = spec.shape(&place) else { continue };
        let w = Mat::from_fn(rows, cols, |_, _| if rows == 1 { 1.0 } else { rng.normal() * 0.04 });
        tensors
            .insert(place, Arc::new(Stored::from_piece(pack_float(w.view(), None, PatternKind::Dense, Float::F32)?)));
    }
    let weights = Random { spec, tensors };
    let (plain, block) = (Block::load(&weights, 0)?, RecordedBlock::load(&weights, 0)?);
    let x = Mat::from_fn(tokens, 576, |_, _| rng.normal());
    let dy = Mat::from_fn(tokens, 576, |_, _| rng.normal() * 0.01);
    let milliseconds = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
    println!("{tokens} tokens, {} threads {:>23} {:>8}", lacuna_kernels::threads(), "least", "median");
    timed("forward", runs, || {
        let (mut y, mut kv) = (x.clone(), ContiguousKv::new(&weights.spec, 1));
        let start = Instant::now();
        let done = plain.forward(&mut y, &Batch::one(0, 0..tokens), &mut kv, &mut NoTap);
        done.map_or(f64::NAN, |()| milliseconds(start))
    });
    timed("recorded forward", runs, || {
        let mut y = x.clone();
        let start = Instant::now();
        let record = block.forward(&mut y);
        let time = milliseconds(start);
        record.map_or(f64::NAN, |_| time)
    });
    let mut y = x.clone();
    let record = block.forward(&mut y)?;
    let mut gradients = Gradients::default();
    timed("back, of the input alone", runs, || {
        let mut dx = dy.clone();
        let start = Instant::now();
        block.backward(&record, &mut dx, &mut Nobody);
        milliseconds(start)
    });
    timed("back, of the input and all matrices", runs, || {
        let mut dx = dy.clone();
        let start = Instant::now();
        block.backward(&record, &mut dx, &mut gradients);
        milliseconds(start)
    });
    timed("forward and back, of all", runs, || {
        let (mut y, mut dx) = (x.clone(), dy.clone());
        let start = Instant::now();
        let Ok(record) = block.forward(&mut y) else { return f64::NAN };
        block.backward(&record, &mut dx, &mut gradients);
        milliseconds(start)
    });
    Ok(())
}
