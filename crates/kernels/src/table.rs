//! The kernel rows that are compiled in and those that this machine chose.

use crate::{Isa, cpu};

/// One compiled kernel: operation x codec x pattern x instruction set.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The operation.
    pub op: &'static str,
    /// How values are written.
    pub codec: &'static str,
    /// Where values are.
    pub pattern: &'static str,
    /// The instruction set it was compiled for.
    pub isa: Isa,
    /// Largest relative error against f64 that the conformance suite allows: `|got - exact| <= tolerance * sum |x·w|`
    /// (products), or absolute (others).
    pub tolerance: f32,
}

/// Relative error of a product's sum allowed by the conformance suite.
pub(crate) const PRODUCT_TOLERANCE: f32 = 2e-6;

/// Every row compiled in, whatever this machine has.
pub fn rows() -> Vec<Row> {
    let mut out = Vec::new();
    for isa in Isa::ALL {
        if isa == Isa::Amx {
            // Whatever else such a machine does, it does as those before it.
            let row =
                |codec| Row { op: "product of bytes", codec, pattern: "dense", isa, tolerance: PRODUCT_TOLERANCE };
            out.extend(crate::linear::codecs(true).map(row));
            continue;
        }
        let mut product = |op: &'static str, pattern: &'static str, codecs: &[&'static str]| {
            for codec in codecs {
                out.push(Row { op, codec, pattern, isa, tolerance: PRODUCT_TOLERANCE });
            }
        };
        product("product", "dense", &crate::linear::codecs(false).collect::<Vec<_>>());
        product("product", "dense", &["codebook of rows, 3 and 4 bits"]);
        product("product of bytes", "dense", &crate::linear::codecs(true).collect::<Vec<_>>());
        product("product", "mask or blocks of 8, 16, 32 rows", &["f16", "f32", "int2 to int4", "int5 to int8"]);
        product("product of bytes", "mask or blocks of 8, 16, 32 rows", &["int2 to int4", "int5 to int8"]);
        product("product", "mask, n:m", &["f16", "f32"]);
        product("product", "1:2, 2:4", &["int4"]);
        product("product of bytes", "1:2, 2:4", &["int4"]);
        product("product", "signs of a product", &["int8", "any other, as f32"]);
        product("product", "chosen columns", &["f32", "f16", "bf16", "int2 to int4", "int5 to int8"]);
        product("product of bytes", "chosen columns", &["int2 to int4", "int5 to int8"]);
        for pattern in ["dense", "n:m", "mask", "csr", "blocks", "product"] {
            product("product", pattern, &["any other, decoded first"]);
        }
        for codec in ["f32", "f16", "q8"] {
            out.push(Row { op: "attention", codec, pattern: "paged", isa, tolerance: 2e-5 });
        }
        out.push(Row { op: "norm", codec: "f32", pattern: "dense", isa, tolerance: 2e-5 });
        out.push(Row { op: "activation", codec: "f32", pattern: "dense", isa, tolerance: 1e-6 });
    }
    out
}

/// The rows that this machine uses: of each operation, codec and pattern the strongest.
pub fn chosen() -> Vec<Row> {
    let (all, best) = (rows(), Isa::best());
    let of = |r: &Row| (r.op, r.codec, r.pattern);
    let stronger = |r: &Row| all.iter().any(|o| of(o) == of(r) && o.isa > r.isa && o.isa <= best);
    all.iter().filter(|r| r.isa <= best && !stronger(r)).cloned().collect()
}

/// The processor's features that matter here, with whether it has them.
pub fn features() -> Vec<(&'static str, bool)> {
    cpu::features()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_chosen_once() {
        let mut names: Vec<_> = rows().iter().map(|r| (r.op, r.codec, r.pattern)).collect();
        let mut here: Vec<_> = chosen().iter().map(|r| (r.op, r.codec, r.pattern)).collect();
        names.sort();
        names.dedup();
        here.sort();
        assert_eq!(names, here);
        assert!(chosen().iter().all(|r| r.isa.available()));
    }
}
