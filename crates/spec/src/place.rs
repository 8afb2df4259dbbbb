//! Names of tensors: role, layer, expert, weight or bias.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a tensor is for. The text form (`attn.q`) is what recipes and reports use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Token embedding, `[vocab, hidden]`.
    #[serde(rename = "embed")]
    Embed,
    /// Learned positions, `[context + offset, hidden]`.
    #[serde(rename = "positions")]
    Positions,
    /// Norm of the embedding's rows, `[hidden]`.
    #[serde(rename = "embed_norm")]
    EmbedNorm,
    /// Table of the layers' inputs, `[vocab, layers * width]`.
    #[serde(rename = "layer_inputs")]
    LayerInputs,
    /// What the embedding gives to the layers' inputs, `[layers * width, hidden]`.
    #[serde(rename = "layer_inputs.in")]
    InputsIn,
    /// Norm of what the embedding gives to a layer's input, `[width]`.
    #[serde(rename = "layer_inputs.norm")]
    InputsNorm,
    /// What makes another residual stream of the embedding, `[hidden, hidden]`, one for each of them from 1 on.
    #[serde(rename = "altup.in")]
    AltupIn,
    /// Norm before the router of modalities, `[hidden]`.
    #[serde(rename = "altup.router_norm")]
    AltupRouterNorm,
    /// What makes modalities of a stream, `[streams, hidden]`.
    #[serde(rename = "altup.router")]
    AltupRouter,
    /// What makes the weights of predictions of modalities, `[streams * streams, streams]`.
    #[serde(rename = "altup.predict")]
    AltupPredict,
    /// What makes the weights of corrections of modalities, `[streams, streams]`.
    #[serde(rename = "altup.correct")]
    AltupCorrect,
    /// What scales the stream before the gate of inputs, `[hidden]`.
    #[serde(rename = "altup.scale")]
    AltupScale,
    /// What brings another stream back before the head, `[hidden, hidden]`, one for each of them from 1 on.
    #[serde(rename = "altup.out")]
    AltupOut,
    /// LAuReL's first matrix, `[rank, hidden]`.
    #[serde(rename = "attn.laurel.in")]
    LaurelIn,
    /// LAuReL's second matrix, `[hidden, rank]`.
    #[serde(rename = "attn.laurel.out")]
    LaurelOut,
    /// Norm of what LAuReL's matrices make, `[hidden]`.
    #[serde(rename = "attn.laurel.norm")]
    LaurelNorm,
    /// Norm before attention, `[hidden]`; before both parts where they share one.
    #[serde(rename = "attn.norm")]
    AttnNorm,
    /// What the latent of queries is made by, `[q_rank, hidden]` (latent attention).
    #[serde(rename = "attn.q_down")]
    QDown,
    /// Norm of the latent of queries, `[q_rank]`.
    #[serde(rename = "attn.q_down_norm")]
    QDownNorm,
    /// Query projection, `[heads * head_dim, hidden]`; of latent attention `[heads * (plain + turned), q_rank]`.
    #[serde(rename = "attn.q")]
    Q,
    /// What the latent of keys and values and the key that turns are made by, `[rank + turned, hidden]`.
    #[serde(rename = "attn.kv_down")]
    KvDown,
    /// Norm of the latent of keys and values, `[rank]`.
    #[serde(rename = "attn.kv_down_norm")]
    KvDownNorm,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    #[serde(rename = "attn.k")]
    K,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    #[serde(rename = "attn.v")]
    V,
    /// What brings a head's query into the latent's space, `[rank, plain]`: the transpose of what would make keys.
    #[serde(rename = "attn.k_up")]
    KUp,
    /// What makes a head's values of the latent, `[value, rank]`.
    #[serde(rename = "attn.v_up")]
    VUp,
    /// A logit beside the keys of each query head, `[heads]`.
    #[serde(rename = "attn.sinks")]
    Sinks,
    /// Output projection, `[hidden, heads * head_dim]`.
    #[serde(rename = "attn.o")]
    O,
    /// Norm of each query head, `[head_dim]`, or `[heads * head_dim]`.
    #[serde(rename = "attn.q_norm")]
    QNorm,
    /// Norm of each key head, `[head_dim]`, or `[kv_heads * head_dim]`.
    #[serde(rename = "attn.k_norm")]
    KNorm,
    /// Norm of attention's output before it is added (sandwich norms), `[hidden]`.
    #[serde(rename = "attn.post_norm")]
    AttnPostNorm,
    /// Matrix in the shortcut around attention, `[hidden, hidden]`.
    #[serde(rename = "attn.shortcut")]
    AttnShortcut,
    /// What a gated attention's output is multiplied with, through a sigmoid, `[heads * head_dim, hidden]`.
    #[serde(rename = "attn.gate")]
    AttnGate,
    /// Norm before a recurrent mixer, and before the attention beside it, `[hidden]`.
    #[serde(rename = "mixer.norm")]
    MixerNorm,
    /// What goes into a mixer's convolution, `[channels, hidden]` (a short convolution's: `[3 * hidden, hidden]`).
    #[serde(rename = "mixer.in")]
    MixerIn,
    /// A mixer's output gate, `[width, hidden]`.
    #[serde(rename = "mixer.z")]
    MixerZ,
    /// A mixer's time steps, `[heads, hidden]`; Mamba's, `[channels, rank]`.
    #[serde(rename = "mixer.dt")]
    MixerDt,
    /// How much the delta rule writes, `[heads, hidden]`.
    #[serde(rename = "mixer.beta")]
    MixerBeta,
    /// What Mamba's time steps are made of, `[rank, channels]`.
    #[serde(rename = "mixer.dt_down")]
    MixerDtDown,
    /// Norm of that, `[rank]`.
    #[serde(rename = "mixer.dt_norm")]
    MixerDtNorm,
    /// What Mamba writes into its states by, `[state, channels]`.
    #[serde(rename = "mixer.b")]
    MixerB,
    /// Norm of that, `[state]`.
    #[serde(rename = "mixer.b_norm")]
    MixerBNorm,
    /// What Mamba reads its states by, `[state, channels]`.
    #[serde(rename = "mixer.c")]
    MixerC,
    /// Norm of that, `[state]`.
    #[serde(rename = "mixer.c_norm")]
    MixerCNorm,
    /// A mixer's convolution, `[channels, kernel]`, the row's own position last.
    #[serde(rename = "mixer.conv")]
    MixerConv,
    /// How fast each head of a mixer forgets, `[heads]`; Mamba's, `[channels * state]`.
    #[serde(rename = "mixer.a")]
    MixerA,
    /// What each head of a mixer passes by its state, `[heads]`; Mamba's, `[channels]`.
    #[serde(rename = "mixer.d")]
    MixerD,
    /// Norm before a mixer's output projection, `[width]` or `[value_dim]`.
    #[serde(rename = "mixer.out_norm")]
    MixerOutNorm,
    /// A mixer's output projection, `[hidden, width]`.
    #[serde(rename = "mixer.out")]
    MixerOut,
    /// Norm before the FFN, `[hidden]`.
    #[serde(rename = "ffn.norm")]
    FfnNorm,
    /// Gate projection of a gated FFN, `[width, hidden]`.
    #[serde(rename = "ffn.gate")]
    Gate,
    /// Up projection, `[width, hidden]`.
    #[serde(rename = "ffn.up")]
    Up,
    /// xIELU's number for what lies above 0, `[1]`.
    #[serde(rename = "ffn.act_above")]
    ActAbove,
    /// xIELU's number for what lies below 0, `[1]`.
    #[serde(rename = "ffn.act_below")]
    ActBelow,
    /// Down projection, `[hidden, width]`.
    #[serde(rename = "ffn.down")]
    Down,
    /// Router of a mixture of experts, `[experts, hidden]`.
    #[serde(rename = "ffn.router")]
    Router,
    /// What is added to experts' scores where they are chosen, `[experts]`.
    #[serde(rename = "ffn.correction")]
    Correction,
    /// Factor on each expert's weight, `[experts]`.
    #[serde(rename = "ffn.expert_scale")]
    ExpertScale,
    /// Norm before a router that has one of its own, `[hidden]`.
    #[serde(rename = "ffn.router_norm")]
    RouterNorm,
    /// Norm before experts that have one of their own, `[hidden]`.
    #[serde(rename = "ffn.experts_norm")]
    ExpertsNorm,
    /// Norm of what experts put out, before the shared expert is added, `[hidden]`.
    #[serde(rename = "ffn.experts_post_norm")]
    ExpertsPostNorm,
    /// Norm of what the shared expert puts out, `[hidden]`.
    #[serde(rename = "ffn.shared.post_norm")]
    SharedPostNorm,
    /// What a shared expert's output is weighed by, `[1, hidden]`.
    #[serde(rename = "ffn.shared.router")]
    SharedRouter,
    /// Gate projection of the shared expert, `[shared width, hidden]`.
    #[serde(rename = "ffn.shared.gate")]
    SharedGate,
    /// Up projection of the shared expert, `[shared width, hidden]`.
    #[serde(rename = "ffn.shared.up")]
    SharedUp,
    /// Down projection of the shared expert, `[hidden, shared width]`.
    #[serde(rename = "ffn.shared.down")]
    SharedDown,
    /// Norm of the FFN's output before it is added (sandwich norms), `[hidden]`.
    #[serde(rename = "ffn.post_norm")]
    FfnPostNorm,
    /// Matrix in the shortcut around the FFN, `[hidden, hidden]`.
    #[serde(rename = "ffn.shortcut")]
    FfnShortcut,
    /// What gates a layer's input, `[width, hidden]`.
    #[serde(rename = "ffn.input.gate")]
    InputGate,
    /// What makes of a layer's input what is added to the stream, `[hidden, width]`.
    #[serde(rename = "ffn.input.out")]
    InputOut,
    /// Norm of that, `[hidden]`.
    #[serde(rename = "ffn.input.norm")]
    InputNorm,
    /// What the stream behind a block is multiplied with, `[1]`.
    #[serde(rename = "output_scale")]
    OutputScale,
    /// Norm before the head, `[hidden]`.
    #[serde(rename = "norm")]
    FinalNorm,
    /// Output projection to the vocabulary, `[vocab, hidden]`.
    #[serde(rename = "head")]
    Head,
}

impl Role {
    /// Every role, in the order in which a token meets them.
    pub const ALL: [Role; 74] = [
        Role::Embed,
        Role::Positions,
        Role::EmbedNorm,
        Role::LayerInputs,
        Role::InputsIn,
        Role::InputsNorm,
        Role::AltupIn,
        Role::AltupRouterNorm,
        Role::AltupRouter,
        Role::AltupPredict,
        Role::AttnNorm,
        Role::QDown,
        Role::QDownNorm,
        Role::Q,
        Role::KvDown,
        Role::KvDownNorm,
        Role::K,
        Role::V,
        Role::KUp,
        Role::VUp,
        Role::Sinks,
        Role::O,
        Role::QNorm,
        Role::KNorm,
        Role::AttnGate,
        Role::AttnPostNorm,
        Role::AttnShortcut,
        Role::LaurelIn,
        Role::LaurelOut,
        Role::LaurelNorm,
        Role::MixerNorm,
        Role::MixerIn,
        Role::MixerZ,
        Role::MixerDt,
        Role::MixerBeta,
        Role::MixerConv,
        Role::MixerDtDown,
        Role::MixerDtNorm,
        Role::MixerB,
        Role::MixerBNorm,
        Role::MixerC,
        Role::MixerCNorm,
        Role::MixerA,
        Role::MixerD,
        Role::MixerOutNorm,
        Role::MixerOut,
        Role::FfnNorm,
        Role::RouterNorm,
        Role::Router,
        Role::Correction,
        Role::ExpertScale,
        Role::ExpertsNorm,
        Role::Gate,
        Role::Up,
        Role::ActAbove,
        Role::ActBelow,
        Role::Down,
        Role::SharedRouter,
        Role::SharedGate,
        Role::SharedUp,
        Role::SharedDown,
        Role::SharedPostNorm,
        Role::ExpertsPostNorm,
        Role::FfnPostNorm,
        Role::FfnShortcut,
        Role::AltupCorrect,
        Role::AltupScale,
        Role::InputGate,
        Role::InputOut,
        Role::InputNorm,
        Role::OutputScale,
        Role::AltupOut,
        Role::FinalNorm,
        Role::Head,
    ];

    /// The text form, as in recipes: `attn.q`.
    pub fn name(self) -> &'static str {
        match self {
            Role::Embed => "embed",
            Role::Positions => "positions",
            Role::EmbedNorm => "embed_norm",
            Role::LayerInputs => "layer_inputs",
            Role::InputsIn => "layer_inputs.in",
            Role::InputsNorm => "layer_inputs.norm",
            Role::AltupIn => "altup.in",
            Role::AltupRouterNorm => "altup.router_norm",
            Role::AltupRouter => "altup.router",
            Role::AltupPredict => "altup.predict",
            Role::AltupCorrect => "altup.correct",
            Role::AltupScale => "altup.scale",
            Role::AltupOut => "altup.out",
            Role::LaurelIn => "attn.laurel.in",
            Role::LaurelOut => "attn.laurel.out",
            Role::LaurelNorm => "attn.laurel.norm",
            Role::AttnNorm => "attn.norm",
            Role::QDown => "attn.q_down",
            Role::QDownNorm => "attn.q_down_norm",
            Role::Q => "attn.q",
            Role::KvDown => "attn.kv_down",
            Role::KvDownNorm => "attn.kv_down_norm",
            Role::K => "attn.k",
            Role::V => "attn.v",
            Role::KUp => "attn.k_up",
            Role::VUp => "attn.v_up",
            Role::Sinks => "attn.sinks",
            Role::O => "attn.o",
            Role::QNorm => "attn.q_norm",
            Role::KNorm => "attn.k_norm",
            Role::AttnPostNorm => "attn.post_norm",
            Role::AttnGate => "attn.gate",
            Role::AttnShortcut => "attn.shortcut",
            Role::MixerNorm => "mixer.norm",
            Role::MixerIn => "mixer.in",
            Role::MixerZ => "mixer.z",
            Role::MixerDt => "mixer.dt",
            Role::MixerBeta => "mixer.beta",
            Role::MixerDtDown => "mixer.dt_down",
            Role::MixerDtNorm => "mixer.dt_norm",
            Role::MixerB => "mixer.b",
            Role::MixerBNorm => "mixer.b_norm",
            Role::MixerC => "mixer.c",
            Role::MixerCNorm => "mixer.c_norm",
            Role::MixerConv => "mixer.conv",
            Role::MixerA => "mixer.a",
            Role::MixerD => "mixer.d",
            Role::MixerOutNorm => "mixer.out_norm",
            Role::MixerOut => "mixer.out",
            Role::FfnNorm => "ffn.norm",
            Role::Gate => "ffn.gate",
            Role::Up => "ffn.up",
            Role::ActAbove => "ffn.act_above",
            Role::ActBelow => "ffn.act_below",
            Role::Down => "ffn.down",
            Role::Router => "ffn.router",
            Role::Correction => "ffn.correction",
            Role::ExpertScale => "ffn.expert_scale",
            Role::RouterNorm => "ffn.router_norm",
            Role::ExpertsNorm => "ffn.experts_norm",
            Role::ExpertsPostNorm => "ffn.experts_post_norm",
            Role::SharedPostNorm => "ffn.shared.post_norm",
            Role::SharedRouter => "ffn.shared.router",
            Role::SharedGate => "ffn.shared.gate",
            Role::SharedUp => "ffn.shared.up",
            Role::SharedDown => "ffn.shared.down",
            Role::FfnPostNorm => "ffn.post_norm",
            Role::FfnShortcut => "ffn.shortcut",
            Role::InputGate => "ffn.input.gate",
            Role::InputOut => "ffn.input.out",
            Role::InputNorm => "ffn.input.norm",
            Role::OutputScale => "output_scale",
            Role::FinalNorm => "norm",
            Role::Head => "head",
        }
    }

    /// Whether the weight is a matrix that multiplies activations (what compression aims at), not a norm or a table of
    /// positions.
    pub fn is_linear(self) -> bool {
        self.is_shortcut()
            || self.is_mixer_linear()
            || matches!(
                self,
                Role::Q | Role::K | Role::V | Role::O | Role::Gate | Role::Up | Role::Down | Role::Router | Role::Head
            )
            || self == Role::AttnGate
            || matches!(self, Role::InputsIn | Role::InputGate | Role::InputOut | Role::LaurelIn | Role::LaurelOut)
            || self.is_stream()
            || matches!(self, Role::AltupRouter | Role::AltupPredict | Role::AltupCorrect)
            || matches!(self, Role::QDown | Role::KvDown | Role::KUp | Role::VUp)
            || matches!(self, Role::SharedRouter | Role::SharedGate | Role::SharedUp | Role::SharedDown)
    }

    /// Whether the tensor is attention's.
    pub fn is_attention(self) -> bool {
        self.name().starts_with("attn.") && !self.is_shortcut()
    }

    /// Whether every head has a matrix of its own, which [`Place::expert`] numbers.
    pub fn is_per_head(self) -> bool {
        matches!(self, Role::KUp | Role::VUp)
    }

    /// Whether it is a router, of experts or of the shared one: tiny, and what tokens become hangs on its last bits.
    pub fn is_router(self) -> bool {
        matches!(self, Role::Router | Role::SharedRouter)
    }

    fn is_mixer_linear(self) -> bool {
        self.is_mixer_inner()
            || matches!(self, Role::MixerIn | Role::MixerZ | Role::MixerDt | Role::MixerBeta | Role::MixerOut)
    }

    /// Whether the matrix reads what a mixer's convolution put out.
    fn is_mixer_inner(self) -> bool {
        matches!(self, Role::MixerDtDown | Role::MixerB | Role::MixerC)
    }

    /// Whether the tensor is a norm within a mixer, of an RMS norm's scale that lies whole in every layout.
    pub fn is_mixer_own_norm(self) -> bool {
        matches!(self, Role::MixerOutNorm | Role::MixerDtNorm | Role::MixerBNorm | Role::MixerCNorm)
    }

    /// Whether the tensor is a recurrent mixer's own, its norm included.
    pub fn is_mixer(self) -> bool {
        self.is_mixer_linear()
            || self.is_mixer_own_norm()
            || matches!(self, Role::MixerNorm | Role::MixerConv | Role::MixerA | Role::MixerD)
    }

    /// Whether the tensor has two axes: a matrix that multiplies activations, a table of rows, or a convolution.
    pub fn is_table(self) -> bool {
        self.is_linear() || self.is_lookup() || matches!(self, Role::Positions | Role::MixerConv)
    }

    /// Whether every residual stream but the first has a matrix of its own, which [`Place::expert`] numbers.
    pub fn is_stream(self) -> bool {
        matches!(self, Role::AltupIn | Role::AltupOut)
    }

    /// Whether a block predicts and corrects several residual streams by it.
    pub fn is_altup(self) -> bool {
        self.name().starts_with("altup.") && !self.is_stream()
    }

    /// Whether it is a table with a row for each token.
    pub fn is_lookup(self) -> bool {
        matches!(self, Role::Embed | Role::LayerInputs)
    }

    /// Whether the tensor makes the inputs of layers, outside of the blocks.
    pub fn is_layer_inputs(self) -> bool {
        matches!(self, Role::LayerInputs | Role::InputsIn | Role::InputsNorm)
    }

    /// Whether the matrix is so small, and what hangs on its last bits so much, that it is meant by its own name only;
    /// and what makes the inputs of all layers and several streams of one, which nobody calibrates.
    pub fn is_by_name_only(self) -> bool {
        self.is_router()
            || self.is_mixer_inner()
            || matches!(self, Role::MixerDt | Role::MixerBeta | Role::InputsIn)
            || self.name().starts_with("altup.")
    }

    /// Whether the matrix stands in the shortcut around a part.
    pub fn is_shortcut(self) -> bool {
        matches!(self, Role::AttnShortcut | Role::FfnShortcut)
    }

    /// Whether the role stands in every decoder block.
    pub fn is_in_layer(self) -> bool {
        let outside = matches!(self, Role::Embed | Role::Positions | Role::EmbedNorm | Role::FinalNorm | Role::Head);
        !outside && !self.is_layer_inputs() && !self.is_stream()
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(s: &str) -> Result<Role, String> {
        Role::ALL.into_iter().find(|r| r.name() == s).ok_or_else(|| format!("'{s}' is no role of a tensor"))
    }
}

/// The weight of a role, or the bias beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The matrix, or a norm's scale.
    Weight,
    /// The vector added after it.
    Bias,
}

/// One tensor of a model. The text form is `layers.3.attn.q`, `layers.0.ffn.experts.5.up`, `layers.0.attn.heads.2.v_up`,
/// `embed`, with `.bias` behind a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The decoder block, from 0; `None` outside the blocks.
    pub layer: Option<u32>,
    /// What the tensor is for.
    pub role: Role,
    /// The expert, for gate, up and down of a mixture; the head, where each has a matrix ([`Role::is_per_head`]).
    pub expert: Option<u32>,
    /// Weight or bias.
    pub part: Part,
}

impl Place {
    /// The weight of `role` outside the blocks.
    pub fn global(role: Role) -> Place {
        Place { layer: None, role, expert: None, part: Part::Weight }
    }

    /// The weight of `role` in block `layer`.
    pub fn layer(layer: usize, role: Role) -> Place {
        Place { layer: Some(layer as u32), role, expert: None, part: Part::Weight }
    }

    /// The weight of `role` of expert (or head) `expert` in block `layer`.
    pub fn expert(layer: usize, role: Role, expert: usize) -> Place {
        Place { expert: Some(expert as u32), ..Place::layer(layer, role) }
    }

    /// The bias beside this weight.
    pub fn bias(self) -> Place {
        Place { part: Part::Bias, ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(l) = self.layer {
            write!(f, "layers.{l}.")?;
        }
        match self.expert {
            Some(h) if self.role.is_per_head() => {
                write!(f, "attn.heads.{h}.{}", self.role.name().trim_start_matches("attn."))?;
            }
            Some(i) if self.role.is_stream() => {
                write!(f, "altup.streams.{i}.{}", self.role.name().trim_start_matches("altup."))?;
            }
            Some(e) => write!(f, "ffn.experts.{e}.{}", self.role.name().trim_start_matches("ffn."))?,
            None => f.write_str(self.role.name())?,
        }
        if self.part == Part::Bias { f.write_str(".bias") } else { Ok(()) }
    }
}

impl FromStr for Place {
    type Err = String;
    fn from_str(s: &str) -> Result<Place, String> {
        let bad = || format!("'{s}' names no tensor of a model");
        let (rest, part) = match s.strip_suffix(".bias") {
            Some(r) => (r, Part::Bias),
            None => (s, Part::Weight),
        };
        let (rest, layer) = match rest.strip_prefix("layers.") {
            Some(r) => {
                let (n, r) = r.split_once('.').ok_or_else(bad)?;
                (r, Some(n.parse().map_err(|_| bad())?))
            }
            None => (rest, None),
        };
        let numbered = [("ffn.experts.", "ffn"), ("attn.heads.", "attn"), ("altup.streams.", "altup")];
        let (role, expert) = match numbered.iter().find_map(|(p, part)| Some((part, rest.strip_prefix(p)?))) {
            Some((part, r)) => {
                let (n, r) = r.split_once('.').ok_or_else(bad)?;
                (format!("{part}.{r}").parse::<Role>()?, Some(n.parse().map_err(|_| bad())?))
            }
            None => (rest.parse::<Role>()?, None),
        };
        if role.is_in_layer() != layer.is_some() {
            return Err(bad());
        }
        Ok(Place { layer, role, expert, part })
    }
}

impl Serialize for Place {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Place, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a recipe aims at: a role, a family of roles or a pattern of place names, `*` standing for any run of
/// characters.
///
/// `attn.*` is every linear role of attention, `ffn.down` one role, `layers.3.*` every linear matrix of one block,
/// `embed` the embedding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Target(pub String);

impl Target {
    /// Whether `place` (a weight) is meant. Norms, positions, convolutions and biases never are. A router only by its
    /// name: it is tiny, and which experts a token gets hangs on its last bits; a mixer's time steps and a shortcut, too:
    /// what those lose, every later token or block lacks.
    pub fn matches(&self, place: &Place) -> bool {
        let named = |last: &str| self.0.ends_with(last);
        let last = place.role.name().rsplit('.').next().unwrap_or_default();
        if (place.role.is_by_name_only() && !named(last)) || (place.role.is_shortcut() && !named("shortcut")) {
            return false;
        }
        if place.part == Part::Bias || !(place.role.is_linear() || place.role.is_lookup()) {
            return false;
        }
        glob(&self.0, place.role.name()) || glob(&self.0, &place.to_string())
    }
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => {
            let Some(rest) = text.strip_prefix(head) else { return false };
            (0..=rest.len()).filter(|&i| rest.is_char_boundary(i)).any(|i| glob(tail, &rest[i..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for role in Role::ALL {
            assert_eq!(role.name().parse::<Role>(), Ok(role));
            assert_eq!(serde_json::to_string(&role).unwrap(), format!("\"{role}\""));
            let place = if role.is_in_layer() { Place::layer(12, role) } else { Place::global(role) };
            assert_eq!(place.to_string().parse::<Place>(), Ok(place));
            assert_eq!(place.bias().to_string().parse::<Place>(), Ok(place.bias()));
        }
        let h = Place::expert(3, Role::VUp, 7);
        assert_eq!((h.to_string().as_str(), h.to_string().parse::<Place>()), ("layers.3.attn.heads.7.v_up", Ok(h)));
        let e = Place::expert(0, Role::Up, 5);
        assert_eq!(e.to_string(), "layers.0.ffn.experts.5.up");
        assert_eq!(e.to_string().parse::<Place>(), Ok(e));
        assert!("layers.x.attn.q".parse::<Place>().is_err() && "attn.q".parse::<Place>().is_err());
    }

    #[test]
    fn targets() {
        let hit = |t: &str, p: Place| Target(t.into()).matches(&p);
        assert!(hit("attn.*", Place::layer(3, Role::Q)) && !hit("attn.*", Place::layer(3, Role::AttnNorm)));
        assert!(hit("ffn.down", Place::expert(0, Role::Down, 2)) && hit("layers.3.*", Place::layer(3, Role::O)));
        assert!(!hit("layers.3.*", Place::layer(30, Role::O)) && hit("embed", Place::global(Role::Embed)));
        assert!(!hit("attn.*", Place::layer(3, Role::Q).bias()) && hit("*", Place::global(Role::Head)));
        assert!(hit("attn.*", Place::expert(0, Role::KUp, 2)) && hit("attn.k_up", Place::expert(0, Role::KUp, 2)));
        let beside = Place::layer(0, Role::SharedUp);
        assert!(hit("ffn.*", beside) && hit("ffn.shared.*", beside) && !hit("ffn.up", beside));
        assert!(!hit("ffn.*", Place::layer(0, Role::SharedRouter)));
        let router = Place::layer(0, Role::Router);
        assert!(!hit("ffn.*", router) && !hit("*", router) && hit("ffn.router", router));
        let shortcut = Place::layer(3, Role::AttnShortcut);
        assert!(!hit("attn.*", shortcut) && !hit("*", shortcut) && hit("layers.3.attn.shortcut", shortcut));
        assert!(hit("*.shortcut", shortcut) && !hit("ffn.shortcut", shortcut));
        let (into, dt) = (Place::layer(1, Role::MixerIn), Place::layer(1, Role::MixerDt));
        assert!(hit("mixer.*", into) && !hit("attn.*", into) && !hit("mixer.*", dt) && hit("mixer.dt", dt));
        assert!(!hit("mixer.*", Place::layer(1, Role::MixerConv)) && hit("attn.*", Place::layer(1, Role::AttnGate)));
    }
}
