//! The network's description.

use serde::{Deserialize, Serialize};

use crate::mixer::Mixer;
use crate::place::{Place, Role};

/// A decoder-only language model as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The family the model came from (`llama`, `qwen3`, ...): for people and for export, never asked by the decoder.
    pub arch: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence the model was made for, tokens.
    pub context: usize,
    /// Factor on embeddings before the first block (Gemma: `sqrt(hidden)`, rounded as its source rounds it).
    pub embed_scale: f32,
    /// Whether the head is the embedding itself.
    pub tied: bool,
    /// How positions enter outside attention.
    pub positions: Positions,
    /// The norms of the whole model.
    pub norm: Norm,
    /// Whether a norm stands before the head.
    pub final_norm: bool,
    /// The decoder blocks, first to last.
    pub layers: Vec<LayerSpec>,
    /// `c * tanh(logits / c)` on the logits.
    pub logit_softcap: Option<f32>,
    /// Factor on the logits (1 for most).
    pub logit_scale: f32,
}

/// How positions enter outside attention.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Positions {
    /// Not at all (RoPE or nothing inside attention).
    None,
    /// A learned row added to the embedding; row `position + offset` (GPT-2: 0, OPT: 2).
    Learned {
        /// Row of position 0.
        offset: usize,
    },
}

/// A normalisation's kind and constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// RMS or LayerNorm.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f32,
    /// Added to the stored scale (Gemma's safetensors: 1, since the file keeps `scale - 1`).
    pub offset: f32,
    /// What the sum of squares of the residual stream's RMS norms is divided by, where that is not their width: a
    /// stream that lost channels still stands under the root that was made for all of them. Norms of heads know
    /// nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divisor: Option<usize>,
}

/// Kinds of normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * scale`, the mean over the divisor where there is one.
    Rms,
    /// `(x - mean) / sqrt(var + eps) * scale + bias`.
    Layer,
}

/// One decoder block. A part that pruning removed is `None`: the residual stream passes by, through the part's shortcut
/// where there is one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// Attention.
    pub attn: Option<AttnSpec>,
    /// A recurrent mixer, in attention's place or beside it: then both read one norm, the mixer's, and their outputs
    /// are added together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixer: Option<Mixer>,
    /// Feed-forward.
    pub ffn: Option<FfnSpec>,
    /// A matrix in the shortcut around attention: `x Sᵀ + attention(norm(x))`. It stays where the part goes, since what
    /// comes behind it stands in its axes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attn_shortcut: bool,
    /// The same around the FFN.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ffn_shortcut: bool,
}

/// Attention of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttnSpec {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores (most: `1 / sqrt(head_dim)`).
    pub scale: f32,
    /// A query at position `p` sees keys at `p - window + 1 ..= p`; `None`: all earlier ones.
    pub window: Option<usize>,
    /// Rotary positions.
    pub rope: Option<Rope>,
    /// Norm on each query and key head before RoPE.
    pub qk_norm: bool,
    /// `c * tanh(scores / c)`.
    pub softcap: Option<f32>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// A norm on the output before it is added.
    pub post_norm: bool,
    /// Whether what is put together from the values is multiplied with `sigmoid(attn.gate h)` before o.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gate: bool,
}

/// Feed-forward of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnSpec {
    /// Inner width (of one expert where there are experts).
    pub width: usize,
    /// `down(act(gate x) * up x)` if true, `down(act(up x))` otherwise.
    pub gated: bool,
    /// The non-linearity.
    pub act: Activation,
    /// Biases on gate, up and down.
    pub bias: bool,
    /// A bias on down alone, `bias` being false: what pruned channels wrote on average.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub down_bias: bool,
    /// A norm on the output before it is added.
    pub post_norm: bool,
    /// A mixture of experts.
    pub experts: Option<Experts>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses.
    pub used: usize,
    /// Whether the softmax weights of the used ones are made to sum to 1.
    pub normalize: bool,
}

/// Non-linearities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU through the error function.
    Gelu,
    /// GELU through tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
}

/// Which pairs of a head's channels turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyle {
    /// Channels `i` and `i + dims/2` (Hugging Face layout).
    Half,
    /// Channels `2i` and `2i + 1` (llama's GGUF layout).
    Interleaved,
}

/// Rotary positions of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Channels of a head that turn (the first ones).
    pub dims: usize,
    /// Which channels pair.
    pub style: RopeStyle,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Stretching of RoPE frequencies; names and letters as in transformers' `rope_scaling`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high kept, a smooth passage between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context before stretching, tokens.
        original: usize,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        /// The stretch.
        factor: f32,
        /// Rotations above which a channel is kept.
        beta_fast: f32,
        /// Rotations below which a channel is divided.
        beta_slow: f32,
        /// Factor on cos and sin; 0.1 ln(factor) + 1 unless the file says otherwise.
        attention_factor: f32,
        /// Context before stretching, tokens.
        original: usize,
        /// Whether the ramp's bounds are rounded outward to whole channels (transformers' `truncate`; most: true).
        truncate: bool,
    },
    /// LongRoPE (Ding et al., 2024): a divisor for each channel pair, one list for short and one for long sequences.
    Longrope {
        /// Divisors while the sequence is within `original`, `[dims / 2]`.
        short: Vec<f32>,
        /// Divisors beyond, `[dims / 2]`.
        long: Vec<f32>,
        /// Factor on cos and sin.
        attention_factor: f32,
        /// Context before stretching, tokens.
        original: usize,
    },
    /// A divisor for each channel pair, `[dims / 2]`, as GGUF files carry in `rope_freqs.weight`.
    Factors {
        /// The divisors.
        factors: Vec<f32>,
    },
}

/// A description that no network can have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct SpecError {
    /// What is wrong, with names and numbers.
    pub what: String,
}

/// Largest dimension accepted anywhere: a bound against hostile headers, far above any model.
const MAX_DIM: usize = 1 << 24;

impl Spec {
    /// Checks that every dimension is sane and that they agree. Files are read against a checked spec only.
    pub fn check(&self) -> Result<(), SpecError> {
        let fail = |what: String| Err(SpecError { what });
        let dim = |name: &str, n: usize| {
            if n == 0 || n > MAX_DIM {
                Err(SpecError { what: format!("{name} is {n}; it must be 1 to {MAX_DIM}") })
            } else {
                Ok(())
            }
        };
        dim("hidden", self.hidden)?;
        dim("vocab", self.vocab)?;
        dim("context", self.context)?;
        if self.layers.len() > 4096 {
            return fail(format!("{} layers; at most 4096 are accepted", self.layers.len()));
        }
        let finite = |name: &str, x: f32| {
            if x.is_finite() { Ok(()) } else { Err(SpecError { what: format!("{name} is {x}") }) }
        };
        finite("embed_scale", self.embed_scale)?;
        finite("logit_scale", self.logit_scale)?;
        finite("norm.offset", self.norm.offset)?;
        if !(self.norm.eps >= 0.0 && self.norm.eps < 1.0) {
            return fail(format!("norm.eps is {}", self.norm.eps));
        }
        if let Some(n) = self.norm.divisor {
            dim("norm.divisor", n)?;
            if n < self.hidden {
                return fail(format!("norm.divisor is {n}, less than the {} channels it stands for", self.hidden));
            }
            if self.norm.kind != NormKind::Rms {
                return fail(format!("norm.divisor is {n}; only RMS norms have one"));
            }
        }
        // A few bytes of a hostile file could otherwise announce a billion tensors.
        let experts =
            self.layers.iter().filter_map(|l| l.ffn.as_ref()?.experts).fold(0, |n: usize, e| n.saturating_add(e.count));
        if experts > 1 << 18 {
            return fail(format!("{experts} experts in all layers; at most {} are accepted", 1 << 18));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            if let Some(a) = &layer.attn {
                dim(&format!("layer {l}: heads"), a.heads)?;
                dim(&format!("layer {l}: kv_heads"), a.kv_heads)?;
                dim(&format!("layer {l}: head_dim"), a.head_dim)?;
                dim(&format!("layer {l}: heads * head_dim"), a.heads.saturating_mul(a.head_dim))?;
                finite(&format!("layer {l}: attention scale"), a.scale)?;
                if !a.heads.is_multiple_of(a.kv_heads) {
                    return fail(format!(
                        "layer {l}: {} query heads do not divide into {} groups",
                        a.heads, a.kv_heads
                    ));
                }
                if a.window == Some(0) {
                    return fail(format!("layer {l}: a window of 0 tokens sees nothing"));
                }
                if let Some(r) = &a.rope {
                    if r.dims == 0 || r.dims % 2 != 0 || r.dims > a.head_dim {
                        return fail(format!("layer {l}: RoPE over {} of {} channels", r.dims, a.head_dim));
                    }
                    if !(r.theta.is_finite() && r.theta > 0.0) {
                        return fail(format!("layer {l}: RoPE base {}", r.theta));
                    }
                    let lists: &[&Vec<f32>] = match &r.scaling {
                        RopeScaling::Longrope { short, long, .. } => &[short, long],
                        RopeScaling::Factors { factors } => &[factors],
                        RopeScaling::Linear { factor }
                        | RopeScaling::Llama3 { factor, .. }
                        | RopeScaling::Yarn { factor, .. }
                            if !(factor.is_finite() && *factor > 0.0) =>
                        {
                            return fail(format!("layer {l}: RoPE scaling factor {factor}"));
                        }
                        _ => &[],
                    };
                    for list in lists {
                        if list.len() != r.dims / 2 || list.iter().any(|x| !(x.is_finite() && *x > 0.0)) {
                            return fail(format!(
                                "layer {l}: RoPE needs {} positive factors, got {}",
                                r.dims / 2,
                                list.len()
                            ));
                        }
                    }
                }
            }
            if let Some(what) = layer.mixer.as_ref().and_then(|m| m.fault(self.hidden)) {
                return fail(format!("layer {l}: mixer: {what}"));
            }
            if layer.mixer.is_some() && layer.attn_shortcut {
                return fail(format!("layer {l}: a matrix in the shortcut around a mixer"));
            }
            if let Some(f) = &layer.ffn {
                dim(&format!("layer {l}: FFN width"), f.width)?;
                if f.bias && f.down_bias {
                    return fail(format!("layer {l}: a bias on down is said twice, by bias and by down_bias"));
                }
                if let Some(e) = f.experts
                    && (e.count == 0 || e.count > 65536 || e.used == 0 || e.used > e.count)
                {
                    return fail(format!("layer {l}: {} of {} experts", e.used, e.count));
                }
            }
        }
        Ok(())
    }

    /// The shape `[rows, cols]` of the tensor at `place` (vectors are `[1, n]`), or `None` where this network has no
    /// such tensor.
    ///
    /// Learned positions are the exception: their row count is the file's.
    pub fn shape(&self, place: &Place) -> Option<(usize, usize)> {
        use crate::place::Part::{Bias, Weight};
        let h = self.hidden;
        let Some(l) = place.layer else {
            return match (place.role, place.part) {
                (Role::Embed, Weight) => Some((self.vocab, h)),
                (Role::Head, Weight) if !self.tied => Some((self.vocab, h)),
                (Role::Positions, Weight) => match self.positions {
                    Positions::Learned { offset } => Some((self.context + offset, h)),
                    Positions::None => None,
                },
                (Role::FinalNorm, Weight) if self.final_norm => Some((1, h)),
                (Role::FinalNorm, Bias) if self.final_norm && self.norm.kind == NormKind::Layer => Some((1, h)),
                _ => None,
            };
        };
        let layer = self.layers.get(l as usize)?;
        let norm = |on: bool, n: usize| match place.part {
            Weight => on.then_some((1, n)),
            Bias => (on && self.norm.kind == NormKind::Layer).then_some((1, n)),
        };
        let linear = |rows: usize, cols: usize, bias: bool| match place.part {
            Weight => Some((rows, cols)),
            Bias => bias.then_some((1, rows)),
        };
        match place.role {
            Role::AttnShortcut => layer.attn_shortcut.then(|| linear(h, h, false)).flatten(),
            Role::FfnShortcut => layer.ffn_shortcut.then(|| linear(h, h, false)).flatten(),
            Role::MixerNorm => norm(layer.mixer.is_some(), h),
            role if layer.mixer.is_some() && role.is_mixer() => layer.mixer.as_ref()?.shape(role, place.part, h),
            Role::AttnNorm
            | Role::Q
            | Role::K
            | Role::V
            | Role::O
            | Role::QNorm
            | Role::KNorm
            | Role::AttnGate
            | Role::AttnPostNorm => {
                let a = layer.attn.as_ref()?;
                match place.role {
                    // Beside a mixer it is the mixer's.
                    Role::AttnNorm => norm(layer.mixer.is_none(), h),
                    Role::AttnGate => a.gate.then(|| linear(a.heads * a.head_dim, h, a.qkv_bias)).flatten(),
                    Role::AttnPostNorm => norm(a.post_norm, h),
                    Role::QNorm | Role::KNorm => norm(a.qk_norm, a.head_dim),
                    Role::Q => linear(a.heads * a.head_dim, h, a.qkv_bias),
                    Role::K | Role::V => linear(a.kv_heads * a.head_dim, h, a.qkv_bias),
                    _ => linear(h, a.heads * a.head_dim, a.o_bias),
                }
            }
            Role::FfnNorm | Role::Gate | Role::Up | Role::Down | Role::Router | Role::FfnPostNorm => {
                let f = layer.ffn.as_ref()?;
                let matrix = matches!(place.role, Role::Gate | Role::Up | Role::Down);
                match (f.experts, place.expert) {
                    (Some(e), Some(i)) if (i as usize) < e.count => {}
                    (Some(_), Some(_)) | (None, Some(_)) => return None,
                    (Some(_), None) if matrix => return None,
                    _ => {}
                }
                match place.role {
                    Role::FfnNorm => norm(true, h),
                    Role::FfnPostNorm => norm(f.post_norm, h),
                    Role::Router => f.experts.and_then(|e| linear(e.count, h, false)),
                    Role::Gate => f.gated.then(|| linear(f.width, h, f.bias)).flatten(),
                    Role::Up => linear(f.width, h, f.bias),
                    _ => linear(h, f.width, f.bias || f.down_bias),
                }
            }
            _ => None,
        }
    }

    /// The weights and biases of block `layer`, in the order in which a token meets them.
    pub fn layer_places(&self, layer: usize) -> Vec<Place> {
        let mut out = Vec::new();
        for role in Role::ALL.into_iter().filter(|r| r.is_in_layer()) {
            let one = Place::layer(layer, role);
            let experts = self.layers.get(layer).and_then(|l| l.ffn.as_ref()).and_then(|f| f.experts);
            let mut places = vec![one];
            if let (Some(e), Role::Gate | Role::Up | Role::Down) = (experts, role) {
                places = (0..e.count).map(|i| Place::expert(layer, role, i)).collect();
            }
            for p in places.into_iter().flat_map(|p| [p, p.bias()]) {
                if self.shape(&p).is_some() {
                    out.push(p);
                }
            }
        }
        out
    }

    /// Every tensor of the model: embedding first, then block by block, then the rest.
    pub fn places(&self) -> Vec<Place> {
        let global = |role| [Place::global(role), Place::global(role).bias()];
        let mut out: Vec<Place> = [Role::Embed, Role::Positions].into_iter().flat_map(global).collect();
        for l in 0..self.layers.len() {
            out.extend(self.layer_places(l));
        }
        out.extend([Role::FinalNorm, Role::Head].into_iter().flat_map(global));
        out.retain(|p| self.shape(p).is_some());
        out
    }

    /// The first recurrent mixer: such a layer keeps a state and cannot go back to an earlier position.
    pub fn first_mixer(&self) -> Option<usize> {
        self.layers.iter().position(|l| l.mixer.is_some())
    }

    /// The first shortcut that a matrix stands in: only the packed format can say it, and one layer's residual stream
    /// cannot be compared with the next one's.
    pub fn first_shortcut(&self) -> Option<Place> {
        let of = |(l, layer): (usize, &LayerSpec)| match (layer.attn_shortcut, layer.ffn_shortcut) {
            (true, _) => Some(Place::layer(l, Role::AttnShortcut)),
            (_, true) => Some(Place::layer(l, Role::FfnShortcut)),
            _ => None,
        };
        self.layers.iter().enumerate().find_map(of)
    }

    /// Number of parameters: every tensor's entries, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.places().iter().filter_map(|p| self.shape(p)).map(|(r, c)| r as u64 * c as u64).sum()
    }
}
