//! A slow reference that decodes in f64, straight from the words of the layout, and random matrices of every pattern
//! and codec.
#![allow(dead_code)]

use lacuna_base::{Mat, Rng};
use lacuna_format::*;

/// Code `i` of a stream, bit by bit.
fn code(stream: &[u8], bits: usize, i: usize) -> usize {
    (0..bits).map(|b| usize::from(stream[(i * bits + b) / 8] >> ((i * bits + b) % 8) & 1) << b).sum()
}

fn number(bytes: &[u8], size: usize, i: usize) -> u64 {
    (0..size).map(|b| u64::from(bytes[i * size + b]) << (8 * b)).sum()
}

/// A small float from its fields.
fn small(raw: u64, exponent_bits: u32, mantissa_bits: u32) -> f64 {
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    let m = (raw & ((1 << mantissa_bits) - 1)) as f64 / f64::from(1u32 << mantissa_bits);
    let e = (raw >> mantissa_bits & ((1 << exponent_bits) - 1)) as i32;
    let sign = if raw >> (mantissa_bits + exponent_bits) & 1 == 1 { -1.0 } else { 1.0 };
    sign * if e == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(e - bias) }
}

fn float(float: Float, bytes: &[u8], i: usize) -> f64 {
    match float {
        Float::F32 => f64::from(f32::from_bits(number(bytes, 4, i) as u32)),
        Float::F16 => small(number(bytes, 2, i), 5, 10),
        Float::Bf16 => f64::from(f32::from_bits((number(bytes, 2, i) as u32) << 16)),
        Float::F8E4m3 => small(number(bytes, 1, i), 4, 3),
        Float::F8E5m2 => small(number(bytes, 1, i), 5, 2),
    }
}

fn group(g: &Group, c: usize) -> usize {
    match g {
        Group::Run(n) => c / n,
        Group::Index { of, .. } => number(of, 2, c) as usize,
    }
}

fn groups(g: &Group, cols: usize) -> usize {
    match g {
        Group::Run(n) => cols.div_ceil(*n),
        Group::Index { groups, .. } => *groups,
    }
}

fn scale(s: &Scales, groups: usize, r: usize, g: usize) -> f64 {
    match s {
        Scales::Float(f, bytes) => float(*f, bytes, r * groups + g),
        Scales::Int { bits, per, codes, super_scales, super_mins } => {
            let at = r * groups.div_ceil(*per) + g / per;
            let min = super_mins.as_ref().map_or(0.0, |m| float(Float::F16, m, at));
            float(Float::F16, super_scales, at) * code(codes, usize::from(*bits), r * groups + g) as f64 + min
        }
    }
}

/// The `i`-th stored value, which lies at `(r, c)`.
fn value(p: &Piece, i: usize, r: usize, c: usize) -> f64 {
    let scaled = |s: &Scales, g: &Group| scale(s, groups(g, p.cols), r, group(g, c));
    match &p.values {
        Values::Float(f, bytes) => float(*f, bytes, i),
        Values::Int { bits, codes, scales, zeros, group: g } => {
            let bits = usize::from(*bits);
            let zero = match zeros {
                Some(Zeros::Codes(z)) => code(z, bits, r * groups(g, p.cols) + group(g, c)) as f64,
                Some(Zeros::Real(z)) => scaled(z, g),
                Some(Zeros::Minima(m)) => return scaled(scales, g) * code(codes, bits, i) as f64 - scaled(m, g),
                None => (1 << (bits - 1)) as f64,
            };
            scaled(scales, g) * (code(codes, bits, i) as f64 - zero)
        }
        Values::Codebook { bits, codes, tables, scales } => {
            let owner = match tables.owner {
                Owner::Matrix => 0,
                Owner::Row => r,
                Owner::Group(n) => r * p.cols.div_ceil(n) + c / n,
            };
            let t = float(tables.float, &tables.bytes, (owner << bits) + code(codes, usize::from(*bits), i));
            scales.as_ref().map_or(t, |(s, g)| t * scaled(s, g))
        }
        Values::Ternary { codes, scales, group: g } => {
            let digit = usize::from(codes[i / 5]) / [1, 3, 9, 27, 81][i % 5] % 3;
            (digit as f64 - 1.0) * scaled(scales, g)
        }
        Values::Gguf(GgufType::Q8_0, b) => {
            f64::from(b[i / 32 * 34 + 2 + i % 32] as i8) * small(number(&b[i / 32 * 34..], 2, 0), 5, 10)
        }
        Values::Gguf(GgufType::Q4_0, b) => {
            let q = b[i / 32 * 18 + 2 + i % 16] >> (i % 32 / 16 * 4) & 15;
            (f64::from(q) - 8.0) * small(number(&b[i / 32 * 18..], 2, 0), 5, 10)
        }
        Values::Gguf(kind, _) => panic!("no reference for {kind:?}"),
    }
}

/// A piece in f64: walks the pattern in order and counts values as they come, whatever the starts say about where a row
/// begins.
fn piece(p: &Piece) -> Vec<f64> {
    let (rows, cols) = (p.rows, p.cols);
    let (mut out, mut next) = (vec![0.0; rows * cols], 0);
    for r in 0..rows {
        let stored: Vec<usize> = match &p.pattern {
            Pattern::Dense => (0..cols).collect(),
            Pattern::Nm { n, m, index } => {
                let (n, m) = (usize::from(*n), usize::from(*m));
                let bits = (0..).find(|b| 1 << b >= m).unwrap();
                let run = |j: usize| j / n % (cols / m) * m;
                (0..cols / m * n).map(|j| run(j) + code(index, bits, r * (cols / m * n) + j)).collect()
            }
            Pattern::Mask { height, bits, .. } => {
                let bytes = cols.div_ceil(8);
                (0..cols).filter(|c| bits[r / height * bytes + c / 8] >> (c % 8) & 1 == 1).collect()
            }
            Pattern::Csr { starts, columns } => {
                let size = if cols <= 65536 { 2 } else { 4 };
                let (a, b) = (number(starts, 4, r), number(starts, 4, r + 1));
                (a..b).map(|i| number(columns, size, i as usize) as usize).collect()
            }
            Pattern::Blocks { height, width, starts, columns } => {
                let size = if cols / width <= 65536 { 2 } else { 4 };
                let (a, b) = (number(starts, 4, r / height), number(starts, 4, r / height + 1));
                let first = |i| number(columns, size, i as usize) as usize * width;
                (a..b).flat_map(|i| (0..*width).map(move |j| first(i) + j)).collect()
            }
        };
        for c in stored {
            out[r * cols + c] = value(p, next, r, c);
            next += 1;
        }
    }
    out
}

/// The terms of a stored matrix in f64, and the sum of magnitudes behind every entry (what rounding is measured
/// against).
pub fn decode_sum(s: &Stored) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut size) = (vec![0.0; s.rows * s.cols], vec![0.0; s.rows * s.cols]);
    for term in &s.terms {
        match term {
            Term::Piece(p) => {
                for (i, v) in piece(p).into_iter().enumerate() {
                    out[i] += v;
                    size[i] += v.abs();
                }
            }
            Term::Product(l, r) => {
                let (a, b) = (piece(l), piece(r));
                for row in 0..s.rows {
                    for c in 0..s.cols {
                        for k in 0..l.cols {
                            let v = a[row * l.cols + k] * b[k * s.cols + c];
                            out[row * s.cols + c] += v;
                            size[row * s.cols + c] += v.abs();
                        }
                    }
                }
            }
            Term::Signed(s) => {
                let (a, b, k, cols) = (piece(&s.left), piece(&s.right), s.left.cols, s.right.cols);
                for at in 0..s.left.rows * cols {
                    let (row, c) = (at / cols, at % cols);
                    let turned = s.signs[row * cols.div_ceil(8) + c / 8] >> (c % 8) & 1 == 1;
                    let each = (0..k).map(|i| a[row * k + i] * b[i * cols + c]);
                    out[at] += each.clone().sum::<f64>() * if turned { -1.0 } else { 1.0 };
                    size[at] += each.map(f64::abs).sum::<f64>();
                }
            }
        }
    }
    (out, size)
}

fn pick<T: Clone>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.below(of.len())].clone()
}

/// A kind that `[rows, cols]` allows, and a mask that allows it: any density, often with empty rows, sometimes nothing
/// at all.
pub fn kind_and_mask(rng: &mut Rng, rows: usize, cols: usize) -> (PatternKind, Option<Mask>) {
    let keep = pick(rng, &[0.0, 0.1, 0.5, 0.9, 1.0]);
    let mut mask = Mask::from_fn(rows, cols, |r, _| rng.f64() < keep && r % 5 != 3);
    let kind = match rng.below(5) {
        0 => PatternKind::Dense,
        1 => {
            let fits: Vec<usize> = (2..=32).filter(|&m| cols.is_multiple_of(m)).collect();
            if fits.is_empty() {
                return (PatternKind::Csr, Some(mask));
            }
            let m = pick(rng, &fits);
            let n = 1 + rng.below(m);
            for r in 0..rows {
                for first in (0..cols).step_by(m) {
                    let kept: Vec<usize> = (first..first + m).filter(|&c| mask.get(r, c)).collect();
                    kept.iter().skip(n).for_each(|&c| mask.set(r, c, false));
                }
            }
            return (PatternKind::Nm { n: n as u8, m: m as u8 }, Some(mask));
        }
        2 => PatternKind::Mask { height: pick(rng, &[1, 2, 8, 32]) },
        3 => PatternKind::Csr,
        _ => {
            let heights: Vec<usize> = (1..=8).filter(|h| rows.is_multiple_of(*h)).collect();
            let widths: Vec<usize> = (1..=8).filter(|w| cols.is_multiple_of(*w)).collect();
            PatternKind::Blocks { height: pick(rng, &heights), width: pick(rng, &widths) }
        }
    };
    (kind, if rng.below(4) == 0 { None } else { Some(mask) })
}

pub fn group_of(rng: &mut Rng, cols: usize) -> Group {
    match rng.below(3) {
        0 => Group::Run(cols.max(1)),
        1 => Group::Run(pick(rng, &[1, 3, 8, 16, 32])),
        _ => {
            let groups = 1 + rng.below(5);
            let of: Vec<u8> = (0..cols).flat_map(|_| (rng.below(groups) as u16).to_le_bytes()).collect();
            Group::Index { groups, of: of.into() }
        }
    }
}

fn scales_of(rng: &mut Rng, rows: usize, group: &Group, cols: usize) -> Mat {
    Mat::from_fn(rows, groups(group, cols), |_, _| (rng.normal() * 64.0).round() / 1024.0)
}

/// A random piece of `[rows, cols]`.
pub fn random_piece(rng: &mut Rng, rows: usize, cols: usize) -> Piece {
    let (kind, mask) = kind_and_mask(rng, rows, cols);
    let scales = pick(
        rng,
        &[
            ScaleCodec::F32,
            ScaleCodec::F16,
            ScaleCodec::F8E4m3,
            ScaleCodec::F8E5m2,
            ScaleCodec::Int { bits: 6, per: 8 },
        ],
    );
    let group = group_of(rng, cols);
    let piece = match rng.below(5) {
        0 => {
            let codec = pick(rng, &[Float::F32, Float::F16, Float::Bf16, Float::F8E4m3, Float::F8E5m2]);
            let w = Mat::from_fn(rows, cols, |_, _| rng.normal());
            pack_float(w.view(), mask.as_ref(), kind, codec)
        }
        1 => {
            let bits = 2 + rng.below(7) as u8;
            let codes = (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect();
            let n = groups(&group, cols) * rows;
            let zeros = (rng.below(2) == 0).then(|| (0..n).map(|_| rng.below(1 << bits) as u8).collect());
            let q = Integers {
                rows,
                cols,
                bits,
                codes,
                scales: scales_of(rng, rows, &group, cols),
                zeros,
                group,
                offsets: None,
            };
            if mask.is_none() && rng.below(3) == 0 {
                let zeros = scales_of(rng, rows, &q.group, cols);
                let q = Integers { zeros: None, ..q };
                let codec = pick(rng, &[ScaleCodec::F16, scales]);
                let mut piece = pack_integers_off(&q, &zeros, None, kind, scales, codec).unwrap();
                if let (Values::Int { zeros: Some(z), .. }, 0) = (&mut piece.values, rng.below(2)) {
                    let Zeros::Real(s) = z.clone() else { panic!("real zero points") };
                    *z = Zeros::Minima(s);
                }
                return piece;
            }
            pack_integers(&q, mask.as_ref(), kind, scales)
        }
        2 => {
            let bits = 1 + rng.below(8) as u8;
            let codes = (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect();
            let owner = pick(rng, &[Owner::Matrix, Owner::Row, Owner::Group(5), Owner::Group(32), Owner::Group(1000)]);
            let mut tables = Mat::from_fn(owner.count(rows, cols).unwrap(), 1 << bits, |_, _| rng.normal());
            (0..tables.rows()).for_each(|o| tables.row_mut(o)[rng.below(1 << bits)] = 0.0);
            let float = pick(rng, &[Float::F32, Float::F16]);
            let with = (rng.below(2) == 0).then(|| (scales_of(rng, rows, &group, cols), group));
            let q = Codebook { bits, codes, owner, tables, scales: with };
            pack_codebook((rows, cols), &q, mask.as_ref(), kind, float, scales)
        }
        3 => {
            let codes = (0..rows * cols).map(|_| rng.below(3) as i8 - 1).collect();
            let q = Ternary { codes, scales: scales_of(rng, rows, &group, cols), group };
            pack_ternary((rows, cols), &q, mask.as_ref(), kind, scales)
        }
        _ if cols.is_multiple_of(32) => {
            let codec = pick(rng, &[GgufType::Q8_0, GgufType::Q4_0]);
            let w: Vec<f32> = (0..rows * cols).map(|_| rng.normal()).collect();
            let values = Values::Gguf(codec, codec.encode(&w).into());
            Ok(Piece { rows, cols, pattern: Pattern::Dense, values })
        }
        _ => {
            let w = Mat::from_fn(rows, cols, |_, _| rng.normal());
            pack_float(w.view(), mask.as_ref(), kind, Float::F32)
        }
    };
    piece.unwrap()
}

/// A random sum of up to three terms, products among them.
pub fn random_stored(rng: &mut Rng) -> Stored {
    let rows = pick(rng, &[0, 1, 2, 7, 8, 12, 33]);
    let cols = pick(rng, &[1, 5, 8, 13, 32, 64, 70, 96, 160]);
    let terms = (0..rng.below(4)).map(|_| match rng.below(4) {
        1 if rows > 0 => {
            let rank = 1 + rng.below(6.min(rows.min(cols)));
            let mut dense = |r, c| loop {
                let p = random_piece(rng, r, c);
                if p.pattern == Pattern::Dense {
                    break p;
                }
            };
            let (left, right) = (dense(rows, rank), dense(rank, cols));
            Term::Signed(Signed::new(&Mask::from_fn(rows, cols, |_, _| rng.below(2) == 0), left, right))
        }
        0 => {
            let rank = rng.below(6);
            Term::Product(random_piece(rng, rows, rank), random_piece(rng, rank, cols))
        }
        _ => Term::Piece(random_piece(rng, rows, cols)),
    });
    let s = Stored::new(rows, cols, terms.collect());
    if rng.below(3) > 0 {
        return s;
    }
    let (input, output) = (random_maps(rng, cols), random_maps(rng, rows));
    s.with_maps(input, output)
}

/// Up to three maps of `n` values.
pub fn random_maps(rng: &mut Rng, n: usize) -> Vec<Map> {
    let sizes: Vec<usize> = (1..=n).filter(|s| n.is_multiple_of(*s)).collect();
    let mut out = Vec::new();
    for _ in 0..rng.below(4) {
        let float = pick(rng, &[Float::F32, Float::F16]);
        out.push(match rng.below(4) {
            0 => {
                let mut index: Vec<u32> = (0..n as u32).collect();
                (1..n).rev().for_each(|i| index.swap(i, rng.below(i + 1)));
                Map::permutation(&index)
            }
            1 => Map::diagonal(&(0..n).map(|_| rng.normal()).collect::<Vec<_>>(), float).unwrap(),
            2 => {
                let fits: Vec<usize> = sizes.iter().copied().filter(|s| hadamard_parts(*s).is_some()).collect();
                let size = if n == 0 { 4 } else { pick(rng, &fits) };
                let signs: Vec<bool> = (0..n).map(|_| rng.below(2) == 0).collect();
                Map::hadamard(size, (rng.below(2) == 0).then_some(&signs[..]))
            }
            _ => {
                let size = if n == 0 { 3 } else { pick(rng, &sizes) };
                let by = 1.0 / (size as f32).sqrt();
                Map::dense(size, &(0..size * size).map(|_| rng.normal() * by).collect::<Vec<_>>(), float).unwrap()
            }
        });
    }
    out
}

/// A map of `n` values as a matrix, entry by entry from its definition.
pub fn map_matrix(map: &Map, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
        out[i * n + j] = match map {
            Map::Permutation(index) => f64::from(u8::from(number(index, 4, i) as usize == j)),
            Map::Diagonal(f, bytes) if i == j => float(*f, bytes, i),
            Map::Hadamard { size, signs } if i / size == j / size => {
                let (h, m) = hadamard_parts(*size).unwrap();
                let (a, b) = (i % size, j % size);
                let core = f64::from(hadamard_core(h)[a / m * h + b / m]);
                let walsh = if ((a % m) & (b % m)).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                let sign = if signs.as_ref().is_some_and(|s| s[j / 8] >> (j % 8) & 1 == 1) { -1.0 } else { 1.0 };
                core * walsh * sign / (*size as f64).sqrt()
            }
            Map::Dense { size, float: f, values } if i / size == j / size => {
                float(*f, values, i % size * size + j % size)
            }
            _ => 0.0,
        };
    }
    out
}

fn product(a: &[f64], b: &[f64], (rows, inner, cols): (usize, usize, usize)) -> Vec<f64> {
    let entry = |r: usize, c: usize| (0..inner).map(|k| a[r * inner + k] * b[k * cols + c]).sum();
    (0..rows * cols).map(|i| entry(i / cols, i % cols)).collect()
}

/// A stored matrix in f64, maps and all, and the sum of magnitudes behind every entry (what rounding is measured
/// against).
pub fn decode(s: &Stored) -> (Vec<f64>, Vec<f64>) {
    let (rows, cols) = (s.rows, s.cols);
    let (mut w, mut size) = decode_sum(s);
    let abs = |m: &[f64]| m.iter().map(|v| v.abs()).collect::<Vec<_>>();
    for map in s.input.iter().rev() {
        let m = map_matrix(map, cols);
        (w, size) = (product(&w, &m, (rows, cols, cols)), product(&size, &abs(&m), (rows, cols, cols)));
    }
    for map in &s.output {
        let m = map_matrix(map, rows);
        (w, size) = (product(&m, &w, (rows, rows, cols)), product(&abs(&m), &size, (rows, rows, cols)));
    }
    (w, size)
}
