//! Recurrent mixers: what stands in attention's place, or beside it, and keeps a state instead of keys and values.

use serde::{Deserialize, Serialize};

use crate::place::{Part, Role};

/// A recurrent mixer of one block. Its state belongs to the sequence and has the same size however long that is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Mixer {
    /// A gated short convolution (LFM2): `out(c * conv(b * x))`, where `mixer.in` puts out `[b; c; x]`.
    ShortConv(ShortConv),
    /// Mamba-2's selective state space (Dao and Gu, 2024): with `[x; b; c] = silu(conv(in h))` and
    /// `dt = softplus(mixer.dt h)`, each head's state `S`, `[state, head_dim]`, becomes
    /// `exp(-A dt) S + dt b xᵀ`, and `y = cᵀ S + D x`.
    Ssd(Ssd),
    /// The gated delta rule (Yang et al., 2024; Qwen3-Next): with `[q; k; v] = silu(conv(in h))`, q and k of length 1,
    /// each value head's state `S`, `[key_dim, value_dim]`, becomes `a S + b k (v - a kᵀ S)ᵀ`, and `y = qᵀ S / sqrt(key_dim)`;
    /// `a = exp(-A softplus(mixer.dt h))`, `b = sigmoid(mixer.beta h)`.
    Delta(Delta),
    /// Mamba's selective state space (Gu and Dao, 2023) with norms inside (Jamba): with `x = silu(conv(in h))` and a
    /// norm behind each of `mixer.b x`, `mixer.c x` and `mixer.dt_down x`, and `dt = softplus(mixer.dt` of the last`)`,
    /// each channel's state `s`, `[state]`, becomes `exp(-A dt) s + dt x b`, and `y = c·s + D x`; what `mixer.out`
    /// multiplies is `y * silu(z)`.
    Mamba(Mamba),
}

/// See [`Mixer::ShortConv`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShortConv {
    /// Positions that the convolution reads, the row's own among them.
    pub kernel: usize,
    /// Biases on `mixer.in`, the convolution and `mixer.out`.
    pub bias: bool,
}

/// See [`Mixer::Ssd`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ssd {
    /// Heads; a multiple of `groups`.
    pub heads: usize,
    /// Channels of x that a head has.
    pub head_dim: usize,
    /// Rows of a head's state.
    pub state: usize,
    /// Pairs of b and c, each shared by as many heads.
    pub groups: usize,
    /// Positions that the convolution reads, the row's own among them.
    pub kernel: usize,
    /// A bias on the convolution.
    pub conv_bias: bool,
    /// Bounds of dt behind its softplus.
    pub dt_limit: (f32, Option<f32>),
    /// What the gate z and a norm make of y before `mixer.out`.
    pub gate: GateNorm,
    /// Whether the file keeps `ln A`, and not `-A`.
    pub log: bool,
    /// Factors of what the projections put out (Falcon-H1): of z, x, b, c and dt, before any bias, and of `mixer.out`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factors: Option<[f32; 6]>,
}

/// See [`Mixer::Mamba`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba {
    /// Channels of x, each with a state.
    pub channels: usize,
    /// Rows of a channel's state.
    pub state: usize,
    /// Width of what time steps are made of.
    pub rank: usize,
    /// Positions that the convolution reads, the row's own among them.
    pub kernel: usize,
    /// A bias on the convolution.
    pub conv_bias: bool,
    /// Whether the file keeps `ln A`, and not `-A`.
    pub log: bool,
}

/// How the output gate and the norm before `mixer.out` stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GateNorm {
    /// `y * silu(z)`, no norm.
    Gate,
    /// `norm(y * silu(z))`, over each of so many equal pieces of a row.
    GateFirst {
        /// Pieces.
        groups: usize,
    },
    /// `norm(y) * silu(z)`, over each of so many equal pieces of a row.
    NormFirst {
        /// Pieces.
        groups: usize,
    },
}

/// See [`Mixer::Delta`]. The norm before the output gate is over each value head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// Heads of q and k.
    pub key_heads: usize,
    /// Heads of v, each with a state; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a head of q and k.
    pub key_dim: usize,
    /// Width of a head of v.
    pub value_dim: usize,
    /// Positions that the convolution reads, the row's own among them.
    pub kernel: usize,
    /// Whether the file keeps `ln A`, and not `-A`.
    pub log: bool,
    /// Which key head value head `i` reads: `i % key_heads` (llama.cpp's order of value heads) if true, the
    /// `i / (value_heads / key_heads)`th otherwise.
    pub tiled: bool,
}

impl Mixer {
    /// Positions that its convolution reads, the row's own among them.
    pub fn kernel(&self) -> usize {
        match self {
            Mixer::ShortConv(m) => m.kernel,
            Mixer::Ssd(m) => m.kernel,
            Mixer::Delta(m) => m.kernel,
            Mixer::Mamba(m) => m.kernel,
        }
    }

    /// Channels that go through its convolution; `hidden`: of the residual stream.
    pub fn channels(&self, hidden: usize) -> usize {
        match self {
            Mixer::ShortConv(_) => hidden,
            Mixer::Ssd(m) => m.heads * m.head_dim + 2 * m.groups * m.state,
            Mixer::Delta(m) => 2 * m.key_heads * m.key_dim + m.value_heads * m.value_dim,
            Mixer::Mamba(m) => m.channels,
        }
    }

    /// Columns that the heads read: what comes out of the convolution, and what stands beside that.
    pub fn scanned(&self, hidden: usize) -> usize {
        self.channels(hidden) + if let Mixer::Mamba(m) = self { 2 * m.state } else { 0 }
    }

    /// Time steps of a row.
    pub fn steps(&self) -> usize {
        match self {
            Mixer::Mamba(m) => m.channels,
            other => other.heads().map_or(0, |h| h.0),
        }
    }

    /// Heads with a state of their own, the state's rows and its columns; none where the convolution is all there is.
    /// Mamba's channels are the columns of one head.
    pub fn heads(&self) -> Option<(usize, usize, usize)> {
        match self {
            Mixer::ShortConv(_) => None,
            Mixer::Ssd(m) => Some((m.heads, m.state, m.head_dim)),
            Mixer::Delta(m) => Some((m.value_heads, m.key_dim, m.value_dim)),
            Mixer::Mamba(m) => Some((1, m.state, m.channels)),
        }
    }

    /// Columns of what `mixer.out` multiplies.
    pub fn width(&self, hidden: usize) -> usize {
        self.heads().map_or(hidden, |(heads, _, cols)| heads * cols)
    }

    /// Values of a sequence's state: the inputs that the convolution reads again, and the heads' states.
    pub fn state_values(&self, hidden: usize) -> usize {
        let heads = self.heads().map_or(0, |(heads, rows, cols)| heads * rows * cols);
        (self.kernel() - 1) * self.channels(hidden) + heads
    }

    /// The shape of the tensor of a role, as [`crate::Spec::shape`] gives it; norms of the residual stream apart.
    pub(crate) fn shape(&self, role: Role, part: Part, hidden: usize) -> Option<(usize, usize)> {
        let linear = |rows: usize, cols: usize, bias: bool| match part {
            Part::Weight => Some((rows, cols)),
            Part::Bias => bias.then_some((1, rows)),
        };
        let vector = |n: usize| (part == Part::Weight).then_some((1, n));
        let (channels, width) = (self.channels(hidden), self.width(hidden));
        match (role, self) {
            (Role::MixerIn, Mixer::ShortConv(m)) => linear(3 * hidden, hidden, m.bias),
            (Role::MixerIn, _) => linear(channels, hidden, false),
            (Role::MixerConv, Mixer::ShortConv(m)) => linear(channels, m.kernel, m.bias),
            (Role::MixerConv, Mixer::Ssd(m)) => linear(channels, m.kernel, m.conv_bias),
            (Role::MixerConv, Mixer::Delta(m)) => linear(channels, m.kernel, false),
            (Role::MixerConv, Mixer::Mamba(m)) => linear(channels, m.kernel, m.conv_bias),
            (Role::MixerOut, Mixer::ShortConv(m)) => linear(hidden, width, m.bias),
            (Role::MixerOut, _) => linear(hidden, width, false),
            (_, Mixer::ShortConv(_)) => None,
            (Role::MixerZ, _) => linear(width, hidden, false),
            (Role::MixerDtDown, Mixer::Mamba(m)) => linear(m.rank, channels, false),
            (Role::MixerB | Role::MixerC, Mixer::Mamba(m)) => linear(m.state, channels, false),
            (Role::MixerDtNorm, Mixer::Mamba(m)) => vector(m.rank),
            (Role::MixerBNorm | Role::MixerCNorm, Mixer::Mamba(m)) => vector(m.state),
            (Role::MixerDt, Mixer::Mamba(m)) => linear(m.channels, m.rank, true),
            (Role::MixerA, Mixer::Mamba(m)) => vector(m.channels * m.state),
            (Role::MixerD, Mixer::Mamba(m)) => vector(m.channels),
            (Role::MixerDt, _) => linear(self.heads()?.0, hidden, true),
            (Role::MixerA, _) => vector(self.heads()?.0),
            (Role::MixerD, Mixer::Ssd(m)) => vector(m.heads),
            (Role::MixerOutNorm, Mixer::Ssd(m)) if m.gate != GateNorm::Gate => vector(width),
            (Role::MixerBeta, Mixer::Delta(m)) => linear(m.value_heads, hidden, false),
            (Role::MixerOutNorm, Mixer::Delta(m)) => vector(m.value_dim),
            _ => None,
        }
    }

    /// What is wrong with it, where something is.
    pub(crate) fn fault(&self, hidden: usize) -> Option<String> {
        const MOST: usize = 1 << 24;
        let dims: Vec<(&str, usize)> = match self {
            Mixer::ShortConv(m) => vec![("kernel", m.kernel)],
            Mixer::Ssd(m) => vec![
                ("kernel", m.kernel),
                ("heads", m.heads),
                ("head_dim", m.head_dim),
                ("state", m.state),
                ("groups", m.groups),
            ],
            Mixer::Delta(m) => vec![
                ("kernel", m.kernel),
                ("key_heads", m.key_heads),
                ("value_heads", m.value_heads),
                ("key_dim", m.key_dim),
                ("value_dim", m.value_dim),
            ],
            Mixer::Mamba(m) => {
                vec![("kernel", m.kernel), ("channels", m.channels), ("state", m.state), ("rank", m.rank)]
            }
        };
        if let Some((name, n)) = dims.iter().find(|(_, n)| *n == 0 || *n > MOST) {
            return Some(format!("{name} is {n}; it must be 1 to {MOST}"));
        }
        if self.kernel() > 256 {
            return Some(format!("a convolution over {} positions; at most 256 are accepted", self.kernel()));
        }
        let products: &[(&str, [usize; 3])] = &match self {
            Mixer::ShortConv(_) => [("channels", [hidden, 3, 1]), ("channels", [hidden, 3, 1])],
            Mixer::Ssd(m) => {
                [("heads * head_dim", [m.heads, m.head_dim, 2]), ("groups * state", [m.groups, m.state, 4])]
            }
            Mixer::Delta(m) => [
                ("key_heads * key_dim", [m.key_heads, m.key_dim, 4]),
                ("value_heads * value_dim", [m.value_heads, m.value_dim, 2]),
            ],
            Mixer::Mamba(m) => [("channels * state", [m.channels, m.state, 1]), ("rank", [m.rank, 1, 1])],
        };
        for (name, factors) in products {
            let n = factors.iter().fold(1usize, |n, f| n.saturating_mul(*f));
            if n > MOST {
                return Some(format!("{name} is {}, far beyond any model", n / factors[2]));
            }
        }
        if let Some((heads, rows, cols)) = self.heads()
            && heads.saturating_mul(rows).saturating_mul(cols) > 1 << 28
        {
            return Some(format!("states of {heads} heads of {rows} x {cols}, far beyond any model"));
        }
        match self {
            Mixer::Ssd(m) if !m.heads.is_multiple_of(m.groups) => {
                Some(format!("{} heads do not divide into {} groups", m.heads, m.groups))
            }
            Mixer::Ssd(m) => {
                if let GateNorm::GateFirst { groups } | GateNorm::NormFirst { groups } = m.gate
                    && (groups == 0 || !(m.heads * m.head_dim).is_multiple_of(groups))
                {
                    return Some(format!("a norm over {groups} pieces of {} channels", m.heads * m.head_dim));
                }
                let (low, high) = (m.dt_limit.0, m.dt_limit.1.unwrap_or(f32::MAX));
                if !(low >= 0.0 && high >= low && high.is_finite()) {
                    return Some(format!("dt between {low} and {high}"));
                }
                let bad = m.factors.iter().flatten().find(|f| !f.is_finite());
                bad.map(|f| format!("a factor of {f}"))
            }
            Mixer::Delta(m) if !m.value_heads.is_multiple_of(m.key_heads) => {
                Some(format!("{} value heads do not divide among {} key heads", m.value_heads, m.key_heads))
            }
            _ => None,
        }
    }
}
