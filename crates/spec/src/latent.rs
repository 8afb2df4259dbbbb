//! Latent attention as data.

use serde::{Deserialize, Serialize};

use crate::place::{Part, Place, Role};
use crate::spec::{AttnSpec, MAX_DIM, SpecError};

/// Latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values are made from one narrow latent a token.
///
/// What is cached is the latent and a key that all heads share and RoPE turns: one key head of `rope.dims + rank`
/// channels, the turned ones first, which is also the value. A head's query meets it through `attn.k_up`, which brings
/// the part that does not turn into the latent's space; what attention mixes leaves that space through `attn.v_up`. In
/// [`AttnSpec`] `kv_heads` is therefore 1 and `head_dim` `rope.dims + rank`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Width of the latent.
    pub rank: usize,
    /// Width of the latent that queries are made from; `None`: they are made from the residual stream.
    pub q_rank: Option<usize>,
    /// Channels of a head's query that do not turn.
    pub plain: usize,
    /// Width of a head's value.
    pub value: usize,
    /// Added under the root of the latents' norms.
    pub eps: f32,
}

impl AttnSpec {
    /// What layer `l` says of latent attention at odds with itself.
    pub(crate) fn check_latent(&self, l: usize) -> Result<(), SpecError> {
        let Some(m) = &self.latent else { return Ok(()) };
        let fail = |what: String| Err(SpecError { what: format!("layer {l}: {what}") });
        for (name, n) in [
            ("latent", m.rank),
            ("latent of queries", m.q_rank.unwrap_or(1)),
            ("plain part of a query", m.plain),
            ("value", m.value),
        ] {
            if n == 0 || n > MAX_DIM {
                return fail(format!("the {name} has {n} channels; it must have 1 to {MAX_DIM}"));
            }
        }
        if !(m.eps >= 0.0 && m.eps < 1.0) {
            return fail(format!("eps of the latents' norms is {}", m.eps));
        }
        let turned = self.rope.as_ref().map_or(0, |r| r.dims);
        let width = self.heads.saturating_mul(m.plain.saturating_add(turned).max(m.value));
        if width > MAX_DIM {
            return fail(format!("{} heads of {} and {turned} channels", self.heads, m.plain));
        }
        if turned == 0 {
            return fail("latent attention without RoPE".into());
        }
        if self.kv_heads != 1 || self.head_dim != m.rank.saturating_add(turned) {
            return fail(format!(
                "{} key heads of {} channels; latent attention has one of {} and {turned}",
                self.kv_heads, self.head_dim, m.rank
            ));
        }
        if self.qk_norm {
            return fail("norms of queries and keys beside a latent".into());
        }
        Ok(())
    }

    /// Width of what `attn.o` reads.
    pub fn mixed(&self) -> usize {
        self.heads * self.latent.map_or(self.head_dim, |m| m.value)
    }

    /// The shape of one of attention's matrices beside a residual stream of `hidden`; `None` where it has no such.
    pub(crate) fn matrix(&self, hidden: usize, place: &Place) -> Option<(usize, usize)> {
        let linear = |rows: usize, cols: usize, bias: bool| match place.part {
            Part::Weight => Some((rows, cols)),
            Part::Bias => bias.then_some((1, rows)),
        };
        let vector = |n: usize| (place.part == Part::Weight).then_some((1, n));
        let Some(m) = &self.latent else {
            return match place.role {
                Role::Q => linear(self.heads * self.head_dim, hidden, self.qkv_bias),
                Role::K | Role::V if self.kv_from.is_some() || (self.v_is_k && place.role == Role::V) => None,
                Role::K | Role::V => linear(self.kv_heads * self.head_dim, hidden, self.qkv_bias),
                Role::O => linear(hidden, self.mixed(), self.o_bias),
                _ => None,
            };
        };
        let turned = self.rope.as_ref().map_or(0, |r| r.dims);
        match (place.role, place.expert) {
            (Role::QDown, None) => m.q_rank.and_then(|n| linear(n, hidden, self.qkv_bias)),
            (Role::QDownNorm, None) => m.q_rank.and_then(vector),
            (Role::Q, None) => linear(self.heads * (m.plain + turned), m.q_rank.unwrap_or(hidden), false),
            (Role::KvDown, None) => linear(m.rank + turned, hidden, self.qkv_bias),
            (Role::KvDownNorm, None) => vector(m.rank),
            (Role::KUp, Some(h)) if (h as usize) < self.heads => linear(m.rank, m.plain, false),
            (Role::VUp, Some(h)) if (h as usize) < self.heads => linear(m.value, m.rank, false),
            (Role::O, None) => linear(hidden, self.mixed(), self.o_bias),
            _ => None,
        }
    }
}
