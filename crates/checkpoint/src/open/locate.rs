//! Finding the tensor of every place: named as the network names it, or in the way of another tool.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use lacuna_arch::Source;
use lacuna_format::{Float, FormatError, Pattern, Piece, Stored, Values, WeightsError};
use lacuna_spec::{Part, Place, Role, Spec};

use super::{Checkpoint, Kind, Lie, Located, OpenError};
use crate::examine::{REPAIR, layers_differ};
use crate::foreign::{self, Fault, Lazy, Module, Tensors};
use crate::gguf::{GridMatrix, GridType};
use crate::tensor::TensorType;

/// Rows of a tensor that holds several matrices.
struct Share {
    tensor: usize,
    rows: usize,
    all: usize,
}

impl Checkpoint {
    /// Finds and verifies the tensor of every place.
    pub(super) fn locate(&mut self, sources: fn(&Spec, &Place) -> Vec<Source>) -> Result<(), OpenError> {
        let mut by_name: HashMap<String, usize> = HashMap::new();
        for i in 0..self.tensors.len() {
            let name = self.tensors[i].1.name.clone();
            if let Some(first) = by_name.insert(name, i) {
                let t = &self.tensors[i].1.name;
                self.fault(OpenError::bad(&self.path, format!("tensor {t} lies in two files")), None)?;
                by_name.insert(self.tensors[first].1.name.clone(), first);
            }
        }
        // Where files are missing, so is what lies in them: that is said once.
        let cut = self.problems().iter().any(|p| p.broken);
        let differ = layers_differ(&self.spec, self.tensors.iter().map(|t| t.1.name.as_str()), sources);
        let absent = match differ.filter(|d| !cut && !d.missing.is_empty()) {
            Some(d) if self.problems.is_none() => {
                return Err(OpenError::bad(&self.path, d.to_string()));
            }
            Some(d) => {
                self.fault(OpenError::bad(&self.path, d.to_string()), Some(REPAIR))?;
                d.missing
            }
            None => Vec::new(),
        };
        let (mut places, mut modules) = (HashMap::new(), HashMap::new());
        // Rows taken from tensors that hold several matrices: all of them must be.
        let mut taken: HashMap<usize, (usize, usize)> = HashMap::new();
        for place in self.spec.places() {
            if place.layer.is_some_and(|l| absent.contains(&(l as usize))) {
                continue;
            }
            let mut candidates = sources(&self.spec, &place);
            if self.spec.tied && place.role == Role::Embed {
                // One of two that are the same is enough, whichever it is.
                candidates.extend(sources(&Spec { tied: false, ..self.spec.clone() }, &Place::global(Role::Head)));
            }
            match self.locate_one(&place, &candidates, &by_name, &mut modules) {
                Ok((located, of)) => {
                    if let Some(s) = of {
                        taken.entry(s.tensor).or_insert((0, s.all)).0 += s.rows;
                    }
                    places.insert(place, located);
                }
                Err(WeightsError::Missing { .. }) if cut => {}
                Err(e) => {
                    let head = matches!(e, WeightsError::Missing { .. }) && place.role == Role::Head;
                    let tie = "if the head is the embedding, set \"tie_word_embeddings\": true in config.json";
                    self.fault(e.into(), Some(tie).filter(|_| head && self.kind == Kind::HuggingFace))?;
                }
            }
        }
        for (tensor, (rows, all)) in taken {
            let t = &self.tensors[tensor].1;
            if rows != all {
                let what = format!("shape {:?}, but the network uses {rows} of its {all} rows", t.shape);
                let e = WeightsError::bad(self.file_of(tensor), t.name.clone(), FormatError::new(what));
                self.fault(e.into(), None)?;
            }
        }
        self.places = places;
        self.empty_biases(&by_name)
    }

    /// The tensor of a place, and how much of it that is where it holds several matrices.
    fn locate_one(
        &self,
        place: &Place,
        candidates: &[Source],
        by_name: &HashMap<String, usize>,
        modules: &mut HashMap<String, Option<Arc<dyn Module>>>,
    ) -> Result<(Located, Option<Share>), WeightsError> {
        let matrix = place.part == Part::Weight && (place.role.is_linear() || place.role.is_lookup());
        if let Some(q) = self.quantized.as_ref().filter(|_| matrix) {
            let data = |i: usize| self.data(i);
            let info = |i: usize| &self.tensors[i].1;
            let tensors = Tensors { names: by_name, info: &info, data: &data };
            for source in candidates {
                if let Some(m) = foreign::mxfp4::find(q, &tensors, source).map_err(|f| self.foreign_fault(f))? {
                    let mine = Source { rows: None, slice: None, ..source.clone() };
                    let (located, _) = self.check_foreign(place, &mine, &(Arc::new(m) as Arc<dyn Module>))?;
                    return Ok((located, None));
                }
                let Some(name) = source.name.strip_suffix(".weight") else { continue };
                if !modules.contains_key(name) {
                    let found = foreign::find(q, &tensors, name).map_err(|f| self.foreign_fault(f))?;
                    modules.insert(name.to_owned(), found);
                }
                if let Some(Some(module)) = modules.get(name) {
                    return self.check_foreign(place, source, module);
                }
            }
        }
        let Some((source, tensor)) = candidates.iter().find_map(|s| Some((s, *by_name.get(s.name.as_str())?))) else {
            let hint = candidates.first().map_or(String::new(), |s| format!(" ({} was looked for)", s.name));
            let file = self.path.display().to_string();
            return Err(WeightsError::Missing { file, place: place.to_string(), hint });
        };
        let located = self.check_place(place, source, tensor, by_name)?;
        let mut of = None;
        let taken = match &located {
            Located::Plain { rows, cols, .. } | Located::Gathered { rows, cols, .. } => Some((*rows, *cols)),
            Located::Foreign(lazy) => Some((lazy.rows(), 0)),
            Located::Packed { .. } => None,
        };
        if let Some((rows, cols)) = taken
            && (source.rows.is_some() || source.slice.is_some() || !source.order.is_empty())
        {
            // What lies the other way round takes as many rows of the tensor as it has columns.
            let rows = if source.turned { cols } else { rows };
            let shape = self.tensors[tensor].1.shape.as_slice();
            let all = match (shape, source.transposed) {
                ([n], _) | ([_, n], true) => *n,
                ([e, _, n], true) => e * n,
                (shape, _) if place.part == Part::Bias => shape.iter().product(),
                (shape, _) => shape[..shape.len() - 1].iter().product(),
            };
            let vector = shape.len() == 1 || place.part == Part::Bias;
            of = Some(Share { tensor, rows: if vector { cols } else { rows }, all });
        }
        Ok((located, of))
    }

    fn check_foreign(
        &self,
        place: &Place,
        source: &Source,
        module: &Arc<dyn Module>,
    ) -> Result<(Located, Option<Share>), WeightsError> {
        let (high, wide) = module.shape();
        let (tensor, name) = module.tensors()[0];
        let Some((rows, cols)) = self.spec.shape(place) else {
            return Err(self.foreign_fault(Fault { tensor: name.into(), what: format!("the network has no {place}") }));
        };
        if source.groups > 1 || !source.order.is_empty() {
            let what = format!("rows of {place} stand by turns with others in it, which is not read from such files");
            return Err(self.foreign_fault(Fault { tensor: name.into(), what }));
        }
        let slices = module.stacked().unwrap_or(1);
        let each = high / slices.max(1);
        let (from, to) = source.rows.unwrap_or((0, each));
        // A stack of experts is asked for one of them, and nothing else is.
        let slice = source.slice.unwrap_or(0);
        let other = source.slice.is_some() != module.stacked().is_some() || slice >= slices;
        if to - from != rows || to > each || wide != cols || other {
            let all = module.stacked().map_or_else(String::new, |n| format!("{n}, "));
            let doubt = module.doubt(cols).map_or_else(String::new, |d| format!(": {d}"));
            let what = format!("a matrix of [{all}{each}, {wide}], but {place} is [{rows}, {cols}]{doubt}");
            return Err(self.foreign_fault(Fault { tensor: name.into(), what }));
        }
        let part = (source.rows.is_some() || source.slice.is_some()).then_some(Share { tensor, rows, all: high });
        Ok((Located::Foreign(Lazy::new(module.clone(), slice * each + from..slice * each + to)), part))
    }

    pub(super) fn foreign_fault(&self, f: Fault) -> WeightsError {
        let tensor = self.tensors.iter().find(|(_, t)| t.name == f.tensor);
        let file = tensor.map_or(&self.path, |(file, _)| &self.files[*file].path);
        WeightsError::bad(file.display().to_string(), f.tensor, FormatError::new(f.what))
    }

    /// Some writers put a bias beside every matrix. Where the network has none, it must be zeros.
    fn empty_biases(&mut self, by_name: &HashMap<String, usize>) -> Result<(), OpenError> {
        let used: HashSet<usize> = self.used();
        let quantized = |name: &str| by_name.contains_key(&format!("{}.qweight", name.trim_end_matches(".bias")));
        for i in 0..self.tensors.len() {
            let t = &self.tensors[i].1;
            if used.contains(&i) || !t.name.ends_with(".bias") || !quantized(&t.name) {
                continue;
            }
            if self.data(i).iter().any(|b| b & 0x7f != 0) {
                let what = "a bias that is not zero, and the network has none here".to_owned();
                let e = self.foreign_fault(Fault { tensor: t.name.clone(), what });
                self.fault(e.into(), None)?;
            }
        }
        Ok(())
    }

    /// Rows of a tensor, put together.
    pub(super) fn gathered(&self, tensor: usize, runs: &[Range<usize>], (rows, cols): (usize, usize)) -> Stored {
        let (file, t) = &self.tensors[tensor];
        let parts = runs.iter().map(|run| self.files[*file].part(t.dtype, run.clone()));
        let all: Vec<u8> = parts.flat_map(|part| part.to_vec()).collect();
        let values = match t.dtype {
            TensorType::Float(f) => Values::Float(f, all.into()),
            TensorType::Block(b) => Values::Gguf(b, all.into()),
            TensorType::Uint(_) | TensorType::Grid(_) | TensorType::Other(_) => {
                unreachable!("refused when the file was opened")
            }
        };
        Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
    }

    /// The tensor of factors beside a tensor of NVFP4 in a GGUF file, one for each of its matrices, and how many.
    fn factors(
        &self,
        name: &str,
        matrices: usize,
        by_name: &HashMap<String, usize>,
    ) -> Result<Option<(usize, usize)>, WeightsError> {
        let beside = name.strip_suffix(".weight").and_then(|n| by_name.get(&format!("{n}.scale")));
        let Some(&i) = beside else { return Ok(None) };
        let t = &self.tensors[i].1;
        if t.dtype != TensorType::Float(Float::F32) || t.shape != [matrices] {
            let what = format!("{} {:?}, expected F32 factors of {matrices} matrices", t.dtype.name(), t.shape);
            return Err(self.foreign_fault(Fault { tensor: t.name.clone(), what }));
        }
        Ok(Some((i, matrices)))
    }

    fn check_place(
        &self,
        place: &Place,
        source: &Source,
        tensor: usize,
        by_name: &HashMap<String, usize>,
    ) -> Result<Located, WeightsError> {
        let t = &self.tensors[tensor].1;
        let bad = |what: String| WeightsError::bad(self.file_of(tensor), t.name.clone(), FormatError::new(what));
        let Some((rows, cols)) = self.spec.shape(place) else {
            return Err(bad(format!("the network has no {place}")));
        };
        let (block, block_bytes) = match t.dtype {
            TensorType::Float(f) => (1, f.bytes()),
            TensorType::Block(b) => (b.block(), b.block_bytes()),
            TensorType::Grid(g) => (g.block(), g.block_bytes()),
            other => return Err(bad(format!("{} cannot be decoded as the weights of {place}", other.name()))),
        };
        let table = place.role.is_table();
        let vector = !table || place.part == Part::Bias;
        let wrong = |want: String| bad(format!("shape {:?}, but {place} is {want}", t.shape));
        // What is stored, as [slices, rows, cols].
        let flat: Vec<usize>;
        let shape = if t.shape == source.axes {
            // Its own axes are as good as the place's.
            flat = if vector { vec![cols] } else { vec![rows, cols] };
            flat.as_slice()
        } else {
            t.shape.as_slice()
        };
        let (slices, high, wide) = match (shape, source.slice) {
            ([n], None) if vector => (1, 1, *n),
            ([1, n], None) if vector => (1, 1, *n),
            // A scale for each head.
            ([a, b], None) if matches!(place.role, Role::QNorm | Role::KNorm) => (1, 1, a * b),
            ([e, n], Some(_)) if vector => (*e, 1, *n),
            // A matrix of one row.
            ([n], None) if rows == 1 => (1, 1, *n),
            ([a, b], None) if !vector => (1, *a, *b),
            ([e, a, b], Some(_)) => (*e, *a, *b),
            _ => return Err(wrong(format!("[{rows}, {cols}]"))),
        };
        let row_bytes = |n: usize| n / block * block_bytes;
        let grouped = |all: usize, (from, to): (usize, usize), rows: usize| {
            let n = source.groups;
            if [all, from, to].iter().any(|x| !x.is_multiple_of(n)) || to > all {
                return Err(bad(format!("shape {:?}, whose rows do not fall into {n} groups", t.shape)));
            }
            let (bytes, groups) = (t.bytes.clone(), Some((n, from)));
            Ok(Located::Plain { tensor, bytes, rows, cols, lie: Lie { transposed: None, step: 1 }, groups })
        };
        if vector {
            let (from, to) = source.rows.unwrap_or((0, cols));
            let taken = (to - from).div_ceil(source.step);
            let slice = source.slice.unwrap_or(0);
            if taken != cols || to > wide || (source.rows.is_none() && wide != cols) || slice >= slices {
                return Err(wrong(format!("[{cols}]")));
            }
            if block != 1 {
                return Err(bad(format!("{} for a vector", t.dtype.name())));
            }
            if source.groups > 1 {
                return grouped(wide, (from, to), 1);
            }
            let start = t.bytes.start + row_bytes(slice * wide + from);
            let bytes = start..start + row_bytes(to - from);
            return Ok(Located::Plain {
                tensor,
                bytes,
                rows: 1,
                cols,
                lie: Lie { transposed: None, step: source.step },
                groups: None,
            });
        }
        if !source.order.is_empty() {
            let rows_here: usize = source.order.iter().map(|(from, to)| to.saturating_sub(*from)).sum();
            if rows_here != rows || wide != cols || source.order.iter().any(|(from, to)| from > to || *to > high) {
                return Err(wrong(format!("[{rows}, {cols}], some rows of it")));
            }
            let at = |row: usize| t.bytes.start + row_bytes(cols) * row;
            let runs = source.order.iter().map(|&(from, to)| at(from)..at(to)).collect();
            return Ok(Located::Gathered { tensor, runs, rows, cols });
        }
        let (high_here, wide_here) = if source.transposed { (wide, high) } else { (high, wide) };
        // Learned positions: the file may have more than the network asks for.
        let rows = if place.role == Role::Positions { rows.max(high_here) } else { rows };
        let (from, to) = source.rows.unwrap_or((0, high_here));
        let slice = source.slice.unwrap_or(0);
        // Of what is stored.
        let (taken, width) = if source.turned { (cols, rows) } else { (rows, cols) };
        let step = source.step;
        if (to - from).div_ceil(step) != taken || to > high_here || wide_here != width || slice >= slices {
            return Err(wrong(format!("[{rows}, {cols}]")));
        }
        if (source.transposed || source.turned) && block != 1 {
            return Err(bad(format!("{} in a matrix stored the other way round", t.dtype.name())));
        }
        if let TensorType::Grid(kind) = t.dtype {
            let factors = match kind {
                GridType::NVFP4 => self.factors(&t.name, slices, by_name)?,
                _ => None,
            };
            let module = GridMatrix { tensor, name: t.name.clone(), kind, shape: (slices * high, cols), factors };
            let from = slice * high + from;
            return Ok(Located::Foreign(Lazy::new(Arc::new(module), from..from + rows)));
        }
        if source.groups > 1 {
            return grouped(high, (from, to), rows);
        }
        if source.transposed {
            let start = t.bytes.start + row_bytes(slice * high * wide);
            let (bytes, lie) = (start..start + row_bytes(high * wide), Lie { transposed: Some(from), step });
            return Ok(Located::Plain { tensor, bytes, rows, cols, lie, groups: None });
        }
        let start = t.bytes.start + row_bytes(width) * (slice * high + from);
        let bytes = start..start + row_bytes(width) * (to - from);
        let lie = Lie { transposed: source.turned.then_some(0), step };
        Ok(Located::Plain { tensor, bytes, rows, cols, lie, groups: None })
    }
}
