//! Mixtures of experts as data.

use serde::{Deserialize, Serialize};

use crate::spec::SpecError;

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses.
    pub used: usize,
    /// Whether the weights of the used ones are made to sum to 1.
    pub normalize: bool,
    /// What a router's logits become.
    #[serde(default, skip_serializing_if = "RouterScore::is_softmax")]
    pub score: RouterScore,
    /// A bias behind the router.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub router_bias: bool,
    /// A number for each expert that is added to its score where experts are chosen, and is no part of its weight.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub correction: bool,
    /// Experts come from the best groups of them alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<ExpertGroups>,
    /// Factor on the weights (1 for most).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub scale: f32,
    /// An FFN beside the experts that every token goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExpert>,
    /// Weights multiply what experts read, not what they put out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub weigh_inputs: bool,
    /// A learned factor on each expert's weight.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expert_scale: bool,
    /// Factor on the router's logits (1 for most).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub router_scale: f32,
    /// Router, experts and the shared expert read the residual stream through a norm each, the shared one through the
    /// FFN's; what experts and shared expert put out goes through a norm each before both are added.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub apart: bool,
}

/// One expert, plainly chosen: for the fields that a mapping does not name.
impl Default for Experts {
    fn default() -> Experts {
        Experts {
            count: 1,
            used: 1,
            normalize: false,
            score: RouterScore::Softmax,
            router_bias: false,
            correction: false,
            groups: None,
            scale: 1.0,
            shared: None,
            weigh_inputs: false,
            expert_scale: false,
            router_scale: 1.0,
            apart: false,
        }
    }
}

/// What a router's logits become before experts are chosen and weighed by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// The softmax over all experts.
    #[default]
    Softmax,
    /// `1 / (1 + e^-x)` of each.
    Sigmoid,
}

impl RouterScore {
    fn is_softmax(&self) -> bool {
        *self == RouterScore::Softmax
    }
}

/// Groups of experts: `count` runs of equal length, of which a token chooses from `used`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertGroups {
    /// How many there are.
    pub count: usize,
    /// How many a token may choose from.
    pub used: usize,
    /// Of how many of its best experts a group's scores are summed, corrections included (DeepSeek-V2: 1, V3: 2).
    pub by: usize,
}

/// The expert of every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Its inner width.
    pub width: usize,
    /// Whether its output is multiplied by the sigmoid of a number that the token gives.
    pub gate: bool,
}

fn one() -> f32 {
    1.0
}

fn is_one(x: &f32) -> bool {
    *x == 1.0
}

impl Experts {
    /// What layer `l` says of its experts at odds with itself.
    pub(crate) fn check(&self, l: usize) -> Result<(), SpecError> {
        let fail = |what: String| Err(SpecError { what: format!("layer {l}: {what}") });
        if self.count == 0 || self.count > 65536 || self.used == 0 || self.used > self.count {
            return fail(format!("{} of {} experts", self.used, self.count));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return fail(format!("weights of experts times {}", self.scale));
        }
        if !self.router_scale.is_finite() {
            return fail(format!("logits of a router times {}", self.router_scale));
        }
        if self.apart && self.shared.is_none() {
            return fail("norms for experts apart from a shared one that is not there".into());
        }
        if let Some(g) = self.groups {
            if g.count == 0 || g.used == 0 || g.used > g.count || !self.count.is_multiple_of(g.count) {
                return fail(format!("{} of {} groups of {} experts", g.used, g.count, self.count));
            }
            let each = self.count / g.count;
            if g.by == 0 || g.by > each {
                return fail(format!("groups of {each} experts are compared by their best {}", g.by));
            }
            if self.used > g.used * each {
                return fail(format!("{} experts from {} groups of {each}", self.used, g.used));
            }
        }
        match self.shared {
            Some(s) if s.width == 0 || s.width > crate::spec::MAX_DIM => {
                fail(format!("the shared expert's width is {}", s.width))
            }
            _ => Ok(()),
        }
    }
}
