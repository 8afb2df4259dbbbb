//! Exact bytes, and short names for people.

use std::fmt;

use crate::{Float, Group, Map, Owner, Pattern, PatternKind, Piece, Scales, Stored, Tables, Term, Values, Zeros};

impl Float {
    /// The codec's short name: `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::Bf16 => "bf16",
            Float::F8E4m3 => "f8_e4m3",
            Float::F8E5m2 => "f8_e5m2",
        }
    }
}

impl Pattern {
    /// Bytes of the indices.
    pub fn bytes(&self) -> u64 {
        let n = match self {
            Pattern::Dense => 0,
            Pattern::Nm { index, .. } => index.len(),
            Pattern::Mask { bits, starts, .. } => bits.len() + starts.len(),
            Pattern::Csr { starts, columns } | Pattern::Blocks { starts, columns, .. } => starts.len() + columns.len(),
        };
        n as u64
    }

    /// The pattern without its indices.
    pub fn kind(&self) -> PatternKind {
        match *self {
            Pattern::Dense => PatternKind::Dense,
            Pattern::Nm { n, m, .. } => PatternKind::Nm { n, m },
            Pattern::Mask { height, .. } => PatternKind::Mask { height },
            Pattern::Csr { .. } => PatternKind::Csr,
            Pattern::Blocks { height, width, .. } => PatternKind::Blocks { height, width },
        }
    }
}

impl fmt::Display for PatternKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PatternKind::Dense => f.write_str("dense"),
            PatternKind::Nm { n, m } => write!(f, "{n}:{m}"),
            PatternKind::Mask { height: 1 } => f.write_str("bitmask"),
            PatternKind::Mask { height } => write!(f, "bitmask/{height}"),
            PatternKind::Csr => f.write_str("csr"),
            PatternKind::Blocks { height, width } => write!(f, "block {height}x{width}"),
        }
    }
}

impl Group {
    fn bytes(&self) -> u64 {
        match self {
            Group::Run(_) => 0,
            Group::Index { of, .. } => of.len() as u64,
        }
    }

    fn name(&self, cols: usize) -> String {
        match self {
            Group::Run(n) if *n >= cols => " row".into(),
            Group::Run(n) => format!(" g{n}"),
            Group::Index { groups, .. } => format!(" g{} by index", cols.div_ceil((*groups).max(1))),
        }
    }
}

impl Scales {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        match self {
            Scales::Float(_, b) => b.len() as u64,
            Scales::Int { codes, super_scales, super_mins, .. } => {
                (codes.len() + super_scales.len() + super_mins.as_ref().map_or(0, |m| m.len())) as u64
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Scales::Float(..) => String::new(),
            Scales::Int { bits, .. } => format!(" s{bits}"),
        }
    }
}

impl Zeros {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        match self {
            Zeros::Codes(b) => b.len() as u64,
            Zeros::Real(s) | Zeros::Minima(s) => s.bytes(),
        }
    }

    fn name(&self) -> String {
        match self {
            Zeros::Codes(_) => " zero".into(),
            Zeros::Real(Scales::Float(f, _)) => format!(" zero {}", f.name()),
            Zeros::Real(Scales::Int { bits, .. }) => format!(" zero{bits}"),
            Zeros::Minima(Scales::Float(f, _)) => format!(" min {}", f.name()),
            Zeros::Minima(Scales::Int { bits, .. }) => format!(" min{bits}"),
        }
    }
}

impl Tables {
    fn name(&self) -> String {
        match self.owner {
            Owner::Matrix => String::new(),
            Owner::Row => " a row".into(),
            Owner::Group(n) => format!(" a g{n}"),
        }
    }
}

impl Values {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        match self {
            Values::Float(_, b) | Values::Gguf(_, b) => b.len() as u64,
            Values::Int { codes, scales, zeros, group, .. } => {
                codes.len() as u64 + scales.bytes() + zeros.as_ref().map_or(0, Zeros::bytes) + group.bytes()
            }
            Values::Codebook { codes, tables, scales, .. } => {
                let scales = scales.as_ref().map_or(0, |(s, g)| s.bytes() + g.bytes());
                codes.len() as u64 + tables.bytes.len() as u64 + scales
            }
            Values::Ternary { codes, scales, group } => codes.len() as u64 + scales.bytes() + group.bytes(),
        }
    }

    fn name(&self, cols: usize) -> String {
        match self {
            Values::Float(f, _) => f.name().into(),
            Values::Int { bits, scales, zeros, group, .. } => {
                let zero = zeros.as_ref().map_or(String::new(), Zeros::name);
                format!("int{bits}{}{zero}{}", group.name(cols), scales.name())
            }
            Values::Codebook { bits, tables, scales, .. } => {
                let scales = scales.as_ref().map_or(String::new(), |(s, g)| g.name(cols) + &s.name());
                format!("table{bits}{}{scales}", tables.name())
            }
            Values::Ternary { scales, group, .. } => format!("ternary{}{}", group.name(cols), scales.name()),
            Values::Gguf(kind, _) => format!("{kind:?}").to_lowercase(),
        }
    }
}

impl Piece {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.pattern.bytes() + self.values.bytes()
    }

    /// A short name: `int4 g64`, `bitmask f16`, `q4_1`.
    pub fn codec_name(&self) -> String {
        let values = self.values.name(self.cols);
        if self.pattern == Pattern::Dense { values } else { format!("{} {values}", self.pattern.kind()) }
    }
}

impl Term {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        match self {
            Term::Piece(p) => p.bytes(),
            Term::Product(l, r) => l.bytes() + r.bytes(),
            Term::Signed(s) => s.bytes(),
        }
    }

    /// A short name: that of the piece, `lowrank 96 (int8 row)`, or `signs of lowrank 8 (int8 row)`.
    pub fn codec_name(&self) -> String {
        let product = |l: &Piece, r: &Piece| {
            let (a, b) = (l.codec_name(), r.codec_name());
            let both = if a == b { a } else { format!("{a}, {b}") };
            format!("lowrank {} ({both})", r.rows)
        };
        match self {
            Term::Piece(p) => p.codec_name(),
            Term::Product(l, r) => product(l, r),
            Term::Signed(s) => format!("signs of {}", product(&s.left, &s.right)),
        }
    }
}

impl Stored {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        let maps = self.input.iter().chain(&self.output).map(Map::bytes);
        self.terms.iter().map(Term::bytes).chain(maps).sum()
    }

    /// Bits of all buffers for each entry of the matrix; 0 for a matrix without entries.
    pub fn bits_per_weight(&self) -> f64 {
        let n = self.rows as f64 * self.cols as f64;
        if n == 0.0 { 0.0 } else { self.bytes() as f64 * 8.0 / n }
    }

    /// Fraction of entries that no term stores, so that they are zeros by pattern. A dense piece or a product stores
    /// every entry, and maps that mix values leave no zeros by pattern.
    pub fn sparsity(&self) -> f64 {
        if !self.input.iter().chain(&self.output).all(Map::moves_only) {
            return 0.0;
        }
        let entries = self.rows as f64 * self.cols as f64;
        let mut pieces = Vec::new();
        for term in &self.terms {
            match term {
                Term::Piece(p) if p.pattern != Pattern::Dense => pieces.push(p),
                _ => return 0.0,
            }
        }
        let stored = match pieces[..] {
            [] => 0,
            [p] => p.stored_values(),
            _ => {
                let (mut at, mut count) = (Vec::new(), 0);
                for r in 0..self.rows {
                    let mut seen = vec![false; self.cols];
                    for p in &pieces {
                        p.pattern.columns(r, self.cols, &mut at);
                        at.iter().for_each(|&c| seen[c as usize] = true);
                    }
                    count += seen.into_iter().filter(|&s| s).count();
                }
                count
            }
        };
        if entries == 0.0 { 0.0 } else { 1.0 - stored as f64 / entries }
    }

    /// A short name for people: `int4 g64`, `int4 g32 + csr f16`, `lowrank 96 (int8 row)`, `zero` for no terms; with
    /// its maps `int4 g32, in diagonal, hadamard 128, out permutation`.
    pub fn codec_name(&self) -> String {
        let mut name = match &self.terms[..] {
            [] => "zero".into(),
            // Terms of a stack are alike.
            [Term::Signed(first), more @ ..] if !more.is_empty() && more.iter().all(|t| first.is_like(t)) => {
                format!("{} x {}", self.terms.len(), self.terms[0].codec_name())
            }
            terms => terms.iter().map(Term::codec_name).collect::<Vec<_>>().join(" + "),
        };
        for (end, maps) in [("in", &self.input), ("out", &self.output)] {
            if !maps.is_empty() {
                let maps: Vec<String> = maps.iter().map(Map::name).collect();
                name += &format!(", {end} {}", maps.join(", "));
            }
        }
        name
    }
}
