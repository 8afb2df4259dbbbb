//! The network's description.

use serde::{Deserialize, Serialize};

use crate::inputs::{AltUp, LayerInputs};
use crate::latent::Latent;
use crate::mixer::Mixer;
use crate::mixture::Experts;
use crate::place::{Part, Place, Role};

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
    /// Factor on what attention and the FFN add to the residual stream (1 for most).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub residual_scale: f32,
    /// A bias on the logits, `[vocab]`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub head_bias: bool,
    /// A norm on the embedding's rows, before the first block.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub embed_norm: bool,
    /// What every block is given of each token beside the residual stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_inputs: Option<LayerInputs>,
    /// Several residual streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub altup: Option<AltUp>,
}

/// A network of nothing, under which stands what most networks say: for the fields that a mapping does not name.
impl Default for Spec {
    fn default() -> Spec {
        Spec {
            arch: String::new(),
            hidden: 0,
            vocab: 0,
            context: 0,
            embed_scale: 1.0,
            tied: false,
            positions: Positions::None,
            norm: Norm::default(),
            final_norm: true,
            layers: Vec::new(),
            logit_softcap: None,
            logit_scale: 1.0,
            residual_scale: 1.0,
            head_bias: false,
            embed_norm: false,
            layer_inputs: None,
            altup: None,
        }
    }
}

fn one() -> f32 {
    1.0
}

fn is_one(x: &f32) -> bool {
    *x == 1.0
}

fn yes() -> bool {
    true
}

fn is_default<T: Default + PartialEq>(x: &T) -> bool {
    *x == T::default()
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
    /// Which vectors the norms have.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vectors: NormVectors,
}

impl Default for Norm {
    fn default() -> Norm {
        Norm { kind: NormKind::Rms, eps: 1e-5, offset: 0.0, divisor: None, vectors: NormVectors::All }
    }
}

/// The vectors of a normalisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormVectors {
    /// All that its kind has: a scale, and of LayerNorm a bias.
    #[default]
    All,
    /// A scale alone.
    Scale,
    /// None: scales are 1, biases 0.
    None,
}

impl Norm {
    /// Whether it has a scale, or a bias.
    pub fn has(&self, part: Part) -> bool {
        match (self.vectors, part) {
            (NormVectors::None, _) => false,
            (_, Part::Weight) => true,
            (vectors, Part::Bias) => vectors == NormVectors::All && self.kind == NormKind::Layer,
        }
    }
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
    /// What the FFN reads.
    #[serde(default, skip_serializing_if = "is_default")]
    pub order: Order,
    /// The layer, before this one and with weights of its own, whose weights this one uses. Keys, values and states are
    /// its own all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<usize>,
    /// A learned number that all of the stream behind the block is multiplied with.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub output_scale: bool,
    /// LAuReL: what two matrices of this rank between them make of attention's normed input, normed, with that input
    /// itself, is added to the stream behind attention, which is then divided by the root of 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub laurel: Option<usize>,
}

/// How attention and the FFN of a block stand to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// One after the other: the FFN reads the residual stream behind attention.
    #[default]
    Sequential,
    /// Side by side: both read the stream before the block, each through a norm of its own, and both are added.
    Parallel,
    /// Side by side behind one norm, that before attention, which stands where either part does.
    Shared,
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
    /// A query at position `p` sees keys of its own run of so many positions alone: `p / chunk * chunk ..= p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
    /// Rotary positions.
    pub rope: Option<Rope>,
    /// A norm on queries and keys, before RoPE.
    pub qk_norm: bool,
    /// What that norm goes over.
    #[serde(default, skip_serializing_if = "is_default")]
    pub qk_norm_over: QkNorm,
    /// That norm stands behind RoPE.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub qk_norm_after_rope: bool,
    /// `c * tanh(scores / c)`.
    pub softcap: Option<f32>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// A norm on the output before it is added.
    pub post_norm: bool,
    /// A norm on the residual stream before q, k and v.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub pre_norm: bool,
    /// q, k and v are cut to `-clip ..= clip` behind their biases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f32>,
    /// Queries grow with their position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<Temperature>,
    /// ALiBi: each head adds to its scores a slope times the distance from key to query (a negative number); the
    /// slopes are `2^(-n i / heads)` for `i` from 1, `n` being this (8 for most). Where the number of heads is no
    /// power of 2, those of the power below come first, then every second one of the power above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alibi: Option<f32>,
    /// A learned logit for each query head beside those of its keys: it takes weight and gives nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sinks: bool,
    /// Keys and values are made from a latent, which is what is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<Latent>,
    /// Whether what is put together from the values is multiplied with `sigmoid(attn.gate h)` before o.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gate: bool,
    /// Factor on what o puts out (1 for most).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub out_scale: f32,
    /// Keys and values are those of this earlier block, which has some of its own: no k, no v.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_from: Option<usize>,
    /// Values are what k puts out, before the norm of keys and RoPE: no v.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub v_is_k: bool,
    /// An RMS norm without a scale on each head of the values.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub v_norm: bool,
}

/// What a norm of queries and keys goes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Each head, with one scale for all of them, `[head_dim]`.
    #[default]
    Head,
    /// Each head, with a scale of its own and no bias, `[heads * head_dim]`.
    Heads,
    /// All heads together, `[heads * head_dim]`.
    Whole,
    /// Each head, without a scale: an RMS norm.
    Plain,
}

/// A factor on queries that grows with their position `p`: `1 + beta * ln(1 + floor((p + shift) / period))`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Temperature {
    /// How much.
    pub beta: f32,
    /// Positions that share a factor.
    pub period: usize,
    /// Added to the position.
    pub shift: usize,
}

impl Temperature {
    /// The factor at a position.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + f64::from(self.beta) * (1.0 + ((position + self.shift) / self.period) as f64).ln()
    }
}

/// One head of no width, and nothing beside: for the fields that a mapping does not name.
impl Default for AttnSpec {
    fn default() -> AttnSpec {
        AttnSpec {
            heads: 1,
            kv_heads: 1,
            head_dim: 0,
            scale: 1.0,
            window: None,
            chunk: None,
            rope: None,
            qk_norm: false,
            qk_norm_over: QkNorm::Head,
            qk_norm_after_rope: false,
            softcap: None,
            qkv_bias: false,
            o_bias: false,
            post_norm: false,
            pre_norm: true,
            clip: None,
            temperature: None,
            alibi: None,
            sinks: false,
            latent: None,
            gate: false,
            out_scale: 1.0,
            kv_from: None,
            v_is_k: false,
            v_norm: false,
        }
    }
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
    /// A norm on the residual stream before the part; never where it shares attention's ([`Order::Shared`]).
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub pre_norm: bool,
    /// Factor on what gate puts out, before the non-linearity (1 for most); never of experts.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub gate_scale: f32,
    /// Factor on what down puts out (1 for most); never of experts.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub down_scale: f32,
    /// Of the gate that share of channels, were a row's normally distributed, falls below a cutoff: those are 0 before
    /// the non-linearity, and the others less the cutoff.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f32>,
}

/// A gated part of no width: for the fields that a mapping does not name.
impl Default for FfnSpec {
    fn default() -> FfnSpec {
        FfnSpec {
            width: 0,
            gated: true,
            act: Activation::Silu,
            bias: false,
            down_bias: false,
            post_norm: false,
            experts: None,
            pre_norm: true,
            gate_scale: 1.0,
            down_scale: 1.0,
            sparsity: None,
        }
    }
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
    /// `max(x, 0)²`.
    Relu2,
    /// xIELU: `p x² + x/2` above 0, `n (e^x - 1 - x) + x/2` below (with `x` no nearer to 0 than 1e-6 in the power),
    /// where `p = softplus(a)` and `n = 1/2 + softplus(b)` of two learned numbers.
    Xielu,
    /// `m / (1 + e^(-1.702 m))` with `m = min(x, 7)`, beside an up that is cut to `-7 ..= 7` and then one more
    /// (GPT-OSS): of gated parts alone.
    SwigluOai,
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
    /// The first pairs of all that there are turn, at the pace that all would have; the others do not (Gemma 4).
    Proportional {
        /// How many turn.
        pairs: usize,
        /// The divisor of their frequencies.
        factor: f32,
    },
    /// A divisor for each channel pair, `[dims / 2]`, as GGUF files carry in `rope_freqs.weight`.
    Factors {
        /// The divisors.
        factors: Vec<f32>,
    },
}

impl LayerSpec {
    /// What a layer of number `l` says at odds with itself.
    fn check(&self, l: usize) -> Result<(), SpecError> {
        let fail = |what: String| Err(SpecError { what: format!("layer {l}: {what}") });
        if self.order != Order::Sequential && (self.attn_shortcut || self.ffn_shortcut) {
            return fail("a matrix in a shortcut needs attention and FFN one after the other".into());
        }
        if let Some(rank) = self.laurel {
            let plain = self.attn.as_ref().is_some_and(|a| a.pre_norm) && self.mixer.is_none();
            if rank == 0 || rank > MAX_DIM {
                return fail(format!("LAuReL of rank {rank}"));
            }
            if !plain || self.order != Order::Sequential || self.attn_shortcut {
                return fail("LAuReL beside anything but attention behind a norm of its own".into());
            }
        }
        if let Some(a) = &self.attn {
            if let Some(c) = a.clip.filter(|c| !(c.is_finite() && *c > 0.0)) {
                return fail(format!("q, k and v are cut to {c}"));
            }
            if let Some(n) = a.alibi.filter(|n| !(n.is_finite() && *n > 0.0)) {
                return fail(format!("ALiBi's slopes reach 2^-{n}"));
            }
            if let Some(t) = a.temperature
                && !(t.beta.is_finite() && t.beta >= 0.0 && (1..=MAX_DIM).contains(&t.period) && t.shift <= MAX_DIM)
            {
                return fail(format!("a temperature of {} every {} positions from {}", t.beta, t.period, t.shift));
            }
            if a.chunk == Some(0) {
                return fail("chunks of 0 tokens see nothing".into());
            }
            if a.latent.is_some() && (a.kv_from.is_some() || a.v_is_k || a.v_norm) {
                return fail("keys of another block, or values that are keys or normed, with a latent".into());
            }
            if a.kv_from.is_some() && (a.v_is_k || a.v_norm) {
                return fail("values that are keys or normed, and keys and values of another block".into());
            }
            if self.order == Order::Shared && !a.pre_norm {
                return fail("attention and FFN share a norm that is not there".into());
            }
            if !a.out_scale.is_finite() {
                return fail(format!("attention's output is multiplied by {}", a.out_scale));
            }
            let form = a.qk_norm_over != QkNorm::Head || a.qk_norm_after_rope;
            if form && !a.qk_norm {
                return fail("the form of a norm of queries and keys that is not there".into());
            }
        }
        if let Some(f) = &self.ffn {
            if f.act == Activation::Xielu && (f.gated || f.experts.is_some()) {
                return fail("xIELU in a gated FFN or in experts".into());
            }
            if !(f.gate_scale.is_finite() && f.down_scale.is_finite()) {
                return fail(format!("the FFN's matrices have factors of {} and {}", f.gate_scale, f.down_scale));
            }
            if (f.gate_scale, f.down_scale) != (1.0, 1.0) && (!f.gated || f.experts.is_some()) {
                return fail("factors of an FFN's matrices in one without a gate or in experts".into());
            }
            if let Some(s) = f.sparsity
                && !(s > 0.0 && s < 1.0 && f.gated && f.experts.is_none())
            {
                return fail(format!("a gate of which {s} is cut off, in an FFN without a gate or in experts"));
            }
            if self.order == Order::Shared && f.pre_norm {
                return fail("an FFN that shares attention's norm has one of its own".into());
            }
        }
        Ok(())
    }
}

/// A description that no network can have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct SpecError {
    /// What is wrong, with names and numbers.
    pub what: String,
}

/// Largest dimension accepted anywhere: a bound against hostile headers, far above any model.
pub(crate) const MAX_DIM: usize = 1 << 24;

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
        for (l, layer) in self.layers.iter().enumerate() {
            let Some(n) = layer.like else { continue };
            let Some(other) = self.layers[..l].get(n).filter(|other| other.like.is_none()) else {
                return fail(format!("layer {l} uses the weights of layer {n}, which is none before it with its own"));
            };
            if *other != (LayerSpec { like: None, ..layer.clone() }) {
                return fail(format!("layer {l} uses the weights of layer {n}, which is made otherwise"));
            }
        }
        let factor = |name: &str, x: f32| {
            if x.is_finite() && x != 0.0 { Ok(()) } else { Err(SpecError { what: format!("{name} is {x}") }) }
        };
        factor("embed_scale", self.embed_scale)?;
        factor("logit_scale", self.logit_scale)?;
        if let Some(cap) = self.logit_softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
            return fail(format!("logits are capped at {cap}"));
        }
        finite("residual_scale", self.residual_scale)?;
        finite("norm.offset", self.norm.offset)?;
        if let Some(i) = &self.layer_inputs {
            i.check(self.layers.len())?;
        }
        if let Some(a) = &self.altup {
            a.check(self.hidden)?;
            let other = |l: &LayerSpec| l.order != Order::Sequential || l.attn_shortcut || l.ffn_shortcut;
            if self.layers.iter().any(other) {
                return fail("altup: parts side by side, or matrices in shortcuts, among several streams".into());
            }
            if self.layers.iter().any(|l| l.output_scale) {
                return fail("altup: numbers behind blocks among several streams".into());
            }
        }
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
        let latent = self.layers.iter().filter_map(|l| l.attn.as_ref()).filter(|a| a.latent.is_some());
        let heads = latent.fold(0, |n: usize, a| n.saturating_add(a.heads));
        if heads > 1 << 18 {
            return fail(format!("{heads} heads of latent attention in all layers; at most {} are accepted", 1 << 18));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            layer.check(l)?;
            if let Some(a) = &layer.attn {
                dim(&format!("layer {l}: heads"), a.heads)?;
                dim(&format!("layer {l}: kv_heads"), a.kv_heads)?;
                dim(&format!("layer {l}: head_dim"), a.head_dim)?;
                dim(&format!("layer {l}: heads * head_dim"), a.heads.saturating_mul(a.head_dim))?;
                finite(&format!("layer {l}: attention scale"), a.scale)?;
                if let Some(cap) = a.softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
                    return fail(format!("layer {l}: attention scores are capped at {cap}"));
                }
                if !a.heads.is_multiple_of(a.kv_heads) {
                    return fail(format!(
                        "layer {l}: {} query heads do not divide into {} groups",
                        a.heads, a.kv_heads
                    ));
                }
                a.check_latent(l)?;
                self.check_shared(l, a)?;
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
                        RopeScaling::Proportional { pairs, .. } if *pairs == 0 || *pairs > r.dims / 2 => {
                            return fail(format!("layer {l}: {pairs} of {} pairs turn", r.dims / 2));
                        }
                        RopeScaling::Linear { factor }
                        | RopeScaling::Proportional { factor, .. }
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
                if f.act == Activation::SwigluOai && !f.gated {
                    return fail(format!("layer {l}: swiglu_oai in an FFN without a gate"));
                }
                if let Some(e) = f.experts {
                    e.check(l)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the block that `a` of layer `l` reads keys and values of has such.
    fn check_shared(&self, l: usize, a: &AttnSpec) -> Result<(), SpecError> {
        let Some(from) = a.kv_from else { return Ok(()) };
        let fail = |what: &str| {
            Err(SpecError { what: format!("layer {l} reads the keys and values of layer {from}, {what}") })
        };
        if from >= l {
            return fail("which does not come before it");
        }
        let Some(s) = self.layers[from].attn.as_ref().filter(|s| s.kv_from.is_none()) else {
            return fail("which has none of its own");
        };
        if s.latent.is_some() || (s.kv_heads, s.head_dim) != (a.kv_heads, a.head_dim) {
            return fail("whose heads are others");
        }
        Ok(())
    }

    /// Blocks whose keys and values later ones read, in their order.
    pub fn shared_keys(&self) -> Vec<usize> {
        let mut from: Vec<usize> = self.layers.iter().filter_map(|l| l.attn.as_ref()?.kv_from).collect();
        from.sort_unstable();
        from.dedup();
        from
    }

    /// Columns of all residual streams.
    pub fn streams(&self) -> usize {
        self.altup.map_or(self.hidden, |a| a.inputs.saturating_mul(self.hidden))
    }

    /// Columns of a row that goes from block to block where blocks run one by one: the residual stream (or all of
    /// them), the inputs of all layers, and keys and values, side by side, of each block whose later ones read. Most networks: `hidden`.
    pub fn carried(&self) -> usize {
        let inputs = self.layer_inputs.map_or(0, |i| i.width.saturating_mul(self.layers.len()));
        let wide = |l: &usize| {
            let attn = self.layers.get(*l).and_then(|l| l.attn.as_ref());
            attn.map_or(0, |a| a.kv_heads.saturating_mul(a.head_dim).saturating_mul(2))
        };
        let shared = self.shared_keys();
        shared.iter().map(wide).fold(self.streams().saturating_add(inputs), usize::saturating_add)
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
                (Role::Head, Bias) if self.head_bias => Some((1, self.vocab)),
                (Role::EmbedNorm, part) if self.embed_norm => self.norm.has(part).then_some((1, h)),
                (Role::Positions, Weight) => match self.positions {
                    Positions::Learned { offset } => Some((self.context + offset, h)),
                    Positions::None => None,
                },
                (role, part) if role.is_layer_inputs() => {
                    self.layer_inputs.as_ref()?.shape(role, part, self.layers.len(), h)
                }
                (Role::AltupIn | Role::AltupOut, part) => {
                    let a = self.altup?;
                    let stream = place.expert? as usize;
                    (1..a.inputs).contains(&stream).then(|| a.shape(place.role, part, h)).flatten()
                }
                (Role::FinalNorm, part) if self.final_norm => self.norm.has(part).then_some((1, h)),
                _ => None,
            };
        };
        // One that uses another's weights has none of its own.
        let layer = self.layers.get(l as usize).filter(|layer| layer.like.is_none())?;
        let norm = |on: bool, n: usize| (on && self.norm.has(place.part)).then_some((1, n));
        let linear = |rows: usize, cols: usize, bias: bool| match place.part {
            Weight => Some((rows, cols)),
            Bias => bias.then_some((1, rows)),
        };
        match place.role {
            Role::InputGate | Role::InputOut => {
                let w = self.layer_inputs?.width;
                let (rows, cols) = if place.role == Role::InputGate { (w, h) } else { (h, w) };
                linear(rows, cols, false)
            }
            Role::InputNorm => norm(self.layer_inputs.is_some(), h),
            Role::LaurelIn | Role::LaurelOut => {
                let rank = layer.laurel?;
                let (rows, cols) = if place.role == Role::LaurelIn { (rank, h) } else { (h, rank) };
                linear(rows, cols, false)
            }
            Role::LaurelNorm => norm(layer.laurel.is_some(), h),
            role if role.is_altup() => self.altup?.shape(role, place.part, h),
            Role::OutputScale => (layer.output_scale && place.part == Weight).then_some((1, 1)),
            Role::AttnShortcut => layer.attn_shortcut.then(|| linear(h, h, false)).flatten(),
            Role::FfnShortcut => layer.ffn_shortcut.then(|| linear(h, h, false)).flatten(),
            Role::MixerNorm => norm(layer.mixer.is_some(), h),
            role if role.is_mixer() => layer.mixer.as_ref()?.shape(role, place.part, h),
            Role::AttnNorm if layer.order == Order::Shared => norm(layer.attn.is_some() || layer.ffn.is_some(), h),
            Role::AttnNorm | Role::QNorm | Role::KNorm | Role::AttnPostNorm | Role::AttnGate | Role::Sinks => {
                let a = layer.attn.as_ref()?;
                match place.role {
                    // Beside a mixer it is the mixer's.
                    Role::AttnNorm => norm(a.pre_norm && layer.mixer.is_none(), h),
                    Role::AttnGate => a.gate.then(|| linear(a.heads * a.head_dim, h, a.qkv_bias)).flatten(),
                    Role::AttnPostNorm => norm(a.post_norm, h),
                    Role::Sinks => (a.sinks && place.part == Weight).then_some((1, a.heads)),
                    role => {
                        let heads = if role == Role::QNorm { a.heads } else { a.kv_heads };
                        let on = a.qk_norm && (role == Role::QNorm || a.kv_from.is_none());
                        match a.qk_norm_over {
                            QkNorm::Plain => None,
                            QkNorm::Head => norm(on, a.head_dim),
                            QkNorm::Heads => norm(on && place.part == Weight, heads * a.head_dim),
                            QkNorm::Whole => norm(on, heads * a.head_dim),
                        }
                    }
                }
            }
            role if role.is_attention() => layer.attn.as_ref()?.matrix(h, place),
            role if role.is_in_layer() => {
                let f = layer.ffn.as_ref()?;
                let matrix = matches!(place.role, Role::Gate | Role::Up | Role::Down);
                match (f.experts, place.expert) {
                    (Some(e), Some(i)) if (i as usize) < e.count => {}
                    (Some(_), Some(_)) | (None, Some(_)) => return None,
                    (Some(_), None) if matrix => return None,
                    _ => {}
                }
                let shared = f.experts.and_then(|e| e.shared);
                match place.role {
                    Role::FfnNorm => norm(f.pre_norm, h),
                    Role::FfnPostNorm => norm(f.post_norm, h),
                    Role::ActAbove | Role::ActBelow => {
                        (f.act == Activation::Xielu && place.part == Weight).then_some((1, 1))
                    }
                    Role::Router => f.experts.and_then(|e| linear(e.count, h, e.router_bias)),
                    Role::Correction => {
                        f.experts.filter(|e| e.correction && place.part == Weight).map(|e| (1, e.count))
                    }
                    Role::ExpertScale => {
                        f.experts.filter(|e| e.expert_scale && place.part == Weight).map(|e| (1, e.count))
                    }
                    Role::RouterNorm | Role::ExpertsNorm | Role::ExpertsPostNorm | Role::SharedPostNorm => {
                        norm(f.experts.is_some_and(|e| e.apart), h)
                    }
                    Role::SharedRouter => shared.filter(|s| s.gate).and_then(|_| linear(1, h, false)),
                    Role::SharedGate => shared.filter(|_| f.gated).and_then(|s| linear(s.width, h, f.bias)),
                    Role::SharedUp => shared.and_then(|s| linear(s.width, h, f.bias)),
                    Role::SharedDown => shared.and_then(|s| linear(h, s.width, f.bias)),
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
            if role.is_per_head() {
                let heads = self.layers.get(layer).and_then(|l| l.attn.as_ref()).map_or(0, |a| a.heads);
                places = (0..heads).map(|i| Place::expert(layer, role, i)).collect();
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
        let mut out: Vec<Place> =
            [Role::Embed, Role::Positions, Role::EmbedNorm, Role::LayerInputs, Role::InputsIn, Role::InputsNorm]
                .into_iter()
                .flat_map(global)
                .collect();
        let streams = 1..self.altup.map_or(1, |a| a.inputs);
        let of_streams = |role| streams.clone().map(move |i| Place { expert: Some(i as u32), ..Place::global(role) });
        out.extend(of_streams(Role::AltupIn));
        for l in 0..self.layers.len() {
            out.extend(self.layer_places(l));
        }
        out.extend(of_streams(Role::AltupOut));
        out.extend([Role::FinalNorm, Role::Head].into_iter().flat_map(global));
        out.retain(|p| self.shape(p).is_some());
        out
    }

    /// The layer whose weights a layer uses: itself, for most.
    pub fn weights_of(&self, layer: usize) -> usize {
        self.layers.get(layer).and_then(|l| l.like).unwrap_or(layer)
    }

    /// The first layer that uses another one's weights.
    pub fn first_like(&self) -> Option<usize> {
        self.layers.iter().position(|l| l.like.is_some())
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
