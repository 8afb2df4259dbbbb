//! AMX: tiles, registers of 16 rows of up to 64 bytes, and exact products of two of them (Intel's Architecture
//! Instruction Set Extensions, chapter 3). Stable Rust has no intrinsics for them yet, so the instructions are written
//! out. The compiler knows nothing of tiles and leaves them alone; a thread's tiles are shaped when a [`Amx`] is made
//! and given back when it goes.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::unit::{GROUP, SUMS, Unit, part};
use crate::panel::{BLOCK, ROWS, TILE};

/// Bits of leaf 7's edx.
const TILES: u32 = 1 << 24;
const BYTES: u32 = 1 << 25;
const HALVES: u32 = 1 << 22;
/// The leaf that tells tiles' sizes.
const SIZES: u32 = 0x1D;

fn leaf_7() -> u32 {
    if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx }
}

/// The features that matter here, present and future, with whether the processor has them.
pub(crate) fn features() -> [(&'static str, bool); 3] {
    let has = |bit: u32| leaf_7() & bit != 0;
    [("amx-tile", has(TILES)), ("amx-int8", has(BYTES)), ("amx-bf16", has(HALVES))]
}

/// Whether this process may use tiles of bytes: the processor has them, as large as are used here, and the system has
/// agreed to keep them for its threads. Asked once.
pub(crate) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| leaf_7() & TILES != 0 && leaf_7() & BYTES != 0 && large() && agreed())
}

/// Whether there are eight tiles of 16 rows of 64 bytes.
fn large() -> bool {
    if __cpuid(0).eax < SIZES {
        return false;
    }
    let palette = __cpuid_count(SIZES, 1);
    let (row_bytes, tiles, rows) = (palette.ebx & 0xFFFF, palette.ebx >> 16, palette.ecx & 0xFFFF);
    row_bytes >= 64 && tiles >= 8 && rows >= 16
}

/// Asks the system for the state that tiles are, for all threads of this process.
#[cfg(target_os = "linux")]
fn agreed() -> bool {
    /// `ARCH_REQ_XCOMP_PERM`, and the number of the tiles' data among the components of a thread's state.
    const ASK: libc::c_ulong = 0x1023;
    const DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ASK, DATA) == 0 }
}

/// Other systems ask otherwise, or do not keep tiles at all.
#[cfg(not(target_os = "linux"))]
fn agreed() -> bool {
    false
}

/// Multiply-adds of a step of [`Amx::peak`].
pub(crate) const PEAK: usize = 4 * SUMS * 64;

/// What tiles' shapes are told by.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    none: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles, shaped for products of so many columns: 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 codes.
pub(crate) struct Amx(());

impl Amx {
    /// Panics where tiles are not granted.
    pub(crate) fn new(columns: usize) -> Amx {
        assert!(granted() && (columns == 16 || columns == BLOCK), "this process has no tiles of {columns} columns");
        Amx::shaped([columns as u16, 4 * ROWS as u16], [TILE as u8, columns as u8 / 4])
    }

    /// Bytes of a row of x and of codes, rows of both.
    fn shaped([x, codes]: [u16; 2], [x_rows, code_rows]: [u8; 2]) -> Amx {
        let (row, n) = (4 * ROWS as u16, TILE as u8);
        let mut shapes = Shapes { palette: 1, start: 0, none: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].copy_from_slice(&[row, row, row, row, x, x, codes, codes]);
        shapes.rows[..8].copy_from_slice(&[n, n, n, n, x_rows, x_rows, code_rows, code_rows]);
        // SAFETY: the 64 bytes describe shapes that the processor has; only callers that were granted tiles come here.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly)) };
        Amx(())
    }

    /// What multiplies.
    pub(crate) fn unit(&self) -> Shaped<'_> {
        Shaped(PhantomData)
    }

    /// So many steps of [`PEAK`] multiply-adds out of registers: what tiles can do at most.
    pub(crate) fn peak(steps: usize) {
        assert!(granted(), "this process has no tiles");
        let _tiles = Amx::shaped([64, 64], [16, 16]);
        for _ in 0..steps {
            // SAFETY: all tiles have 16 rows of 64 bytes.
            unsafe {
                asm!(
                    "tdpbusd tmm0, tmm4, tmm6",
                    "tdpbusd tmm1, tmm4, tmm7",
                    "tdpbusd tmm2, tmm5, tmm6",
                    "tdpbusd tmm3, tmm5, tmm7",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack, preserves_flags, nomem)
                );
            }
        }
    }
}

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: it was shaped; a thread without tiles is cheaper to put aside.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// The tiles of this thread while they are shaped; not to be sent to another.
#[derive(Clone, Copy)]
pub(crate) struct Shaped<'a>(PhantomData<(&'a Amx, *const ())>);

/// A product into tile `$sums`, of the part of x at `x + $x` and the codes at `codes + $codes`.
macro_rules! product {
    ($dot:literal, $sums:literal, $rows:literal, $with:literal, $x:literal, $codes:literal) => {
        concat!(
            "tilezero ",
            $sums,
            "\n",
            "tileloadd ",
            $rows,
            ", [{x} + {x_row}*1 + ",
            $x,
            "]\n",
            "tileloadd ",
            $with,
            ", [{codes} + {row}*1 + ",
            $codes,
            "]\n",
            $dot,
            " ",
            $sums,
            ", ",
            $rows,
            ", ",
            $with
        )
    };
}

/// Four products, of parts of x at four distances and of codes at others, and one alone.
macro_rules! products {
    ($x:ident, $codes:ident, $sums:ident, $dot:literal, [$($at:literal),*], [$($from:literal),*]) => {
        products!(@ $x, $codes, $sums, $dot, $($at,)* $($from,)*)
    };
    (@ $x:ident, $codes:ident, $sums:ident, $dot:literal,
     $a:literal, $b:literal, $c:literal, $d:literal, $e:literal, $f:literal, $g:literal, $h:literal,) => {
        asm!(
            product!($dot, "tmm0", "tmm4", "tmm6", $a, $e),
            product!($dot, "tmm1", "tmm5", "tmm7", $b, $f),
            product!($dot, "tmm2", "tmm4", "tmm6", $c, $g),
            product!($dot, "tmm3", "tmm5", "tmm7", $d, $h),
            "tilestored [{sums} + {row}*1], tmm0",
            "tilestored [{sums} + {row}*1 + 1024], tmm1",
            "tilestored [{sums} + {row}*1 + 2048], tmm2",
            "tilestored [{sums} + {row}*1 + 3072], tmm3",
            x = in(reg) $x, codes = in(reg) $codes, sums = in(reg) $sums, x_row = in(reg) BLOCK, row = in(reg) 4 * ROWS,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            out("tmm7") _, options(nostack, preserves_flags)
        )
    };
    ($x:ident, $codes:ident, $sums:ident, $dot:literal) => {
        asm!(
            product!($dot, "tmm0", "tmm4", "tmm6", 0, 0),
            "tilestored [{sums} + {row}*1], tmm0",
            x = in(reg) $x, codes = in(reg) $codes, sums = in(reg) $sums, x_row = in(reg) BLOCK, row = in(reg) 4 * ROWS,
            out("tmm0") _, out("tmm4") _, out("tmm6") _, options(nostack, preserves_flags)
        )
    };
}

impl Unit for Shaped<'_> {
    #[inline(always)]
    unsafe fn products<const COLUMNS: usize, const SIGNED: bool>(
        self,
        x: *const i8,
        codes: *const u8,
        sums: *mut i32,
        step: usize,
        n: usize,
    ) {
        const { assert!(GROUP == 4 && TILE * BLOCK == 512 && ROWS * 4 == 64 && SUMS * 4 == 1024) };
        // SAFETY: as the caller promises; the tiles are shaped for these sizes.
        unsafe {
            if n == GROUP {
                let (x, codes) = (x.add(part::<COLUMNS>(step)), codes.add(step * COLUMNS * ROWS));
                match (COLUMNS == BLOCK, SIGNED) {
                    (true, true) => products!(x, codes, sums, "tdpbssd", [0, 512, 1024, 1536], [0, 512, 1024, 1536]),
                    (true, false) => products!(x, codes, sums, "tdpbsud", [0, 512, 1024, 1536], [0, 512, 1024, 1536]),
                    (false, true) => products!(x, codes, sums, "tdpbssd", [0, 16, 512, 528], [0, 256, 512, 768]),
                    (false, false) => products!(x, codes, sums, "tdpbsud", [0, 16, 512, 528], [0, 256, 512, 768]),
                }
                return;
            }
            let mut i = 0;
            while i < n {
                let (x, codes) = (x.add(part::<COLUMNS>(step + i)), codes.add((step + i) * COLUMNS * ROWS));
                let sums = sums.add(i * SUMS);
                if SIGNED {
                    products!(x, codes, sums, "tdpbssd");
                } else {
                    products!(x, codes, sums, "tdpbsud");
                }
                i += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::unit::Slow;

    /// Products of random bytes, the extremes among them, by the processor and by the definition; nothing where it has
    /// no tiles.
    fn products<const COLUMNS: usize, const SIGNED: bool>() {
        let mut state = 7u64;
        let mut next = |n: usize| -> Vec<u8> {
            let mut byte = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                match state >> 60 {
                    0 => 0x80,
                    1 => 0x7F,
                    2 => 0xFF,
                    _ => (state >> 40) as u8,
                }
            };
            (0..n).map(|_| byte()).collect()
        };
        let tiles = Amx::new(COLUMNS);
        for _ in 0..20 {
            let (x, codes) = (next(12 * TILE * BLOCK), next(12 * ROWS * BLOCK));
            for (step, n) in [(0, 4), (4, 4), (8, 4), (0, 1), (4, 2), (8, 3)] {
                let mut sums = [[-1i32; 4 * SUMS]; 2];
                let [a, b] = sums.each_mut().map(|s| s.as_mut_ptr());
                // SAFETY: 12 blocks are there, and room for 4 products.
                unsafe {
                    let x = x.as_ptr().cast();
                    tiles.unit().products::<COLUMNS, SIGNED>(x, codes.as_ptr(), a, step, n);
                    Slow.products::<COLUMNS, SIGNED>(x, codes.as_ptr(), b, step, n);
                }
                assert!(sums[0] == sums[1], "{COLUMNS} columns, signed {SIGNED}, {n} from {step}");
            }
        }
    }

    #[test]
    fn tiles_multiply_as_defined() {
        if granted() {
            products::<16, true>();
            products::<16, false>();
            products::<32, true>();
            products::<32, false>();
            Amx::peak(3);
        }
    }
}
