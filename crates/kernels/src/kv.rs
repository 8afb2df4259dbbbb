//! Pages of keys and values, in the layout that attention reads.

use half::f16;

/// Keys are handled in blocks of this many absolute positions; a page holds whole blocks.
pub const KEY_BLOCK: usize = 32;

/// The shape of the pages of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a page: a multiple of [`KEY_BLOCK`].
    pub page_tokens: usize,
}

impl KvLayout {
    /// Values of a value row: the head padded to whole vectors of any instruction set.
    pub(crate) fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Bytes of one page at `format`.
    pub fn page_bytes(&self, format: KvFormat) -> usize {
        self.kv_heads * self.page_tokens * (self.head_dim + self.padded()) * format.bytes()
    }
}

/// How cached values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32 bits: exactly what was computed.
    F32,
    /// IEEE half.
    F16,
}

impl KvFormat {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::F16 => 2,
        }
    }
}

/// A page of keys and values of one layer and one sequence.
///
/// Keys lie `[kv_heads][page_tokens / 32][head_dim][32]`, so that lanes run along keys; values `[kv_heads][page_tokens][head_dim padded]`.
#[derive(Clone, Debug)]
pub struct KvPage {
    layout: KvLayout,
    pub(crate) data: Data,
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    F32(Vec<f32>, Vec<f32>),
    F16(Vec<f16>, Vec<f16>),
}

impl KvPage {
    /// An empty page. Panics where `page_tokens` is no multiple of [`KEY_BLOCK`].
    #[track_caller]
    pub fn new(layout: KvLayout, format: KvFormat) -> KvPage {
        assert!(
            layout.page_tokens > 0 && layout.page_tokens.is_multiple_of(KEY_BLOCK),
            "pages of {}",
            layout.page_tokens
        );
        let tokens = layout.kv_heads * layout.page_tokens;
        let (k, v) = (tokens * layout.head_dim, tokens * layout.padded());
        let data = match format {
            KvFormat::F32 => Data::F32(vec![0.0; k], vec![0.0; v]),
            KvFormat::F16 => Data::F16(vec![f16::ZERO; k], vec![f16::ZERO; v]),
        };
        KvPage { layout, data }
    }

    /// Its shape.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Writes the key and value of the page's position `slot`, `[kv_heads * head_dim]` each.
    #[track_caller]
    pub fn write(&mut self, slot: usize, key: &[f32], value: &[f32]) {
        let l = self.layout;
        assert!(slot < l.page_tokens, "position {slot} of a page of {}", l.page_tokens);
        assert!(key.len() == l.kv_heads * l.head_dim && value.len() == key.len(), "heads of another shape");
        match &mut self.data {
            Data::F32(k, v) => put(l, k, v, slot, key, value, |x| x),
            Data::F16(k, v) => put(l, k, v, slot, key, value, f16::from_f32),
        }
    }

    /// Reads back the key and value of position `slot`, `[kv_heads * head_dim]` each.
    #[track_caller]
    pub fn read(&self, slot: usize, key: &mut [f32], value: &mut [f32]) {
        let l = self.layout;
        assert!(slot < l.page_tokens, "position {slot} of a page of {}", l.page_tokens);
        for h in 0..l.kv_heads {
            for d in 0..l.head_dim {
                let (k, v) = (key_at(l, h, slot, d), value_at(l, h, slot, d));
                (key[h * l.head_dim + d], value[h * l.head_dim + d]) = match &self.data {
                    Data::F32(ks, vs) => (ks[k], vs[v]),
                    Data::F16(ks, vs) => (ks[k].to_f32(), vs[v].to_f32()),
                };
            }
        }
    }
}

fn key_at(l: KvLayout, head: usize, slot: usize, d: usize) -> usize {
    head * l.page_tokens * l.head_dim + (slot / KEY_BLOCK * l.head_dim + d) * KEY_BLOCK + slot % KEY_BLOCK
}

fn value_at(l: KvLayout, head: usize, slot: usize, d: usize) -> usize {
    (head * l.page_tokens + slot) * l.padded() + d
}

fn put<T>(l: KvLayout, k: &mut [T], v: &mut [T], slot: usize, key: &[f32], value: &[f32], f: impl Fn(f32) -> T) {
    for h in 0..l.kv_heads {
        for d in 0..l.head_dim {
            k[key_at(l, h, slot, d)] = f(key[h * l.head_dim + d]);
            v[value_at(l, h, slot, d)] = f(value[h * l.head_dim + d]);
        }
    }
}

/// What attention reads of one sequence in one layer: its pages in order, all of one layout, and how many positions are written.
#[derive(Clone, Debug)]
pub struct KvView<'a> {
    /// Pages, the one of position 0 first.
    pub pages: Vec<&'a KvPage>,
    /// Positions written.
    pub tokens: usize,
}
