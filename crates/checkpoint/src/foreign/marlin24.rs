//! marlin-24: codes of 2:4-sparse matrices, arranged for the tensor cores of one kind of GPU. Undone here, code by
//! code.
//!
//! With `n` rows and `k = cols / 2` kept columns, the writer (1) turns the kept codes to `[k, n]`, cuts that into tiles
//! of 16 x 16, puts the tiles of one band of 16 kept columns behind each other, and permutes every 1024 codes of the
//! band; (2) reorders the positions, 16 bits for 16 columns of a row, as CUTLASS wants its metadata; (3) permutes every
//! 64 scales of a group.

use std::ops::Range;

use lacuna_format::bits::{pack, unpack};
use lacuna_format::{Float, Group, Pattern, Piece, Scales, Stored, Values};

use super::{Data, Fault, Module, Tensor, Tensors};
use crate::tensor::TensorType;

/// Side of a tile.
const TILE: usize = 16;
/// Codes permuted together.
const BLOCK: usize = 1024;
/// Columns of a group.
const GROUP: usize = 128;

/// `weight_packed`, `scale_packed` and `meta`.
pub(super) struct Marlin24 {
    packed: Tensor,
    scales: Tensor,
    meta: Tensor,
    rows: usize,
    cols: usize,
    bits: u8,
    groups: usize,
}

pub(super) fn find(t: &Tensors<'_>, module: &str, packed: Tensor, meta: Tensor) -> Result<Marlin24, Fault> {
    packed.must_be("I32")?;
    meta.must_be("I16")?;
    let scales = t.need(module, "scale_packed", &packed)?;
    if scales.dtype != TensorType::Float(Float::F16) {
        return scales.bad(format!("{}, expected F16", scales.dtype.name()));
    }
    // No shape is written: it follows from the three tensors, and they must agree.
    let ((bands, words), (groups, rows), (half, wide)) = (packed.two()?, scales.two()?, meta.two()?);
    let cols = bands.saturating_mul(2 * TILE);
    if rows == 0 || bands == 0 || !rows.is_multiple_of(64) {
        return scales.bad(format!("shape [{groups}, {rows}]: rows must be a multiple of 64"));
    }
    let bits = match words.checked_div(rows) {
        Some(2) if words == 2 * rows => 4,
        Some(4) if words == 4 * rows => 8,
        _ => return packed.bad(format!("{words} words for {rows} rows are neither 4 nor 8 bits")),
    };
    if Some((half, wide)) != cols.checked_div(32).zip(rows.checked_mul(2)) {
        return meta.bad(format!("shape [{half}, {wide}], expected [{}, {}]", cols / 32, 2 * rows));
    }
    if groups != 1 && (groups != cols / GROUP || !cols.is_multiple_of(GROUP)) {
        return scales.bad(format!("{groups} groups for {cols} columns; groups are rows or {GROUP} columns"));
    }
    Ok(Marlin24 { packed, scales, meta, rows, cols, bits, groups })
}

/// Where each code of a permuted block came from.
fn permutation(bits: u8) -> Vec<usize> {
    let interleave: &[usize] = if bits == 4 { &[0, 2, 4, 6, 1, 3, 5, 7] } else { &[0, 2, 1, 3] };
    let mut plain = Vec::with_capacity(BLOCK);
    for lane in 0..32 {
        let column = lane / 4;
        for j in 0..4 {
            for block in 0..2 {
                for row in [0, 1, 8, 9].map(|o| 2 * (lane % 4) + o) {
                    plain.push(16 * row + column / 2 * 256 + 8 * (column % 2) + 4 * block + j);
                }
            }
        }
    }
    plain.chunks(interleave.len()).flat_map(|c| interleave.iter().map(|i| c[*i])).collect()
}

/// Where the 16 bits of row `r` and group of 16 columns `c` lie among those of `rows` rows.
fn meta_at(rows: usize, r: usize, c: usize) -> usize {
    let mut row = r / 64 * 64 + r % 2 * 2 + r % 8 / 4 + r % 4 / 2 * 32 + r % 64 / 8 * 4;
    let mut col = c;
    match (row % 2, col % 2) {
        (0, 1) => (row, col) = (row + 1, col - 1),
        (1, 0) => (row, col) = (row - 1, col + 1),
        _ => {}
    }
    col / 2 * rows * 2 + row * 2 + col % 2
}

impl Module for Marlin24 {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        [&self.packed, &self.scales, &self.meta].map(|t| (t.index, t.name.as_str())).to_vec()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let (n, kept) = (self.rows, self.cols / 2);
        let (packed, meta, scale) = (data(self.packed.index), data(self.meta.index), data(self.scales.index));
        let from = permutation(self.bits);
        let mut codes = vec![0u8; rows.len() * kept];
        let mut block = [0u8; BLOCK];
        for band in 0..kept / TILE {
            for b in 0..n * TILE / BLOCK {
                // Four tiles of 16 rows: those that no row asked for lies in are passed over.
                let first = b * (BLOCK / TILE);
                if first >= rows.end || first + BLOCK / TILE <= rows.start {
                    continue;
                }
                unpack(&packed, self.bits, band * n * TILE + b * BLOCK, &mut block);
                for (code, at) in block.iter().zip(&from) {
                    let (tile, k, row) = (at / (TILE * TILE), at / TILE % TILE, at % TILE);
                    let row = first + tile * TILE + row;
                    if rows.contains(&row) {
                        codes[(row - rows.start) * kept + band * TILE + k] = *code;
                    }
                }
            }
        }
        let mut positions = Vec::with_capacity(rows.len() * self.cols / 4);
        for r in rows.clone() {
            for c in 0..self.cols / TILE {
                let at = 2 * meta_at(n, r, c);
                let word = u16::from_le_bytes([meta[at], meta[at + 1]]);
                for g in 0..4 {
                    let two = (word >> (4 * g) & 15) as u8;
                    if two & 3 >= two >> 2 {
                        let column = c * TILE + 4 * g;
                        return self.meta.bad(format!(
                            "row {r} keeps columns {} and {} from {column} on, expected two that rise",
                            two & 3,
                            two >> 2
                        ));
                    }
                    positions.push(two);
                }
            }
        }
        let permuted = self.groups > 1 && GROUP < kept;
        let mut scales = Vec::with_capacity(rows.len() * self.groups * 2);
        for r in rows.clone() {
            // Of every 64 scales, eight by eight, the writer takes 0 4 1 5 2 6 3 7.
            let place = if permuted { r / 8 * 8 + r % 4 * 2 + r % 8 / 4 } else { r };
            for g in 0..self.groups {
                scales.extend_from_slice(&scale[2 * (g * n + place)..][..2]);
            }
        }
        let group = Group::Run(if self.groups == 1 { self.cols } else { GROUP });
        let values = Values::Int {
            bits: self.bits,
            codes: pack(&codes, self.bits).into(),
            scales: Scales::Float(Float::F16, scales.into()),
            zeros: None,
            group,
        };
        let pattern = Pattern::Nm { n: 2, m: 4, index: pack(&positions, 4).into() };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.cols, pattern, values }))
    }
}
