//! Finding the place of everything in an adapter.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Mutex, Weak};

use lacuna_arch::{self as arch, Source};
use lacuna_format::{Stored, WeightsError};
use lacuna_spec::{Part, Place, Role, Spec};

use super::Adapter;
use crate::OpenError;

/// What PEFT puts before every name.
const ROOT: &str = "base_model.model.";

/// What an adapter does at one place, in this order; empty where only a vector of zeros is needed.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    /// A tensor that stands in the base's stead.
    pub instead: Option<String>,
    /// A product that is added.
    pub adds: Option<Product>,
    /// DoRA's magnitudes.
    pub magnitudes: Option<String>,
    /// A vector that is added, with its factor.
    pub shift: Option<(String, f32)>,
    /// Rows of single tokens that stand in the base's stead.
    pub tokens: Option<(String, Vec<usize>)>,
    /// Rows meant of what is stored for several matrices in one.
    pub rows: Option<Range<usize>>,
    /// The file keeps the transpose of what stands in the base's stead.
    pub transposed: bool,
    /// Width of heads whose rows the base keeps in pairs.
    pub paired: Option<usize>,
}

/// Two thin matrices.
#[derive(Clone, Debug)]
pub(super) struct Product {
    pub down: String,
    pub up: String,
    pub scale: f32,
    /// Of one expert, where the halves are those of all.
    pub rank: usize,
    /// Rows meant of what the product has, and all that it must have.
    pub rows: Range<usize>,
    pub all: Option<usize>,
    pub form: Halves,
}

/// How the two halves are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halves {
    /// `[rank, cols]` and `[rows, rank]`.
    Plain,
    /// `[rank, rows]` and `[cols, rank]`.
    Embedding,
    /// Of all experts together: `[experts * rank, cols]` and `[rows, rank * experts]`.
    Expert { index: usize, of: usize },
}

/// An adapter fitted to a network.
pub(crate) struct Fitted {
    pub adapter: Adapter,
    pub merge: bool,
    /// The network of both: the base's, but for biases, a head or words that only the adapter has.
    pub spec: Spec,
    pub(super) changes: HashMap<Place, Change>,
    pub(super) held: Mutex<HashMap<Place, Weak<Stored>>>,
    /// The head was the embedding, and is no longer.
    untied: bool,
    /// Rows of the embedding, where they are more or fewer than the base's.
    resized: Option<usize>,
}

impl Fitted {
    /// Finds the place of everything in the adapter.
    pub fn new(adapter: Adapter, base: &Spec, merge: bool) -> Result<Fitted, OpenError> {
        let mut spec = Spec { tied: false, ..base.clone() };
        let resized = adapter.resized(base);
        spec.vocab = resized.unwrap_or(base.vocab);
        adapter.open_biases(&mut spec);
        let mut used = HashSet::new();
        let mut changes = HashMap::new();
        for place in spec.places() {
            let before = base.shape(&place);
            match adapter.change(&spec, &place, &mut used)? {
                Some(change) => drop(changes.insert(place, change)),
                None if before.is_none() && place.part == Part::Bias => drop(changes.insert(place, Change::default())),
                None => {}
            }
        }
        let mut left: Vec<&String> = adapter.tensors.keys().filter(|k| !used.contains(*k)).collect();
        left.sort();
        if let Some(name) = left.first() {
            return adapter.bad(name, format!("belongs to nothing in the base ({} such tensors)", left.len()))?;
        }
        let mut fitted = Fitted { adapter, merge, spec, changes, held: Mutex::default(), untied: false, resized };
        if base.tied {
            fitted.spec.tied = fitted.share()?;
            fitted.untied = !fitted.spec.tied;
        }
        let file = fitted.adapter.dir.display().to_string();
        fitted.spec.check().map_err(|source| OpenError::Spec { file, source })?;
        Ok(fitted)
    }

    /// Rows of the embedding, where they are more or fewer than the base's.
    pub fn rows(&self) -> Option<usize> {
        self.resized
    }

    /// Refuses an adapter whose rows are those of other tokens.
    pub fn other_tokens<T>(&self, rows: usize, base: usize) -> Result<T, OpenError> {
        let what = format!(
            "the adapter has {rows} rows of embedding or head, the base {base} tokens of its own numbering; put the \
             adapter on the model before it loses tokens"
        );
        Ok(self.adapter.bad("the embedding", what)?)
    }

    /// Gives the head of a base that has none what PEFT gives it, and says whether it is still the embedding.
    fn share(&mut self) -> Result<bool, WeightsError> {
        let places = [Place::global(Role::Embed), Place::global(Role::Head)];
        let had = places.map(|p| self.changes.contains_key(&p));
        let [mut embed, mut head] = places.map(|p| self.changes.remove(&p).unwrap_or_default());
        let said = &self.adapter.said;
        // A base that lies beside the adapter is the base of both; what was trained as a module of its own is not.
        let own = |c: &Change| c.instead.as_ref().is_some_and(|t| !t.ends_with(".base_layer.weight") && said.saves(t));
        if embed.instead.is_none() && !own(&head) {
            embed.instead.clone_from(&head.instead);
        } else if head.instead.is_none() && (!own(&embed) || said.keeps_tied) {
            head.instead.clone_from(&embed.instead);
        }
        if head.tokens.is_none() {
            head.tokens.clone_from(&embed.tokens);
        }
        let same = self.same(&embed, &head)?;
        if same && (had[0] || had[1]) {
            self.changes.insert(places[0], embed);
        } else if !same {
            self.changes.extend([(places[0], embed), (places[1], head)]);
        }
        Ok(same)
    }

    /// Whether two changes to one matrix do the same.
    fn same(&self, a: &Change, b: &Change) -> Result<bool, WeightsError> {
        let floats = |c: &Change| c.instead.as_ref().map(|t| self.adapter.floats(t)).transpose();
        let halves = |c: &Change| c.adds.as_ref().map(|p| self.halves(p, c)).transpose();
        let plain = a.magnitudes.is_none() && b.magnitudes.is_none();
        Ok(plain && a.tokens == b.tokens && floats(a)? == floats(b)? && halves(a)? == halves(b)?)
    }

    /// Whether the base's matrix of a place is needed.
    pub fn needs_base(&self, place: &Place) -> bool {
        self.changes.get(place).is_none_or(|c| c.instead.is_none())
    }

    /// The place of the base that a place is made from.
    pub fn base_of(&self, place: &Place) -> Place {
        let head = self.untied && place.role == Role::Head;
        if head { Place::global(Role::Embed) } else { *place }
    }

    /// A sentence about what it does.
    pub fn describe(&self) -> String {
        let how = if self.merge { "merged into them" } else { "kept as low-rank terms beside them" };
        let count = |what: &dyn Fn(&Change) -> bool| self.changes.values().filter(|c| what(c)).count();
        let adds = count(&|c| c.adds.is_some());
        let mut out = format!("an adapter ({}) changes {adds} matrices, {how}", self.adapter.dir.display());
        let mut and = |n: usize, what: String| {
            if n > 0 {
                out += &format!("; {what}")
            }
        };
        let dora = count(&|c| c.magnitudes.is_some());
        if !self.merge {
            and(dora, format!("DoRA rescales {dora} of them, which are merged for that"));
        }
        let instead = count(&|c| c.instead.is_some());
        and(instead, format!("{instead} tensors are its own instead of the base's"));
        let shifts = count(&|c| c.shift.is_some());
        and(shifts, format!("{shifts} biases are moved"));
        let tokens: usize = self.changes.values().filter_map(|c| c.tokens.as_ref()).map(|t| t.1.len()).sum();
        and(tokens, format!("{tokens} rows of single tokens are its own"));
        and(self.untied.into(), "the head is no longer the embedding".into());
        and(self.resized.unwrap_or(0), format!("the vocabulary has {} rows now", self.resized.unwrap_or(0)));
        out
    }
}

impl super::Said {
    /// Whether a tensor is of a module that was trained whole.
    fn saves(&self, tensor: &str) -> bool {
        let module = tensor.trim_end_matches(".weight");
        self.saved.iter().any(|end| module.ends_with(end.as_str()))
    }
}

/// Where a place may lie, in the names of all releases of transformers; experts in one tensor apart, which
/// [`Adapter::product`] looks for.
fn spellings(spec: &Spec, place: &Place) -> Vec<Source> {
    let mut out = arch::sources(spec, place);
    // Rows that lie in groups are no adapter's: its terms are of the whole matrix.
    out.retain(|s| s.slice.is_none() && s.groups == 1);
    let newer = |s: &Source| Source { name: s.name.replace(".block_sparse_moe.", ".mlp."), ..s.clone() };
    let new: Vec<Source> = out.iter().map(newer).filter(|s| !out.contains(s)).collect();
    out.extend(new);
    out
}

/// The width of heads where the base keeps rows of q and k in pairs that turn together, as GGUF files of Llama do, and
/// adapters do not.
fn paired(spec: &Spec, place: &Place) -> Option<usize> {
    let attn = spec.layers.get(place.layer? as usize)?.attn.as_ref()?;
    let (style, theirs) = (attn.rope.as_ref()?.style, arch::hf_rope_style(spec));
    (style != theirs && matches!(place.role, Role::Q | Role::K)).then_some(attn.head_dim)
}

impl Adapter {
    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The rows of an embedding that came along whole, where they are not the base's.
    fn resized(&self, base: &Spec) -> Option<usize> {
        let rows = |role: Role| {
            let untied = Spec { tied: false, ..base.clone() };
            let names = spellings(&untied, &Place::global(role));
            let module = |s: &Source| s.name.strip_suffix(".weight").map(|m| format!("{ROOT}{m}"));
            let mut names = names.iter().filter_map(module);
            names.find_map(|m| {
                ["weight", "base_layer.weight"].iter().find_map(|e| self.tensors.get(&format!("{m}.{e}")))
            })
        };
        let (embed, head) =
            (rows(Role::Embed).map(|t| t.shape[..].to_vec()), rows(Role::Head).map(|t| t.shape[..].to_vec()));
        let both = match (embed, head) {
            (Some(e), Some(h)) if e == h => e,
            (Some(one), None) | (None, Some(one)) if base.tied => one,
            _ => return None,
        };
        match both[..] {
            [n, hidden] if hidden == base.hidden && n != base.vocab => Some(n),
            _ => None,
        }
    }

    /// Lets the network have biases where only the adapter has some.
    fn open_biases(&self, spec: &mut Spec) {
        for place in spec.places() {
            let named = |s: &Source| {
                let module = s.name.strip_suffix(".weight");
                module.is_some_and(|m| self.has(&format!("{ROOT}{m}.lora_B.bias")))
            };
            if place.expert.is_some()
                || spec.shape(&place.bias()).is_some()
                || !spellings(spec, &place).iter().any(named)
            {
                continue;
            }
            let Some(layer) = place.layer.and_then(|l| spec.layers.get_mut(l as usize)) else { continue };
            match (place.role, &mut layer.attn, &mut layer.ffn) {
                (Role::Q | Role::K | Role::V, Some(a), _) => a.qkv_bias = true,
                (Role::O, Some(a), _) => a.o_bias = true,
                (Role::Gate | Role::Up | Role::Down, _, Some(f)) => (f.bias, f.down_bias) = (true, false),
                _ => {}
            }
        }
    }

    /// What is done at a place.
    fn change(&self, spec: &Spec, place: &Place, used: &mut HashSet<String>) -> Result<Option<Change>, WeightsError> {
        let Some(shape) = spec.shape(place) else { return Ok(None) };
        for source in spellings(spec, place) {
            let Some((module, end)) = source.name.rsplit_once('.') else { continue };
            let at = |what: &str| Some(format!("{ROOT}{module}.{what}")).filter(|n| self.has(n));
            let mut change = Change {
                rows: source.rows.map(|(from, to)| from..to),
                transposed: source.transposed,
                paired: paired(spec, place),
                instead: at(end).or_else(|| at(&format!("base_layer.{end}"))),
                ..Change::default()
            };
            if place.part == Part::Bias {
                let scale = self.said.scaling(module).0 as f32;
                change.shift = at("lora_B.bias").map(|name| (name, scale));
            } else {
                change.adds = self.product(spec, place, module, &source);
                change.tokens = match at("token_adapter.trainable_tokens_delta") {
                    Some(name) => Some((name.clone(), self.tokens(&name, place, module, shape.0)?)),
                    None => None,
                };
            }
            if change.adds.is_some() && self.said.dora {
                let name = format!("{ROOT}{module}.lora_magnitude_vector");
                change.magnitudes = [name.clone(), format!("{name}.weight")].into_iter().find(|n| self.has(n));
                if change.magnitudes.is_none() {
                    return self.bad(&name, "is missing, and the configuration says use_dora");
                }
            }
            let names = change.names();
            if names.is_empty() {
                continue;
            }
            if source.turned || source.step > 1 || (source.slice.is_some() && source.transposed) {
                let what =
                    format!("changes {place}, whose rows lie otherwise in the base; merge the adapter with PEFT");
                return self.bad(&names[0], what);
            }
            used.extend(names);
            self.check(spec, place, shape, &change)?;
            return Ok(Some(change));
        }
        Ok(None)
    }

    /// The two halves of a place, whichever way they are stored.
    fn product(&self, spec: &Spec, place: &Place, module: &str, source: &Source) -> Option<Product> {
        let high = spec.shape(place)?.0;
        let mut ways = vec![
            (module.to_owned(), ["lora_A.weight", "lora_B.weight"], Halves::Plain, format!("{module}.weight")),
            (module.to_owned(), ["lora_embedding_A", "lora_embedding_B"], Halves::Embedding, String::new()),
        ];
        if let (Some(index), Some((before, _))) = (place.expert, module.rsplit_once(".experts."))
            && let Some(of) = spec.layers[place.layer.unwrap_or(0) as usize].ffn.as_ref().and_then(|f| f.experts)
        {
            // transformers 5 keeps all experts in two parameters. Where both are aimed at, PEFT wraps the second around
            // the first.
            let experts = format!("{before}.experts");
            let [first, second] = ["gate_up_proj", "down_proj"].map(|p| format!("{experts}.{p}"));
            let both = self.said.aims_at(&first) && self.said.aims_at(&second);
            let (parameter, inner) = if place.role == Role::Down { (second, false) } else { (first, both) };
            if self.said.aims_at(&parameter) {
                let holder = if inner { format!("{experts}.base_layer") } else { experts };
                let form = Halves::Expert { index: index as usize, of: of.count };
                ways.push((holder, ["lora_A.weight", "lora_B.weight"], form, parameter));
            }
        }
        for (holder, [a, b], form, parameter) in ways {
            let (down, up) = (format!("{ROOT}{holder}.{a}"), format!("{ROOT}{holder}.{b}"));
            if !self.has(&down) && !self.has(&up) {
                continue;
            }
            // Patterns are held against the name that was aimed at.
            let aimed = if self.said.aims_at(&parameter) { &parameter } else { module };
            let (scale, rank) = self.said.scaling(aimed);
            let (from, all) = match (form, place.role, source.rows) {
                (Halves::Expert { .. }, Role::Gate, _) => (0, Some(2 * high)),
                (Halves::Expert { .. }, Role::Up, _) => (high, Some(2 * high)),
                (_, _, Some((from, _))) => (from, None),
                _ => (0, Some(high)),
            };
            return Some(Product { down, up, scale: scale as f32, rank, rows: from..from + high, all, form });
        }
        None
    }

    /// The tokens whose rows a tensor holds.
    fn tokens(&self, name: &str, place: &Place, module: &str, vocab: usize) -> Result<Vec<usize>, WeightsError> {
        let meant = |of: &Option<String>| match of {
            None => place.role == Role::Embed,
            Some(end) => super::ends_with_words(module, end),
        };
        let Some((_, list)) = self.said.tokens.iter().find(|t| meant(&t.0)) else {
            return self.bad(name, "trainable_token_indices does not say which rows these are");
        };
        let mut seen = HashSet::new();
        match list.iter().find(|t| **t >= vocab || !seen.insert(**t)) {
            Some(t) => self.bad(name, format!("token {t} stands twice or is none of {vocab}")),
            None => Ok(list.clone()),
        }
    }

    /// Holds the shapes of everything at a place against the network's.
    fn check(&self, spec: &Spec, place: &Place, shape: (usize, usize), c: &Change) -> Result<(), WeightsError> {
        // As much as is meant, and all of it where a tensor holds nothing else.
        let fits = |have: usize, want: usize| match &c.rows {
            Some(r) => r.end <= have && r.len() == want,
            None => have == want,
        };
        if let Some(name) = &c.instead {
            let (_, have, _) = self.floats(name)?;
            let good = match (have, c.transposed) {
                ([n] | [1, n], _) if shape.0 == 1 => fits(*n, shape.1),
                ([a, b], false) => fits(*a, shape.0) && *b == shape.1,
                ([a, b], true) => fits(*b, shape.0) && *a == shape.1,
                _ => false,
            };
            if !good {
                return self.bad(name, format!("shape {have:?}, but {place} is {shape:?}"));
            }
            let norm = !place.role.is_table();
            if norm && arch::hf_spec(spec).is_ok_and(|hf| hf.norm != spec.norm) {
                return self
                    .bad(name, format!("{place} is kept in another way by this base; use the base in safetensors"));
            }
        }
        if let Some(p) = &c.adds {
            let (_, rank, cols, _) = self.matrix(&p.down)?;
            let (_, rows, wide, _) = self.matrix(&p.up)?;
            let of = if let Halves::Expert { of, .. } = p.form { of } else { 1 };
            let (rows, cols) = if p.form == Halves::Embedding { (cols, rows) } else { (rows, cols) };
            if wide != rank || p.rank.checked_mul(of) != Some(rank) {
                let what =
                    format!("rank {wide}, the other half has {rank}, the configuration {} for each of {of}", p.rank);
                return self.bad(&p.up, what);
            }
            if cols != shape.1 || rows < p.rows.end || p.all.is_some_and(|all| rows != all) {
                return self.bad(&p.up, format!("a change of {rows} x {cols} to {place} of {shape:?}"));
            }
            if c.tokens.is_some() {
                return self.bad(&p.up, format!("{place} has rows of single tokens as well; only one of both is read"));
            }
        }
        if let Some(name) = &c.magnitudes {
            let embedding = c.adds.as_ref().is_some_and(|p| p.form == Halves::Embedding);
            let (_, have, _) = self.floats(name)?;
            if !matches!(have, [n] if if embedding { *n == shape.1 } else { fits(*n, shape.0) }) {
                return self.bad(name, format!("shape {have:?} for magnitudes of {place}, {shape:?}"));
            }
        }
        if let Some((name, _)) = &c.shift {
            let (_, have, _) = self.floats(name)?;
            if !matches!(have, [n] if fits(*n, shape.1)) {
                return self.bad(name, format!("shape {have:?}, but {place} is {shape:?}"));
            }
        }
        if let Some((name, list)) = &c.tokens {
            let (_, n, cols, _) = self.matrix(name)?;
            if (n, cols) != (list.len(), shape.1) {
                return self.bad(name, format!("[{n}, {cols}] for {} tokens of {place}, {shape:?}", list.len()));
            }
        }
        Ok(())
    }
}

impl Change {
    fn names(&self) -> Vec<String> {
        let product = self.adds.iter().flat_map(|p| [p.down.clone(), p.up.clone()]);
        let one = [self.instead.clone(), self.magnitudes.clone()].into_iter().flatten();
        let paired = [self.shift.as_ref().map(|s| s.0.clone()), self.tokens.as_ref().map(|t| t.0.clone())];
        product.chain(one).chain(paired.into_iter().flatten()).collect()
    }
}
