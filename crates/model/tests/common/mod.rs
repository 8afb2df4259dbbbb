//! A model in memory: every tensor of a description, random.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_base::Rng;
use lacuna_format::{Bytes, Float, Pattern, Piece, Stored, Values, Weights, WeightsError};
use lacuna_spec::{
    Activation, AltUp, AttnSpec, Delta, ExpertGroups, Experts, FfnSpec, GateNorm, Latent, LayerInputs, LayerSpec,
    Mamba, Mixer, NormKind, NormVectors, Order, Part, Place, Positions, QkNorm, Role, Rope, RopeScaling, RopeStyle,
    RouterScore, SharedExpert, ShortConv, Spec, Ssd, Temperature,
};

/// Weights by place.
pub struct Memory {
    pub spec: Spec,
    pub tensors: HashMap<Place, Arc<Stored>>,
}

impl Weights for Memory {
    fn spec(&self) -> &Spec {
        &self.spec
    }
    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        Ok(self.tensors.get(place).cloned())
    }
}

/// A dense f32 matrix as stored.
pub fn stored(rows: usize, cols: usize, values: &[f32]) -> Stored {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let values = Values::Float(Float::F32, Bytes::from(bytes));
    Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
}

impl Memory {
    /// Random weights for `spec`.
    pub fn random(spec: Spec, seed: u64) -> Memory {
        let mut rng = Rng::new(seed);
        let mut tensors = HashMap::new();
        for place in spec.places() {
            let (rows, cols) = spec.shape(&place).expect("one of its places");
            let vector =
                rows == 1 && place.part == Part::Weight && !place.role.is_linear() && place.role != Role::Embed;
            let (center, spread) = match place.role {
                // Below 0, as it is or its logarithm: what is above would grow without end.
                Role::MixerA => (-1.0, 0.2),
                _ if vector => (1.0, 0.3),
                _ => (0.0, 1.3 / (cols as f32).sqrt()),
            };
            let values: Vec<f32> = (0..rows * cols).map(|_| center + spread * rng.normal()).collect();
            tensors.insert(place, Arc::new(stored(rows, cols, &values)));
        }
        Memory { spec, tensors }
    }
}

fn attention(heads: usize, kv_heads: usize, head_dim: usize) -> AttnSpec {
    AttnSpec {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        rope: Some(Rope {
            theta: 500.0,
            dims: head_dim / 2 * 2,
            style: RopeStyle::Half,
            scaling: RopeScaling::Default,
        }),
        ..AttnSpec::default()
    }
}

fn ffn(width: usize) -> FfnSpec {
    FfnSpec { width, ..FfnSpec::default() }
}

fn ssd(heads: usize, head_dim: usize, groups: usize, gate: GateNorm) -> Ssd {
    let (state, kernel, dt_limit) = (5, 3, (0.0, None));
    Ssd { heads, head_dim, state, groups, kernel, conv_bias: true, dt_limit, gate, log: true, factors: None }
}

/// Descriptions that use everything a description can say, with uneven layers.
pub fn specs() -> Vec<Spec> {
    let plain = Spec {
        arch: "test".into(),
        hidden: 40,
        vocab: 75,
        context: 256,
        layers: vec![
            LayerSpec { attn: Some(attention(4, 2, 10)), ffn: Some(ffn(50)), ..LayerSpec::default() },
            LayerSpec { ffn: Some(ffn(33)), ..LayerSpec::default() },
            LayerSpec { attn: Some(attention(3, 1, 16)), ..LayerSpec::default() },
            LayerSpec::default(),
        ],
        ..Spec::default()
    };
    let mut sandwich = plain.clone();
    sandwich.embed_scale = 6.25;
    sandwich.tied = true;
    sandwich.norm.offset = 1.0;
    sandwich.logit_softcap = Some(5.0);
    sandwich.logit_scale = 0.5;
    for (l, layer) in sandwich.layers.iter_mut().enumerate() {
        if let Some(a) = &mut layer.attn {
            (a.post_norm, a.qk_norm, a.softcap) = (true, true, Some(2.0));
            a.window = (l == 0).then_some(9);
            let rope = a.rope.as_mut().expect("set above");
            rope.style = RopeStyle::Interleaved;
            let short = vec![1.0; rope.dims / 2];
            let long = vec![2.0; rope.dims / 2];
            rope.scaling = RopeScaling::Longrope { short, long, attention_factor: 1.1, original: 40 };
        }
        if let Some(f) = &mut layer.ffn {
            (f.post_norm, f.act) = (true, Activation::GeluTanh);
            f.experts = Some(Experts { count: 5, used: 2, normalize: l == 0, ..Experts::default() });
            f.down_bias = l == 1;
        }
    }
    let mut learned = plain.clone();
    learned.norm.kind = NormKind::Layer;
    learned.positions = Positions::Learned { offset: 2 };
    for layer in &mut learned.layers {
        if let Some(a) = &mut layer.attn {
            (a.rope, a.qkv_bias, a.o_bias) = (None, true, true);
        }
        if let Some(f) = &mut layer.ffn {
            (f.gated, f.bias, f.act) = (false, true, Activation::Relu);
        }
    }
    // Shortcuts around parts that are there and parts that are not; everything else that can stand beside them.
    let mut turned = plain.clone();
    turned.norm.divisor = Some(53);
    for (l, layer) in turned.layers.iter_mut().enumerate() {
        (layer.attn_shortcut, layer.ffn_shortcut) = (l != 2, l != 1);
        if let Some(a) = &mut layer.attn {
            (a.qk_norm, a.post_norm) = (true, l == 2);
        }
        if let Some(f) = &mut layer.ffn {
            f.experts = (l == 1).then_some(Experts { count: 4, used: 2, normalize: true, ..Experts::default() });
            f.post_norm = l == 0;
        }
    }
    // No norm before the parts, but one behind them, and one over all heads.
    let mut behind = plain.clone();
    (behind.residual_scale, behind.embed_norm, behind.head_bias) = (0.6, true, true);
    for (l, layer) in behind.layers.iter_mut().enumerate() {
        if let Some(a) = &mut layer.attn {
            (a.pre_norm, a.post_norm, a.qk_norm, a.qk_norm_over) = (false, true, true, QkNorm::Whole);
            a.qk_norm_after_rope = l == 2;
            a.temperature = Some(Temperature { beta: 0.3, period: 5, shift: l });
            a.clip = (l == 0).then_some(1.5);
        }
        if let Some(f) = &mut layer.ffn {
            (f.pre_norm, f.post_norm, f.gated, f.act) = (false, true, false, Activation::Relu2);
        }
    }
    // The parts side by side behind one norm, with scales of their own for the heads and without positions of any kind
    // but the distance of keys.
    let mut beside = plain.clone();
    (beside.norm.kind, beside.norm.vectors, beside.tied) = (NormKind::Layer, NormVectors::Scale, true);
    for (l, layer) in beside.layers.iter_mut().enumerate() {
        layer.order = Order::Shared;
        if let Some(a) = &mut layer.attn {
            (a.qk_norm, a.qk_norm_over, a.rope, a.alibi) = (true, QkNorm::Heads, None, Some(8.0));
            a.window = (l == 2).then_some(11);
        }
        if let Some(f) = &mut layer.ffn {
            (f.pre_norm, f.gated, f.act) = (false, false, Activation::Xielu);
        }
    }
    // Side by side behind norms of their own, which learned nothing.
    let mut bare = plain.clone();
    (bare.norm.kind, bare.norm.vectors) = (NormKind::Layer, NormVectors::None);
    for layer in &mut bare.layers {
        layer.order = Order::Parallel;
        if let Some(rope) = layer.attn.as_mut().and_then(|a| a.rope.as_mut()) {
            (rope.dims, rope.style) = (6, RopeStyle::Interleaved);
        }
    }
    // Recurrent mixers of every kind, alone and beside attention; gated attention.
    let mut mixed = plain.clone();
    mixed.norm.offset = 1.0;
    let delta = Delta { key_heads: 2, value_heads: 4, key_dim: 6, value_dim: 19, kernel: 4, log: true, tiled: true };
    let factors = Some([0.7, 1.1, 0.9, 1.2, 0.8, 1.3]);
    let near = Ssd { dt_limit: (0.01, Some(4.0)), factors, ..ssd(4, 9, 2, GateNorm::NormFirst { groups: 3 }) };
    let gated = |mut a: AttnSpec| {
        a.gate = true;
        Some(a)
    };
    let factored = FfnSpec { gate_scale: 0.8, down_scale: 1.2, ..ffn(50) };
    mixed.layers = vec![
        LayerSpec { attn: gated(attention(4, 2, 10)), ffn: Some(factored), ..LayerSpec::default() },
        LayerSpec {
            mixer: Some(Mixer::ShortConv(ShortConv { kernel: 3, bias: true })),
            ffn: Some(ffn(33)),
            ..LayerSpec::default()
        },
        LayerSpec { mixer: Some(Mixer::Delta(delta)), ..LayerSpec::default() },
        LayerSpec {
            mixer: Some(Mixer::Ssd(near)),
            attn: gated(AttnSpec { out_scale: 1.3, ..attention(2, 1, 8) }),
            ..LayerSpec::default()
        },
    ];
    let mut others = plain.clone();
    let stored = Ssd { log: false, conv_bias: false, ..ssd(3, 8, 1, GateNorm::Gate) };
    let delta = Delta { log: false, tiled: false, ..delta };
    let with = |m: Mixer| LayerSpec { mixer: Some(m), ..LayerSpec::default() };
    others.layers = vec![
        LayerSpec { attn: Some(attention(4, 2, 10)), ..LayerSpec::default() },
        with(Mixer::Ssd(ssd(6, 4, 3, GateNorm::GateFirst { groups: 2 }))),
        LayerSpec { ffn: Some(ffn(33)), ..with(Mixer::Ssd(stored)) },
        with(Mixer::Delta(delta)),
    ];
    // Mamba, whose channels are no multiple of what a processor takes at once; experts behind it.
    let mut channels = plain.clone();
    let mamba = Mamba { channels: 75, state: 5, rank: 3, kernel: 3, conv_bias: true, log: true };
    let stored = Mamba { log: false, conv_bias: false, channels: 33, ..mamba };
    let mut mixture = ffn(21);
    mixture.experts = Some(Experts { count: 4, used: 2, ..Experts::default() });
    channels.layers = vec![
        LayerSpec { attn: Some(attention(4, 2, 10)), ..LayerSpec::default() },
        LayerSpec { ffn: Some(mixture), ..with(Mixer::Mamba(mamba)) },
        with(Mixer::Mamba(stored)),
    ];
    let (chunks, carried) = (chunked(&plain), carried(&plain));
    let streams = alternating(&carried);
    let mut out = vec![plain.clone(), sandwich, learned, turned, routed(plain), behind, beside, bare, mixed, others];
    out.extend([channels, chunks, carried, streams]);
    out
}

/// Chunks of positions, norms of heads that learned nothing, experts weighed before they read.
fn chunked(plain: &Spec) -> Spec {
    let mut out = plain.clone();
    for (l, layer) in out.layers.iter_mut().enumerate() {
        if let Some(a) = &mut layer.attn {
            (a.chunk, a.qk_norm, a.qk_norm_over, a.qk_norm_after_rope) = (Some(7 + 6 * l), true, QkNorm::Plain, l == 0);
            a.window = (l == 2).then_some(9);
        }
        if let Some(f) = &mut layer.ffn {
            let shared = (l == 0).then_some(SharedExpert { width: 13, gate: false });
            let all = Experts { count: 5, used: 1 + l, score: RouterScore::Sigmoid, ..Experts::default() };
            f.experts = Some(Experts { shared, weigh_inputs: true, expert_scale: l == 1, ..all });
        }
    }
    out
}

/// Several streams, LAuReL, gates that are cut off.
fn alternating(carried: &Spec) -> Spec {
    let mut out = carried.clone();
    out.altup = Some(AltUp { inputs: 3, active: 1, router_scale: 0.4, scaled: true });
    for (l, layer) in out.layers.iter_mut().enumerate() {
        layer.output_scale = false;
        layer.laurel = layer.attn.as_ref().map(|_| 5);
        if let Some(f) = layer.ffn.as_mut().filter(|f| f.experts.is_none()) {
            f.sparsity = (l == 0).then_some(0.7);
        }
    }
    out
}

/// Layers that read more than the stream: inputs of their own, keys and values of earlier ones.
fn carried(plain: &Spec) -> Spec {
    let mut out = plain.clone();
    let (embed_scale, projection_scale) = (1.5, 0.4);
    out.layer_inputs =
        Some(LayerInputs { width: 6, vocab: 70, embed_scale, projection_scale, scale: 0.7, act: Activation::GeluTanh });
    let of = |heads, kv_heads, dim, window| AttnSpec {
        qk_norm: true,
        v_norm: true,
        post_norm: true,
        scale: 0.5,
        window,
        ..attention(heads, kv_heads, dim)
    };
    let reads = |from: usize, a: AttnSpec| AttnSpec { kv_from: Some(from), v_norm: false, ..a };
    let mut whole = of(4, 1, 12, None);
    whole.v_is_k = true;
    let rope = whole.rope.as_mut().expect("set above");
    rope.scaling = RopeScaling::Proportional { pairs: 2, factor: 1.5 };
    let shared = Some(SharedExpert { width: 13, gate: false });
    let all = Experts { count: 5, used: 2, normalize: true, shared, ..Experts::default() };
    let experts = Some(Experts { expert_scale: true, router_scale: 0.6, apart: true, ..all });
    let layer = |attn, ffn, output_scale| LayerSpec { attn, ffn, output_scale, ..LayerSpec::default() };
    out.layers = vec![
        layer(Some(of(4, 2, 10, Some(9))), Some(ffn(20)), true),
        layer(Some(whole.clone()), Some(FfnSpec { experts, post_norm: true, ..ffn(18) }), false),
        layer(Some(reads(0, of(6, 2, 10, Some(9)))), Some(ffn(33)), true),
        layer(Some(AttnSpec { v_is_k: false, ..reads(1, whole) }), None, false),
        layer(None, Some(ffn(12)), true),
    ];
    out
}

/// Latent attention with and without a latent of queries, sinks, and all ways to choose experts.
fn routed(plain: Spec) -> Spec {
    let mut out = plain;
    for (l, layer) in out.layers.iter_mut().enumerate() {
        let mut a = attention(4, 2, 12);
        if l != 2 {
            let rope = a.rope.as_mut().expect("set above");
            (rope.dims, rope.style) = (6, RopeStyle::Interleaved);
            (a.kv_heads, a.head_dim, a.qkv_bias, a.o_bias) = (1, 6 + 14, true, l == 0);
            let q_rank = (l == 0).then_some(11);
            a.latent = Some(Latent { rank: 14, q_rank, plain: 9, value: 7, eps: 1e-3 });
        }
        (a.sinks, a.window) = (l != 0, (l == 2).then_some(9));
        let mut f = ffn(18);
        let shared = Some(SharedExpert { width: 13, gate: l != 0 });
        f.experts = Some(Experts {
            count: 6,
            used: 2,
            normalize: l != 1,
            score: if l == 2 { RouterScore::Softmax } else { RouterScore::Sigmoid },
            router_bias: l == 2,
            correction: l != 1,
            groups: (l < 2).then_some(ExpertGroups { count: 3, used: 2, by: 1 + l }),
            scale: 1.7,
            shared: shared.filter(|_| l != 2),
            ..Experts::default()
        });
        (f.act, f.bias) = if l == 2 { (Activation::SwigluOai, true) } else { (Activation::Silu, false) };
        (layer.attn, layer.ffn) = (Some(a), Some(f));
    }
    out
}
