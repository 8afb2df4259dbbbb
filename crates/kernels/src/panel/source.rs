//! Reading codes and scales out of what is stored, row by row, for panels to be made of them.

use lacuna_format::bits::{unpack, unpack_trits};
use lacuna_format::{Bytes, Float, GgufType, Group, Owner, Pattern, Piece, Scales, Values, Zeros};

use super::BLOCK;
use super::ints::Kind;

/// One row of codes and what its groups share, in the words of the source's [`Kind`].
#[derive(Default)]
pub(crate) struct Line {
    /// One code a byte, in the order of the pattern.
    pub(crate) codes: Vec<u8>,
    /// Scales, or their codes.
    pub(crate) scales: Vec<f32>,
    /// Zeros, minima, or their codes.
    pub(crate) seconds: Vec<f32>,
    /// Scales over 8 groups.
    pub(crate) supers: Vec<f32>,
    /// Minima over 8 groups.
    pub(crate) super_seconds: Vec<f32>,
    trits: Vec<f32>,
}

/// Reads row `r`.
type Read<'a> = Box<dyn Fn(usize, &mut Line) + Sync + 'a>;

/// A piece of integer codes whose groups are whole blocks of 32 columns.
pub(crate) struct Source<'a> {
    /// Bits of a code.
    pub(crate) bits: u8,
    pub(crate) kind: Kind,
    /// The zero of all groups, where they have none of their own.
    pub(crate) zero: u8,
    /// Columns of a group, a multiple of 32.
    pub(crate) run: usize,
    pub(crate) table: Option<Vec<f32>>,
    pub(crate) read: Read<'a>,
}

/// A group's columns as a multiple of 32, where it is one or spans the row.
fn whole(group: &Group, cols: usize) -> Option<usize> {
    match group {
        Group::Run(n) if *n >= cols => Some(cols.next_multiple_of(BLOCK).max(BLOCK)),
        Group::Run(n) if n.is_multiple_of(BLOCK) => Some(*n),
        _ => None,
    }
}

fn is_f16(scales: &Scales) -> bool {
    matches!(scales, Scales::Float(Float::F16, _))
}

/// Integer scales that panels keep as they are, for groups of a block: those without minima of their own under
/// super-scales of whole eights of blocks.
struct Coded<'a> {
    bits: u8,
    per: usize,
    codes: &'a [u8],
    super_scales: &'a [u8],
}

impl<'a> Coded<'a> {
    fn of(scales: &'a Scales) -> Option<Coded<'a>> {
        match scales {
            Scales::Int { bits, per, codes, super_scales, super_mins: None } if per.is_multiple_of(8) => {
                Some(Coded { bits: *bits, per: *per, codes, super_scales })
            }
            _ => None,
        }
    }

    /// The `n` codes of row `r`, and the super-scale of every eight of them.
    fn row(&self, r: usize, n: usize, room: &mut Vec<u8>, codes: &mut Vec<f32>, supers: &mut Vec<f32>) {
        room.resize(n, 0);
        unpack(self.codes, self.bits, r * n, room);
        codes.clear();
        codes.extend(room.iter().map(|&c| f32::from(c)));
        let first = r * n.div_ceil(self.per);
        supers.clear();
        supers.extend((0..n.div_ceil(8)).map(|i| f16_at(self.super_scales, 2 * (first + 8 * i / self.per))));
    }
}

/// The source of a checked piece, where it has one.
pub(crate) fn of(piece: &Piece) -> Option<Source<'_>> {
    let cols = piece.cols;
    // Where the codes of a row begin, and how many.
    let span = move |r: usize| piece.pattern.span(r, cols);
    let groups = |run: usize| cols.div_ceil(run);
    match &piece.values {
        Values::Int { bits, codes, scales, zeros, group } => {
            let run = whole(group, cols)?;
            let n = groups(run);
            if let Some(Zeros::Minima(minima)) = zeros {
                return with_minima(piece, *bits, codes, (scales, minima), run);
            }
            let kind = match (is_f16(scales), zeros) {
                (true, None) => Kind::F16,
                (false, None) => Kind::F32,
                (true, Some(Zeros::Codes(_))) => Kind::F16Zeros,
                (false, Some(Zeros::Codes(_))) => Kind::F32Zeros,
                (_, Some(Zeros::Real(_) | Zeros::Minima(_))) => Kind::F32Off,
            };
            let read = move |r: usize, line: &mut Line| {
                let span = span(r);
                line.codes.resize(span.len(), 0);
                unpack(codes, *bits, span.start, &mut line.codes);
                line.scales.resize(n, 0.0);
                scales.row(r, &mut line.scales);
                if let Some(z) = zeros {
                    line.seconds.resize(n, 0.0);
                    z.row(r, *bits, &mut line.seconds);
                }
            };
            let zero = if zeros.is_some() { 0 } else { 1 << (bits - 1) };
            Some(Source { bits: *bits, kind, zero, run, table: None, read: Box::new(read) })
        }
        Values::Ternary { codes, scales, group } => {
            let run = whole(group, cols)?;
            let n = groups(run);
            let kind = if is_f16(scales) { Kind::F16 } else { Kind::F32 };
            let read = move |r: usize, line: &mut Line| {
                let span = span(r);
                line.trits.resize(span.len(), 0.0);
                unpack_trits(codes, span.start, &mut line.trits);
                line.codes.clear();
                line.codes.extend(line.trits.iter().map(|t| (t + 1.0) as u8));
                line.scales.resize(n, 0.0);
                scales.row(r, &mut line.scales);
            };
            Some(Source { bits: 2, kind, zero: 1, run, table: None, read: Box::new(read) })
        }
        Values::Codebook { bits, codes, tables, scales } if tables.owner == Owner::Matrix => {
            // One bit more than one is kept as two: there is no plane for a single one.
            let wide = (*bits).max(2);
            let mut table = Vec::new();
            tables.row(0, cols, *bits, &mut table);
            table.resize(1 << wide, 0.0);
            if let (Pattern::Dense, Some((s, Group::Run(run)))) = (&piece.pattern, scales)
                && let (3 | 4, Some(kind)) = (wide, halves(s, *run))
            {
                return Some(tabled(piece, wide, codes, (table, kind), (s, *run)));
            }
            let (run, kind) = match scales {
                None => (cols.next_multiple_of(BLOCK).max(BLOCK), Kind::F16),
                Some((s, g)) => (whole(g, cols)?, if is_f16(s) { Kind::F16 } else { Kind::F32 }),
            };
            let n = groups(run);
            let read = move |r: usize, line: &mut Line| {
                let span = span(r);
                line.codes.resize(span.len(), 0);
                unpack(codes, *bits, span.start, &mut line.codes);
                line.scales.clear();
                line.scales.resize(n, 1.0);
                if let Some((s, _)) = scales {
                    s.row(r, &mut line.scales);
                }
            };
            Some(Source { bits: wide, kind, zero: 0, run, table: Some(table), read: Box::new(read) })
        }
        Values::Float(float @ (Float::F8E4m3 | Float::F8E5m2), bytes) => {
            let all: Vec<u8> = (0..=255).collect();
            let mut table = vec![0.0; 256];
            float.decode(&all, &mut table);
            let read = move |r: usize, line: &mut Line| {
                line.codes.clear();
                line.codes.extend_from_slice(&bytes[span(r)]);
                line.scales.clear();
                line.scales.push(1.0);
            };
            let run = cols.next_multiple_of(BLOCK).max(BLOCK);
            Some(Source { bits: 8, kind: Kind::F16, zero: 0, run, table: Some(table), read: Box::new(read) })
        }
        Values::Gguf(kind, bytes) => gguf(*kind, bytes, cols),
        Values::Float(..) | Values::Codebook { .. } => None,
    }
}

/// How blocks keep scales of which they have two, or integer ones that are worth keeping as such.
fn halves(scales: &Scales, run: usize) -> Option<Kind> {
    match scales {
        Scales::Int { bits: ..=7, per, super_mins: None, .. }
            if matches!(run, 16 | BLOCK) && (per * run).is_multiple_of(8 * BLOCK) =>
        {
            Some(Kind::Sixteens)
        }
        _ => (run == 16).then_some(Kind::F32Two),
    }
}

/// Dense codes of 3 or 4 bits into a table, with two scales a block.
fn tabled<'a>(
    piece: &'a Piece,
    bits: u8,
    codes: &'a Bytes,
    (table, kind): (Vec<f32>, Kind),
    (scales, run): (&'a Scales, usize),
) -> Source<'a> {
    let (cols, n) = (piece.cols, piece.cols.div_ceil(run));
    let read = move |r: usize, line: &mut Line| {
        line.codes.resize(cols, 0);
        unpack(codes, bits, r * cols, &mut line.codes);
        let mut all = vec![0.0; n];
        match scales {
            Scales::Int { bits, per, codes, super_scales, .. } if kind == Kind::Sixteens => {
                let mut room = vec![0; n];
                unpack(codes, *bits, r * n, &mut room);
                all.iter_mut().zip(&room).for_each(|(s, c)| *s = f32::from(*c));
                let first = r * n.div_ceil(*per);
                let over = (0..cols.div_ceil(8 * BLOCK)).map(|i| first + i * (8 * BLOCK / run) / per);
                line.supers.clear();
                line.supers.extend(over.map(|i| f16_at(super_scales, 2 * i)));
                line.super_seconds.clear();
                line.super_seconds.resize(line.supers.len(), 0.0);
            }
            _ => scales.row(r, &mut all),
        }
        let halves = |half: usize| {
            let all = &all;
            (0..cols.div_ceil(BLOCK)).map(move |b| all.get((b * BLOCK + 16 * half) / run).copied().unwrap_or(0.0))
        };
        line.scales.clear();
        line.scales.extend(halves(0));
        line.seconds.clear();
        line.seconds.extend(halves(1));
    };
    Source { bits, kind, zero: 0, run: BLOCK, table: Some(table), read: Box::new(read) }
}

/// Codes beside scales and minima: both floats, or both integers as panels keep them. Others have no panel.
fn with_minima<'a>(
    piece: &'a Piece,
    bits: u8,
    codes: &'a Bytes,
    (scales, minima): (&'a Scales, &'a Scales),
    run: usize,
) -> Option<Source<'a>> {
    let cols = piece.cols;
    let n = cols.div_ceil(run);
    let of = move |r: usize, line: &mut Line| {
        let span = piece.pattern.span(r, cols);
        line.codes.resize(span.len(), 0);
        unpack(codes, bits, span.start, &mut line.codes);
    };
    if let (Scales::Float(..), Scales::Float(..)) = (scales, minima) {
        let kind = if is_f16(scales) && is_f16(minima) { Kind::F16Min } else { Kind::F32Min };
        let read = move |r: usize, line: &mut Line| {
            of(r, line);
            line.scales.resize(n, 0.0);
            scales.row(r, &mut line.scales);
            line.seconds.resize(n, 0.0);
            minima.row(r, &mut line.seconds);
            line.seconds.iter_mut().for_each(|m| *m = -*m);
        };
        return Some(Source { bits, kind, zero: 0, run, table: None, read: Box::new(read) });
    }
    let (scales, minima) = (Coded::of(scales)?, Coded::of(minima)?);
    if run != BLOCK {
        return None;
    }
    let read = move |r: usize, line: &mut Line| {
        of(r, line);
        let mut room = Vec::new();
        scales.row(r, n, &mut room, &mut line.scales, &mut line.supers);
        minima.row(r, n, &mut room, &mut line.seconds, &mut line.super_seconds);
    };
    Some(Source { bits, kind: Kind::Super, zero: 0, run, table: None, read: Box::new(read) })
}

/// The source of a piece that is not dense as if it were: what is not there has the code of its group's zero. None
/// where no code says zero.
pub(crate) fn filled<'a>(piece: &'a Piece, source: Source<'a>) -> Option<Source<'a>> {
    if source.table.is_some() || source.kind.minima() {
        return None;
    }
    let (cols, read, run) = (piece.cols, source.read, source.run);
    let (zero, zeros) = (source.zero, source.kind.zeros());
    let read = move |r: usize, line: &mut Line| {
        read(r, line);
        let (mut columns, mut all) = (Vec::new(), vec![zero; cols]);
        if zeros {
            all.iter_mut().enumerate().for_each(|(c, q)| *q = line.seconds[c / run] as u8);
        }
        piece.pattern.columns(r, cols, &mut columns);
        columns.iter().zip(&line.codes).for_each(|(&c, &q)| all[c as usize] = q);
        line.codes = all;
    };
    Some(Source { read: Box::new(read), ..source })
}

/// One block's numbers, pushed to a line.
type Block = fn(&[u8], &mut Line);

fn gguf(kind: GgufType, bytes: &Bytes, cols: usize) -> Option<Source<'_>> {
    let (bits, scales, zero, block): (u8, Kind, u8, Block) = match kind {
        GgufType::Q4_0 | GgufType::IQ4_NL => (4, Kind::F16, 8, |b, l| {
            l.scales.push(f16_at(b, 0));
            nibbles(&b[2..18], l, |_| 0);
        }),
        GgufType::Q4_1 => (4, Kind::F16Min, 0, |b, l| {
            l.scales.push(f16_at(b, 0));
            l.seconds.push(f16_at(b, 2));
            nibbles(&b[4..20], l, |_| 0);
        }),
        GgufType::Q5_0 => (5, Kind::F16, 16, |b, l| {
            l.scales.push(f16_at(b, 0));
            nibbles(&b[6..22], l, |j| (b[2 + j / 8] >> (j % 8) & 1) << 4);
        }),
        GgufType::Q5_1 => (5, Kind::F16Min, 0, |b, l| {
            l.scales.push(f16_at(b, 0));
            l.seconds.push(f16_at(b, 2));
            nibbles(&b[8..24], l, |j| (b[4 + j / 8] >> (j % 8) & 1) << 4);
        }),
        // Signed bytes, counted from -128 on.
        GgufType::Q8_0 => (8, Kind::F16, 128, |b, l| {
            l.scales.push(f16_at(b, 0));
            l.codes.extend(b[2..34].iter().map(|q| q ^ 0x80));
        }),
        GgufType::Q4_K => (4, Kind::Super, 0, |b, l| {
            supers(b, l);
            for g in 0..8 {
                l.codes.extend(b[16 + g / 2 * 32..][..32].iter().map(|q| q >> (g % 2 * 4) & 15));
            }
        }),
        GgufType::Q5_K => (5, Kind::Super, 0, |b, l| {
            supers(b, l);
            for g in 0..8 {
                let low = b[48 + g / 2 * 32..][..32].iter().map(|q| q >> (g % 2 * 4) & 15);
                l.codes.extend(low.zip(&b[16..48]).map(|(q, h)| q | (h >> g & 1) << 4));
            }
        }),
        GgufType::Q3_K => (3, Kind::Sixteens, 4, |b, l| {
            sixteens(f16_at(b, 108), l, |g| {
                let low = if g < 8 { b[96 + g] & 15 } else { b[88 + g] >> 4 };
                f32::from(low | (b[104 + g % 4] >> (g / 4 * 2) & 3) << 4) - 32.0
            });
            for (at, shift, third) in (0..8).map(|g| (32 + g / 4 * 32, g % 4 * 2, g)) {
                let low = b[at..][..32].iter().map(|q| q >> shift & 3);
                l.codes.extend(low.zip(&b[..32]).map(|(q, h)| q | (h >> third & 1) << 2));
            }
        }),
        GgufType::Q6_K => (6, Kind::Sixteens, 32, |b, l| {
            sixteens(f16_at(b, 208), l, |g| f32::from(b[192 + g] as i8));
            for (half, run) in (0..8).map(|g| (g / 4, g % 4)) {
                let low = b[half * 64 + run % 2 * 32..][..32].iter().map(|q| q >> (run / 2 * 4) & 15);
                let high = b[128 + half * 32..][..32].iter().map(|h| (h >> (run * 2) & 3) << 4);
                l.codes.extend(low.zip(high).map(|(q, h)| q | h));
            }
        }),
        GgufType::IQ4_XS => (4, Kind::F32, 0, |b, l| {
            let (d, high) = (f16_at(b, 0), u16::from_le_bytes([b[2], b[3]]));
            for g in 0..8 {
                let scale = b[4 + g / 2] >> (g % 2 * 4) & 15 | ((high >> (2 * g) & 3) as u8) << 4;
                l.scales.push(d * (f32::from(scale) - 32.0));
                nibbles(&b[8 + 16 * g..][..16], l, |_| 0);
            }
        }),
        // Indices into a grid have panels of their own.
        _ => return None,
    };
    let table = matches!(kind, GgufType::IQ4_NL | GgufType::IQ4_XS).then(|| {
        // A block of scale 1 with every code once tells the levels, so that they are written down in one place only.
        let mut block = [0u8; 18];
        block[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
        (0..16).for_each(|i| block[2 + i] = i as u8);
        let mut out = vec![0.0; 32];
        GgufType::IQ4_NL.decode(&block, &mut out);
        out[..16].to_vec()
    });
    let row = cols / kind.block() * kind.block_bytes();
    let read = move |r: usize, line: &mut Line| {
        for v in [&mut line.scales, &mut line.seconds, &mut line.supers, &mut line.super_seconds] {
            v.clear();
        }
        line.codes.clear();
        bytes[r * row..(r + 1) * row].chunks_exact(kind.block_bytes()).for_each(|b| block(b, line));
    };
    Some(Source { bits, kind: scales, zero, run: BLOCK, table, read: Box::new(read) })
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// 32 codes: the lower halves of 16 bytes, then the upper ones, each with its higher bits.
fn nibbles(b: &[u8], line: &mut Line, high: impl Fn(usize) -> u8) {
    line.codes.extend(b.iter().enumerate().map(|(j, q)| q & 15 | high(j)));
    line.codes.extend(b.iter().enumerate().map(|(j, q)| q >> 4 | high(j + 16)));
}

/// Sixteen scales of 16 columns each under one f16.
fn sixteens(d: f32, line: &mut Line, scale: impl Fn(usize) -> f32) {
    line.supers.push(d);
    line.super_seconds.push(0.0);
    line.scales.extend((0..8).map(|b| scale(2 * b)));
    line.seconds.extend((0..8).map(|b| scale(2 * b + 1)));
}

/// The scales and minima of Q4_K and Q5_K: eight of 6 bits each in 12 bytes, under two f16.
fn supers(b: &[u8], line: &mut Line) {
    line.supers.push(f16_at(b, 0));
    line.super_seconds.push(f16_at(b, 2));
    let s = &b[4..16];
    for j in 0..8 {
        let (scale, min) = if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
        };
        line.scales.push(f32::from(scale));
        line.seconds.push(f32::from(min));
    }
}
