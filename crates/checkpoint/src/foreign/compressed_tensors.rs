//! compressed-tensors: packed codes, bytes, and the door to the sparse forms.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use lacuna_format::bits::pack;
use lacuna_format::{Elem, Float, Group, Pattern, Piece, Stored, Tables, Values};

use super::config::Quantized;
use super::scales::{ScaleTensor, unsigned};
use super::{Args, Data, Fault, Module, Tensor, Tensors, fp4, i32s, marlin24, sparse, unpack_row};
use crate::tensor::TensorType;

/// Largest matrix accepted: as everywhere, a bound against sizes that only a lie has.
const MAX_ENTRIES: usize = 1 << 40;

/// The matrix of `module`, by the tensors that lie under its name.
pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Arc<dyn Module>>, Fault> {
    if let Some(s) = t.get(module, "weight_scale_inv") {
        return s.bad(format!("format {:?} with weight_scale_inv is not read", q.format));
    }
    // Before "mask" lost its last word, names kept `.weight`.
    for prefix in [module.to_owned(), format!("{module}.weight")] {
        if let Some(mask) = t.get(&prefix, "bitmask") {
            return Ok(Some(Arc::new(sparse::find(q, t, module, &prefix, mask)?)));
        }
    }
    if let Some(packed) = t.get(module, "weight_packed").filter(|p| p.dtype == TensorType::Uint(Elem::U8)) {
        let scale = t.need(module, "weight_scale", &packed)?;
        // nvfp4's scales of 8 bits are those of a matrix under one scale more.
        let over = match scale.dtype {
            TensorType::Float(Float::F8E4m3) => Some(t.need(module, "weight_global_scale", &packed)?),
            _ => t.get(module, "weight_global_scale"),
        };
        let over = over.map(fp4::Over::Divide);
        return Ok(Some(Arc::new(fp4::Fp4::new(packed, scale, over)?)));
    }
    if let Some(packed) = t.get(module, "weight_packed") {
        return Ok(Some(match t.get(module, "meta") {
            Some(meta) => Arc::new(marlin24::find(t, module, packed, meta)?),
            None => Arc::new(Packed::find(q, t, module, packed)?),
        }));
    }
    let Some(weight) = t.get(module, "weight") else { return Ok(None) };
    let scale = t.get(module, "weight_scale");
    match (weight.dtype, scale) {
        (TensorType::Float(Float::F8E4m3 | Float::F8E5m2) | TensorType::Other("I8"), None) => {
            weight.bad(format!("{}, and {module}.weight_scale is missing", weight.dtype.name()))
        }
        (TensorType::Float(Float::F8E4m3 | Float::F8E5m2) | TensorType::Other("I8"), Some(scale)) => {
            let shape = weight.two()?;
            Ok(Some(Arc::new(Plain { bytes: Coded::find(q, t, module, shape, weight.dtype, scale)?, weight, shape })))
        }
        // Scales beside plain floats are left over from a model that was saved before it was compressed.
        _ => Ok(None),
    }
}

/// How codes of fewer than 8 bits fill words of 32.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// One stream, codes across words.
    Stream,
    /// Whole codes in every word, bits left over.
    Words,
}

impl Layout {
    fn words(self, count: usize, bits: u8) -> usize {
        match self {
            Layout::Stream => (count * usize::from(bits)).div_ceil(32),
            Layout::Words => count.div_ceil(32 / usize::from(bits)),
        }
    }

    /// The codes of one line of words.
    fn unpack(self, words: &[u8], bits: u8, codes: &mut [u8]) {
        match self {
            Layout::Stream => unpack_row(words, bits, codes),
            Layout::Words => {
                let per = 32 / usize::from(bits);
                for (word, out) in words.chunks_exact(4).zip(codes.chunks_mut(per)) {
                    unpack_row(word, bits, out);
                }
            }
        }
    }
}

/// Zero points, where quantization is asymmetric.
enum Zeros {
    /// Signed bytes in the shape of the scales.
    Bytes(Tensor),
    /// Codes packed down the rows.
    Packed(Tensor, Layout),
}

/// pack-quantized: `weight_packed`, `weight_scale`, `weight_shape`, perhaps `weight_zero_point` and `weight_g_idx`.
struct Packed {
    packed: Tensor,
    shape_of: Tensor,
    shape: (usize, usize),
    bits: u8,
    layout: Layout,
    grid: ScaleTensor,
    zeros: Option<Zeros>,
    order: Option<Tensor>,
}

/// The rows and columns that a tensor of two numbers names.
pub(super) fn named_shape(t: &Tensors<'_>, shape: &Tensor) -> Result<(usize, usize), Fault> {
    match t.sizes(shape)?[..] {
        [rows, cols] if rows > 0 && cols > 0 && rows.checked_mul(cols).is_some_and(|n| n <= MAX_ENTRIES) => {
            Ok((rows, cols))
        }
        ref other => shape.bad(format!("{other:?} is no shape of a matrix")),
    }
}

impl Packed {
    fn find(q: &Quantized, t: &Tensors<'_>, module: &str, packed: Tensor) -> Result<Packed, Fault> {
        packed.must_be("I32")?;
        let shape_of = t.need(module, "weight_shape", &packed)?;
        let (rows, cols) = named_shape(t, &shape_of)?;
        let (high, width) = packed.two()?;
        if high != rows {
            return packed.bad(format!("{high} rows of words, but weight_shape names {rows}"));
        }
        let args = q.args(module);
        let (bits, layout) = bits_and_layout(q, args, &packed, cols, width)?;
        let scale = t.need(module, "weight_scale", &packed)?;
        let grid = ScaleTensor::new(scale, (rows, cols), args)?;
        let zeros = match t.get(module, "weight_zero_point") {
            None if args.is_some_and(|a| !a.symmetric) => {
                return packed
                    .bad(format!("asymmetric by its configuration, and {module}.weight_zero_point is missing"));
            }
            None => None,
            Some(z) if z.is("I8") => {
                zero_shape(&z, &grid, rows)?;
                Some(Zeros::Bytes(z))
            }
            Some(z) => {
                z.must_be("I32")?;
                let down = grid.high(rows);
                let (words, groups) = z.two()?;
                let fits = |l: Layout| l.words(down, bits) == words;
                // The weight's own layout, unless only the other one fits.
                let other = if layout == Layout::Stream { Layout::Words } else { Layout::Stream };
                let zl = if fits(layout) { layout } else { other };
                if groups != grid.groups || !fits(zl) {
                    return z.bad(format!(
                        "shape [{words}, {groups}], expected [{}, {}] for {down} rows of {bits} bits",
                        layout.words(down, bits),
                        grid.groups
                    ));
                }
                Some(Zeros::Packed(z, zl))
            }
        };
        let order = t.get(module, "weight_g_idx");
        if let Some(o) = &order {
            o.must_be("I32")?;
            o.must_have(&[cols])?;
            if grid.groups > 1 << 16 {
                return o.bad(format!("{} groups; at most {} can be named by column", grid.groups, 1 << 16));
            }
        }
        Ok(Packed { packed, shape_of, shape: (rows, cols), bits, layout, grid, zeros, order })
    }

    fn zeros(&self, rows: &Range<usize>, data: Data<'_>) -> Result<Option<Bytes>, Fault> {
        let groups = self.grid.groups;
        let half = 1u8 << (self.bits - 1);
        let codes: Vec<u8> = match &self.zeros {
            None => return Ok(None),
            Some(Zeros::Bytes(z)) => {
                let bytes = data(z.index);
                let range = -i16::from(half)..i16::from(half);
                if let Some(i) = bytes.iter().position(|&b| !range.contains(&i16::from(b as i8))) {
                    return z.bad(format!("entry {i} is {}, expected {range:?} at {} bits", bytes[i] as i8, self.bits));
                }
                let row = |r: usize| &bytes[self.grid.row(r) * groups..][..groups];
                rows.clone().flat_map(|r| row(r).iter().map(|z| z.wrapping_add(half))).collect()
            }
            Some(Zeros::Packed(z, layout)) => {
                let bytes = data(z.index);
                let down = self.grid.high(self.shape.0);
                let mut all = vec![0; groups * down];
                let words = layout.words(down, self.bits);
                let mut line = vec![0; 4 * words];
                for (g, codes) in all.chunks_exact_mut(down).enumerate() {
                    for (w, out) in line.chunks_exact_mut(4).enumerate() {
                        out.copy_from_slice(&bytes[4 * (w * groups + g)..][..4]);
                    }
                    layout.unpack(&line, self.bits, codes);
                }
                let at = |r: usize, g: usize| all[g * down + self.grid.row(r)];
                rows.clone().flat_map(|r| (0..groups).map(move |g| (r, g))).map(|(r, g)| at(r, g)).collect()
            }
        };
        // A zero point in the middle is what symmetry means.
        Ok(if codes.iter().all(|&z| z == half) { None } else { Some(pack(&codes, self.bits).into()) })
    }
}

fn zero_shape(z: &Tensor, grid: &ScaleTensor, rows: usize) -> Result<(), Fault> {
    let entries = z.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let want = grid.high(rows) * grid.groups;
    if entries == Some(want) { Ok(()) } else { z.bad(format!("shape {:?}, but there are {want} scales", z.shape)) }
}

/// What no flag marks: bits and layout follow from the width of a row, and where several fit, from the configuration
/// and its version.
fn bits_and_layout(
    q: &Quantized,
    args: Option<&Args>,
    packed: &Tensor,
    cols: usize,
    width: usize,
) -> Result<(u8, Layout), Fault> {
    let mut fit = Vec::new();
    for bits in 2..=8u8 {
        for layout in [Layout::Stream, Layout::Words] {
            let same = 32 % u32::from(bits) == 0 && layout == Layout::Words;
            if !same && layout.words(cols, bits) == width {
                fit.push((bits, layout));
            }
        }
    }
    let said: Vec<u8> = match args {
        Some(a) => vec![a.bits],
        None => q.groups.iter().map(|a| a.bits).collect(),
    };
    let told: Vec<_> = fit.iter().copied().filter(|(b, _)| said.contains(b)).collect();
    let told = if said.is_empty() { fit.clone() } else { told };
    match told[..] {
        [one] => Ok(one),
        // Few columns: both layouts have as many words, and only the release that wrote them tells.
        [(a, first), (b, _)] if a == b => match q.version {
            Some(v) => Ok((a, if v >= (0, 18) { Layout::Stream } else { Layout::Words })),
            // Codes that fit one word lie the same way in both.
            None if cols <= 32 / usize::from(a) => Ok((a, first)),
            None => packed
                .bad(format!("{width} words for {cols} columns of {a} bits fit two layouts, and no version is named")),
        },
        [] => {
            let would: Vec<String> = fit.iter().map(|(b, _)| b.to_string()).collect();
            let would = if would.is_empty() { "none".into() } else { would.join(" or ") };
            packed.bad(format!(
                "{width} words for {cols} columns, which no packing of {said:?} bits gives (it would be {would} bits); \
                 quantization_config contradicts the tensors"
            ))
        }
        _ => packed.bad(format!("{width} words for {cols} columns could be {told:?}; the configuration does not say")),
    }
}

impl Module for Packed {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let zeros = self.zeros.as_ref().map(|z| match z {
            Zeros::Bytes(t) | Zeros::Packed(t, _) => t,
        });
        let all = [Some(&self.packed), Some(&self.grid.tensor), Some(&self.shape_of), zeros, self.order.as_ref()];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let (_, cols) = self.shape;
        let row = 4 * self.layout.words(cols, self.bits);
        let words = data(self.packed.index).slice(rows.start * row..rows.end * row);
        // Rows of whole words in one stream are the stored form already: nothing is copied.
        let codes = if self.layout == Layout::Stream && (cols * usize::from(self.bits)).is_multiple_of(32) {
            words
        } else {
            let mut codes = vec![0; rows.len() * cols];
            for (words, codes) in words.chunks_exact(row).zip(codes.chunks_exact_mut(cols)) {
                self.layout.unpack(words, self.bits, codes);
            }
            pack(&codes, self.bits).into()
        };
        let group = match &self.order {
            None => self.grid.group(),
            Some(t) => order(t, &data(t.index), self.grid.groups, self.grid.run)?,
        };
        let scales = self.grid.read(rows.clone(), data);
        let values =
            Values::Int { bits: self.bits, codes, scales, zeros: self.zeros(&rows, data)?.map(Into::into), group };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

/// The groups of columns that an index names: runs of `run` where it names those, checked against `groups`.
pub(super) fn order(t: &Tensor, data: &[u8], groups: usize, run: usize) -> Result<Group, Fault> {
    // Written before any order was found.
    if i32s(data).all(|g| g == -1) {
        return Ok(Group::Run(run));
    }
    let mut of = Vec::with_capacity(data.len() / 2);
    let mut plain = true;
    for (c, g) in i32s(data).enumerate() {
        match usize::try_from(g) {
            Ok(g) if g < groups => {
                plain &= g == c / run;
                of.extend_from_slice(&(g as u16).to_le_bytes());
            }
            _ => return t.bad(format!("group {g} of column {c}, expected 0 to {}", groups - 1)),
        }
    }
    Ok(if plain { Group::Run(run) } else { Group::Index { groups, of: of.into() } })
}

/// Bytes that are codes (I8) or 8-bit floats, with scales.
pub(super) struct Coded {
    dtype: TensorType,
    grid: ScaleTensor,
    zeros: Option<Tensor>,
    order: Option<Tensor>,
}

impl Coded {
    pub fn find(
        q: &Quantized,
        t: &Tensors<'_>,
        module: &str,
        shape: (usize, usize),
        dtype: TensorType,
        scale: Tensor,
    ) -> Result<Coded, Fault> {
        let args = q.args(module);
        if shape.0 == 0 || shape.1 == 0 {
            return scale.bad(format!("scales of a matrix of {} x {}", shape.0, shape.1));
        }
        if let Some(a) = args.filter(|a| a.float != matches!(dtype, TensorType::Float(_))) {
            let kind = if a.float { "float" } else { "int" };
            return scale.bad(format!(
                "the weight beside it is {}, but quantization_config says {kind}{}",
                dtype.name(),
                a.bits
            ));
        }
        let grid = ScaleTensor::new(scale, shape, args)?;
        let zeros = t.get(module, "weight_zero_point");
        if let Some(z) = &zeros {
            if !z.is("I8") && !matches!(z.dtype, TensorType::Float(_)) {
                return z.bad(format!("{} cannot be zero points here; I8 can", z.dtype.name()));
            }
            zero_shape(z, &grid, shape.0)?;
        }
        let order = t.get(module, "weight_g_idx");
        if let Some(o) = &order {
            o.must_be("I32")?;
            o.must_have(&[shape.1])?;
            if grid.groups > 1 << 16 {
                return o.bad(format!("{} groups; at most {} can be named by column", grid.groups, 1 << 16));
            }
        }
        Ok(Coded { dtype, grid, zeros, order })
    }

    pub fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.grid.tensor), self.zeros.as_ref(), self.order.as_ref()];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    /// Zero points of some rows counted from -128 on, `None` where all are in the middle.
    pub fn zeros(&self, rows: &Range<usize>, data: Data<'_>) -> Result<Option<Vec<u8>>, Fault> {
        let Some(z) = &self.zeros else { return Ok(None) };
        let (bytes, groups) = (data(z.index), self.grid.groups);
        if let TensorType::Float(f) = z.dtype {
            // Zero points of floats say nothing, and must.
            let mut all = vec![0.0; bytes.len() / f.bytes()];
            f.decode(&bytes, &mut all);
            return match all.iter().position(|z| *z != 0.0) {
                None => Ok(None),
                Some(i) => z.bad(format!("entry {i} is {}; zero points of floats other than 0 are not read", all[i])),
            };
        }
        if bytes.iter().all(|&z| z == 0) {
            return Ok(None);
        }
        let row = |r: usize| &bytes[self.grid.row(r) * groups..][..groups];
        Ok(Some(rows.clone().flat_map(|r| unsigned(row(r))).collect()))
    }

    /// The codec over `bytes`, the stored values of some rows.
    pub fn values(
        &self,
        weight: &Tensor,
        rows: Range<usize>,
        bytes: Bytes,
        zeros: Option<Vec<u8>>,
        data: Data<'_>,
    ) -> Result<Values, Fault> {
        let group = match &self.order {
            None => self.grid.group(),
            Some(t) => order(t, &data(t.index), self.grid.groups, self.grid.run)?,
        };
        let scales = self.grid.read(rows, data);
        let TensorType::Float(float) = self.dtype else {
            let codes = unsigned(&bytes).into();
            return Ok(Values::Int { bits: 8, codes, scales, zeros: zeros.map(Into::into), group });
        };
        let mut table = vec![0.0; 256];
        float.decode(&(0..=255).collect::<Vec<u8>>(), &mut table);
        if let Some(i) = bytes.iter().position(|&b| !table[usize::from(b)].is_finite()) {
            return weight.bad(format!("value {i} is not finite"));
        }
        table.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 0.0);
        Ok(Values::Codebook { bits: 8, codes: bytes, tables: Tables::one(&table), scales: Some((scales, group)) })
    }
}

/// int-, float- and naive-quantized: a `weight` of bytes.
pub(super) struct Plain {
    pub weight: Tensor,
    pub shape: (usize, usize),
    pub bytes: Coded,
}

impl Module for Plain {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let mut all = vec![(self.weight.index, self.weight.name.as_str())];
        all.extend(self.bytes.tensors());
        all
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let cols = self.shape.1;
        let bytes = data(self.weight.index).slice(rows.start * cols..rows.end * cols);
        let zeros = self.bytes.zeros(&rows, data)?;
        let values = self.bytes.values(&self.weight, rows.clone(), bytes, zeros, data)?;
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}
