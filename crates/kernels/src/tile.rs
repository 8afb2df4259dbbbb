//! Tiles: how a codec's bytes become f32 lanes, straight from the canonical encoding.
//!
//! A row is read in blocks of 32 columns (what shares a scale in every codec here); a block gives its scales once and then its values a
//! vector at a time. Decoded values are the same bits as `lacuna-format`'s decoder gives, on every instruction set, so a direct product and
//! one through a decoded tile cannot differ.

use bytes::Bytes;
use lacuna_base::float::{bf16_to_f32, f16_to_f32};
use lacuna_format::{Float, GgufType, Group, Pattern, Piece, Scales, Values};

use crate::simd::Simd;

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;

/// A codec whose blocks decode in registers.
pub(crate) trait Tile: Clone + Send + Sync {
    /// What a block's values share.
    type Shared<S: Simd>: Copy;
    /// Reads what block `k / 32` of `row` shares.
    /// # Safety
    /// `row` and the 32 columns from `k` lie inside the piece.
    unsafe fn shared<S: Simd>(&self, s: S, row: usize, k: usize) -> Self::Shared<S>;
    /// The `LANES` values from column `k + off` of the block at `k`.
    /// # Safety
    /// As for `shared`, with `off` a multiple of `LANES` below 32.
    unsafe fn lanes<S: Simd>(&self, s: S, shared: &Self::Shared<S>, row: usize, k: usize, off: usize) -> S::V;
    /// The values from column `k` to the row's end: fewer than 32, only for codecs that allow such rows. Row and columns lie in the piece.
    fn tail(&self, row: usize, k: usize, out: &mut [f32]);
}

macro_rules! float_tile {
    ($(#[$doc:meta])* $name:ident, $width:literal, $load:ident, $tail:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub(crate) struct $name {
            pub(crate) bytes: Bytes,
            pub(crate) cols: usize,
        }

        impl Tile for $name {
            type Shared<S: Simd> = ();
            #[inline(always)]
            unsafe fn shared<S: Simd>(&self, _: S, _: usize, _: usize) {}
            #[inline(always)]
            unsafe fn lanes<S: Simd>(&self, s: S, _: &(), row: usize, k: usize, off: usize) -> S::V {
                // SAFETY: the caller keeps inside the piece, whose length was checked when it was packed.
                unsafe { s.$load(self.bytes.as_ptr().add((row * self.cols + k + off) * $width).cast()) }
            }
            fn tail(&self, row: usize, k: usize, out: &mut [f32]) {
                let at = (row * self.cols + k) * $width;
                $tail(&self.bytes[at..at + out.len() * $width], out);
            }
        }
    };
}

float_tile!(
    /// Little-endian f16.
    F16,
    2,
    load_f16,
    f16_to_f32
);
float_tile!(
    /// Little-endian bf16.
    Bf16,
    2,
    load_bf16,
    bf16_to_f32
);

/// Little-endian f32, rows `stride` values apart: a matrix of f32 where it lies (aligned to bytes only) or a decoded tile of any other.
#[derive(Clone, Copy)]
pub(crate) struct Plain {
    pub(crate) data: *const u8,
    pub(crate) stride: usize,
}

// SAFETY: it is only read, while what it points into is borrowed.
unsafe impl Send for Plain {}
// SAFETY: see above.
unsafe impl Sync for Plain {}

impl Tile for Plain {
    type Shared<S: Simd> = ();
    #[inline(always)]
    unsafe fn shared<S: Simd>(&self, _: S, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, s: S, _: &(), row: usize, k: usize, off: usize) -> S::V {
        // SAFETY: the caller keeps inside the matrix; vector loads ask for no alignment.
        unsafe { s.load(self.data.add((row * self.stride + k + off) * 4).cast()) }
    }
    fn tail(&self, row: usize, k: usize, out: &mut [f32]) {
        for (i, o) in out.iter_mut().enumerate() {
            // SAFETY: columns k.. of this row lie inside the matrix.
            *o = unsafe { self.data.add((row * self.stride + k + i) * 4).cast::<f32>().read_unaligned() };
        }
    }
}

/// Integer codes of 4 or 8 bits with a float scale over runs of a multiple of 32 columns.
#[derive(Clone)]
pub(crate) struct Int<const BITS: usize> {
    codes: Bytes,
    scales: Bytes,
    float: Float,
    zeros: Option<Bytes>,
    cols: usize,
    groups: usize,
    run: usize,
}

impl<const BITS: usize> Int<BITS> {
    /// The tile of `piece`, where it is of this kind. The piece has passed its check.
    fn new(piece: &Piece) -> Option<Int<BITS>> {
        let Values::Int { bits, codes, scales: Scales::Float(float, scales), zeros, group: Group::Run(run) } =
            &piece.values
        else {
            return None;
        };
        let fits = usize::from(*bits) == BITS && piece.cols.is_multiple_of(BLOCK);
        let whole = run.is_multiple_of(BLOCK) || *run >= piece.cols;
        let plain = matches!(float, Float::F32 | Float::F16 | Float::Bf16);
        (fits && whole && plain && piece.pattern == Pattern::Dense).then(|| Int {
            codes: codes.clone(),
            scales: scales.clone(),
            float: *float,
            zeros: zeros.clone(),
            cols: piece.cols,
            groups: piece.cols.div_ceil(*run),
            run: *run,
        })
    }
}

impl<const BITS: usize> Tile for Int<BITS> {
    type Shared<S: Simd> = (S::V, S::V);

    #[inline(always)]
    unsafe fn shared<S: Simd>(&self, s: S, row: usize, k: usize) -> (S::V, S::V) {
        let at = row * self.groups + k / self.run;
        let scale = match self.float {
            Float::F16 => s.f16(u16::from_le_bytes([self.scales[2 * at], self.scales[2 * at + 1]])),
            Float::Bf16 => {
                f32::from_bits(u32::from(u16::from_le_bytes([self.scales[2 * at], self.scales[2 * at + 1]])) << 16)
            }
            _ => {
                let b = &self.scales[4 * at..4 * at + 4];
                f32::from_le_bytes([b[0], b[1], b[2], b[3]])
            }
        };
        let zero = match &self.zeros {
            None => f32::from(1u8 << (BITS - 1)),
            Some(z) if BITS == 8 => f32::from(z[at]),
            Some(z) => f32::from(z[at / 2] >> (4 * (at % 2)) & 15),
        };
        (s.splat(scale), s.splat(zero))
    }

    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, s: S, shared: &(S::V, S::V), row: usize, k: usize, off: usize) -> S::V {
        let at = row * self.cols + k + off;
        // SAFETY: the caller keeps inside the piece, whose length was checked; `at` is a multiple of LANES, so halves start at a byte.
        let codes = unsafe {
            let p = self.codes.as_ptr();
            if BITS == 8 { s.load_u8(p.add(at)) } else { s.load_u4(p.add(at / 2)) }
        };
        s.mul(s.sub(codes, shared.1), shared.0)
    }

    fn tail(&self, _: usize, _: usize, _: &mut [f32]) {
        unreachable!("rows are whole blocks")
    }
}

/// GGUF blocks of 32: Q4_0 (`KIND` 0), Q4_1 (1) and Q8_0 (2).
#[derive(Clone)]
pub(crate) struct Gguf<const KIND: usize> {
    bytes: Bytes,
    /// Blocks of a row.
    blocks: usize,
}

impl<const KIND: usize> Gguf<KIND> {
    const TYPE: GgufType = [GgufType::Q4_0, GgufType::Q4_1, GgufType::Q8_0][KIND];
    const BYTES: usize = [18, 20, 34][KIND];

    /// The tile of `piece`, where it is of this kind. The piece has passed its check.
    fn new(piece: &Piece) -> Option<Gguf<KIND>> {
        match &piece.values {
            Values::Gguf(kind, bytes) if *kind == Self::TYPE => {
                Some(Gguf { bytes: bytes.clone(), blocks: piece.cols / BLOCK })
            }
            _ => None,
        }
    }
}

impl<const KIND: usize> Tile for Gguf<KIND> {
    type Shared<S: Simd> = (S::V, S::V);

    #[inline(always)]
    unsafe fn shared<S: Simd>(&self, s: S, row: usize, k: usize) -> (S::V, S::V) {
        // SAFETY: the caller keeps inside the piece, whose length was checked.
        unsafe {
            let p = self.bytes.as_ptr().add((row * self.blocks + k / BLOCK) * Self::BYTES);
            let scale = s.f16(u16::from_le(p.cast::<u16>().read_unaligned()));
            let min = if KIND == 1 { s.f16(u16::from_le(p.add(2).cast::<u16>().read_unaligned())) } else { 0.0 };
            (s.splat(scale), s.splat(min))
        }
    }

    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, s: S, shared: &(S::V, S::V), row: usize, k: usize, off: usize) -> S::V {
        let (scale, min) = *shared;
        // SAFETY: as above; `off + LANES` stays within one half of the block, since LANES divides 16.
        unsafe {
            let p = self.bytes.as_ptr().add((row * self.blocks + k / BLOCK) * Self::BYTES);
            match KIND {
                0 => {
                    let codes = s.load_half_bytes(p.add(2 + off % 16), off >= 16);
                    s.mul(s.sub(codes, s.splat(8.0)), scale)
                }
                1 => {
                    let codes = s.load_half_bytes(p.add(4 + off % 16), off >= 16);
                    // Two roundings, as every decoder of this type has them.
                    s.add(s.mul(codes, scale), min)
                }
                _ => s.mul(s.load_i8(p.add(2 + off)), scale),
            }
        }
    }

    fn tail(&self, _: usize, _: usize, _: &mut [f32]) {
        unreachable!("rows are whole blocks")
    }
}

/// The tiles compiled in: what a dense piece of one of these codecs is multiplied through directly.
#[derive(Clone)]
pub(crate) enum AnyTile {
    F32(Bytes),
    F16(F16),
    Bf16(Bf16),
    Int4(Int<4>),
    Int8(Int<8>),
    Q4_0(Gguf<0>),
    Q4_1(Gguf<1>),
    Q8_0(Gguf<2>),
}

impl AnyTile {
    /// Names, in the order of the variants.
    pub(crate) const NAMES: [&'static str; 8] = ["f32", "f16", "bf16", "int4", "int8", "q4_0", "q4_1", "q8_0"];

    /// The tile of a piece that has passed its check, or `None` where it must be decoded first.
    pub(crate) fn new(piece: &Piece) -> Option<AnyTile> {
        if piece.pattern != Pattern::Dense {
            return None;
        }
        let cols = piece.cols;
        match &piece.values {
            Values::Float(Float::F32, b) => Some(AnyTile::F32(b.clone())),
            Values::Float(Float::F16, b) => Some(AnyTile::F16(F16 { bytes: b.clone(), cols })),
            Values::Float(Float::Bf16, b) => Some(AnyTile::Bf16(Bf16 { bytes: b.clone(), cols })),
            Values::Int { .. } => {
                Int::<4>::new(piece).map(AnyTile::Int4).or_else(|| Int::<8>::new(piece).map(AnyTile::Int8))
            }
            Values::Gguf(..) => Gguf::<0>::new(piece)
                .map(AnyTile::Q4_0)
                .or_else(|| Gguf::<1>::new(piece).map(AnyTile::Q4_1))
                .or_else(|| Gguf::<2>::new(piece).map(AnyTile::Q8_0)),
            _ => None,
        }
    }

    /// The name of the codec.
    pub(crate) fn name(&self) -> &'static str {
        let i = match self {
            AnyTile::F32(_) => 0,
            AnyTile::F16(_) => 1,
            AnyTile::Bf16(_) => 2,
            AnyTile::Int4(_) => 3,
            AnyTile::Int8(_) => 4,
            AnyTile::Q4_0(_) => 5,
            AnyTile::Q4_1(_) => 6,
            AnyTile::Q8_0(_) => 7,
        };
        AnyTile::NAMES[i]
    }
}
