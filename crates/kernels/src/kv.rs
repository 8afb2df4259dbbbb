//! Pages of keys and values, in the layout that attention reads.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::memory::Memory;

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
        let values = self.head_dim + self.padded();
        self.kv_heads * self.page_tokens * (values * format.value_bytes() + format.scale_bytes())
    }

    /// Bytes that reading one position at `format` touches.
    pub fn token_bytes(&self, format: KvFormat) -> usize {
        self.kv_heads * (2 * self.head_dim * format.value_bytes() + format.scale_bytes())
    }
}

/// How cached values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32 bits: exactly what was computed.
    F32,
    /// IEEE half.
    F16,
    /// Signed bytes under one f32 factor for each position's key, and one for its value, in each head: `max |x| / 127`.
    Q8,
}

impl KvFormat {
    /// Bytes of one value.
    fn value_bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::F16 => 2,
            KvFormat::Q8 => 1,
        }
    }

    /// Bytes of a position's factors in one head.
    fn scale_bytes(self) -> usize {
        if self == KvFormat::Q8 { 8 } else { 0 }
    }
}

/// What is kept of the keys of a whole key block, beside them, in f32 and of the keys as attention reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyPool {
    /// The mean of each component.
    Mean,
    /// The least of each component, then the greatest.
    Bounds,
}

impl KeyPool {
    /// Rows of `head_dim` values that a key block has.
    fn rows(self) -> usize {
        match self {
            KeyPool::Mean => 1,
            KeyPool::Bounds => 2,
        }
    }
}

/// A page of keys and values of one layer.
///
/// Keys lie `[kv_heads][page_tokens / 32][head_dim][32]`, so that lanes run along keys; values
/// `[kv_heads][page_tokens][head_dim padded]`.
#[derive(Clone, Debug)]
pub struct KvPage {
    layout: KvLayout,
    pub(crate) data: Data,
    /// Pooled keys, `[kv_heads][page_tokens / 32][rows][head_dim]`: those of a key block once its last position is
    /// written.
    pooled: Option<(KeyPool, Vec<f32>)>,
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    F32(Values<f32>, Values<f32>),
    F16(Values<f16>, Values<f16>),
    /// Factors lie `[kv_heads][page_tokens]`.
    Q8 {
        k: Values<i8>,
        v: Values<i8>,
        k_scales: Values<f32>,
        v_scales: Values<f32>,
    },
}

/// Values in memory of large pages, all of whose bits mean something, zero at first.
pub(crate) struct Values<T>(Memory, PhantomData<T>);

impl<T: bytemuck::Pod> Values<T> {
    fn zeroed(n: usize) -> Values<T> {
        Values(Memory::zeroed(n * size_of::<T>()), PhantomData)
    }
}

impl<T: bytemuck::Pod> Deref for Values<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(self.0.bytes())
    }
}

impl<T: bytemuck::Pod> DerefMut for Values<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.0.bytes_mut())
    }
}

impl<T: bytemuck::Pod> Clone for Values<T> {
    fn clone(&self) -> Values<T> {
        let mut new = Values::zeroed(self.len());
        new.copy_from_slice(self);
        new
    }
}

impl<T: bytemuck::Pod> fmt::Debug for Values<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} values", self.len())
    }
}

/// Values of a head that are converted together.
const PIECE: usize = 128;

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
            KvFormat::F32 => Data::F32(Values::zeroed(k), Values::zeroed(v)),
            KvFormat::F16 => Data::F16(Values::zeroed(k), Values::zeroed(v)),
            KvFormat::Q8 => Data::Q8 {
                k: Values::zeroed(k),
                v: Values::zeroed(v),
                k_scales: Values::zeroed(tokens),
                v_scales: Values::zeroed(tokens),
            },
        };
        KvPage { layout, data, pooled: None }
    }

    /// Keeps pooled keys from here on.
    fn pooling(mut self, pool: KeyPool) -> KvPage {
        let blocks = self.layout.kv_heads * self.layout.page_tokens / KEY_BLOCK;
        self.pooled = Some((pool, vec![0.0; blocks * pool.rows() * self.layout.head_dim]));
        self
    }

    /// The pooled keys of a whole key block of one head, `[rows][head_dim]`; none where they are not kept.
    fn pooled(&self, head: usize, block: usize) -> Option<&[f32]> {
        let (pool, all) = self.pooled.as_ref()?;
        let n = pool.rows() * self.layout.head_dim;
        all.get((head * (self.layout.page_tokens / KEY_BLOCK) + block) * n..)?.get(..n)
    }

    /// Pools the keys of key block `block`, all of which are written.
    fn pool(&mut self, block: usize) {
        let Some((pool, mut all)) = self.pooled.take() else { return };
        let l = self.layout;
        let n = pool.rows() * l.head_dim;
        let mut keys = vec![0.0; l.head_dim * KEY_BLOCK];
        for head in 0..l.kv_heads {
            self.keys_into(head, block, &mut keys);
            let out = &mut all[(head * (l.page_tokens / KEY_BLOCK) + block) * n..][..n];
            for (d, keys) in keys.chunks_exact(KEY_BLOCK).enumerate() {
                match pool {
                    KeyPool::Mean => out[d] = keys.iter().sum::<f32>() / KEY_BLOCK as f32,
                    KeyPool::Bounds => {
                        // A NaN among them must not get lost: whoever reads the bounds goes by it.
                        let most = |a: f32, b: &f32| {
                            if a.is_nan() {
                                a
                            } else if b.is_nan() {
                                *b
                            } else {
                                a.max(*b)
                            }
                        };
                        out[d] = -keys.iter().map(|k| -k).fold(f32::NEG_INFINITY, |a, b| most(a, &b));
                        out[l.head_dim + d] = keys.iter().fold(f32::NEG_INFINITY, most);
                    }
                }
            }
        }
        self.pooled = Some((pool, all));
    }

    /// Its shape.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Takes over all of a page of the same shape and format, bit for bit. Panics where they differ.
    #[track_caller]
    pub fn copy_from(&mut self, other: &KvPage) {
        match (&mut self.data, &other.data) {
            (Data::F32(k, v), Data::F32(k2, v2)) => {
                k.copy_from_slice(k2);
                v.copy_from_slice(v2);
            }
            (Data::F16(k, v), Data::F16(k2, v2)) => {
                k.copy_from_slice(k2);
                v.copy_from_slice(v2);
            }
            (
                Data::Q8 { k, v, k_scales, v_scales },
                Data::Q8 { k: k2, v: v2, k_scales: k_scales2, v_scales: v_scales2 },
            ) => {
                k.copy_from_slice(k2);
                v.copy_from_slice(v2);
                k_scales.copy_from_slice(k_scales2);
                v_scales.copy_from_slice(v_scales2);
            }
            _ => panic!("pages of two formats"),
        }
        self.pooled.clone_from(&other.pooled);
    }

    /// Writes the key and value of the page's position `slot`, `[kv_heads * head_dim]` each.
    #[track_caller]
    pub fn write(&mut self, slot: usize, key: &[f32], value: &[f32]) {
        let l = self.layout;
        assert!(slot < l.page_tokens, "position {slot} of a page of {}", l.page_tokens);
        assert!(key.len() == l.kv_heads * l.head_dim && value.len() == key.len(), "heads of another shape");
        for (h, (key, value)) in key.chunks_exact(l.head_dim).zip(value.chunks_exact(l.head_dim)).enumerate() {
            let (k_at, v_at) = (key_at(l, h, slot, 0), value_at(l, h, slot, 0));
            match &mut self.data {
                Data::F32(k, v) => {
                    scatter(&mut k[k_at..], key);
                    v[v_at..v_at + l.head_dim].copy_from_slice(value);
                }
                Data::F16(k, v) => {
                    let mut halves = [f16::ZERO; PIECE];
                    for (i, piece) in key.chunks(PIECE).enumerate() {
                        let halves = &mut halves[..piece.len()];
                        halves.convert_from_f32_slice(piece);
                        scatter(&mut k[k_at + i * PIECE * KEY_BLOCK..], halves);
                    }
                    v[v_at..v_at + l.head_dim].convert_from_f32_slice(value);
                }
                Data::Q8 { k, v, k_scales, v_scales } => {
                    let (mut bytes, row) = ([0i8; PIECE], h * l.page_tokens + slot);
                    let inverse = scale(key, &mut k_scales[row]);
                    for (i, piece) in key.chunks(PIECE).enumerate() {
                        let bytes = &mut bytes[..piece.len()];
                        bytes.iter_mut().zip(piece).for_each(|(b, x)| *b = byte(x * inverse));
                        scatter(&mut k[k_at + i * PIECE * KEY_BLOCK..], bytes);
                    }
                    let inverse = scale(value, &mut v_scales[row]);
                    v[v_at..].iter_mut().zip(value).for_each(|(b, x)| *b = byte(x * inverse));
                }
            }
        }
        // Positions are written in order, those of a draft that was taken back again.
        if self.pooled.is_some() && slot % KEY_BLOCK == KEY_BLOCK - 1 {
            self.pool(slot / KEY_BLOCK);
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
                    Data::Q8 { k: ks, v: vs, k_scales, v_scales } => {
                        let row = h * l.page_tokens + slot;
                        (f32::from(ks[k]) * k_scales[row], f32::from(vs[v]) * v_scales[row])
                    }
                };
            }
        }
    }
}

impl KvPage {
    /// Key block `block` of a head in f32, `[head_dim][32]`.
    pub(crate) fn keys_into(&self, head: usize, block: usize, out: &mut [f32]) {
        let l = self.layout;
        let at = key_at(l, head, block * KEY_BLOCK, 0);
        let lies = at..at + l.head_dim * KEY_BLOCK;
        match &self.data {
            Data::F32(k, _) => out.copy_from_slice(&k[lies]),
            Data::F16(k, _) => k[lies].convert_to_f32_slice(out),
            Data::Q8 { k, k_scales, .. } => {
                let scales = &k_scales[head * l.page_tokens + block * KEY_BLOCK..][..KEY_BLOCK];
                for (out, k) in out.chunks_exact_mut(KEY_BLOCK).zip(k[lies].chunks_exact(KEY_BLOCK)) {
                    out.iter_mut().zip(k).zip(scales).for_each(|((o, k), s)| *o = f32::from(*k) * s);
                }
            }
        }
    }

    /// Takes over one slot of one head, from another page of the same form or this one, bit for bit.
    fn take_slot(&mut self, head: usize, to: usize, from: (Option<&KvPage>, usize)) {
        let l = self.layout;
        let key = |slot: usize| key_at(l, head, slot, 0);
        let value = |slot: usize| value_at(l, head, slot, 0);
        let row = |slot: usize| head * l.page_tokens + slot;
        let (page, slot) = from;
        // A pool's pages are of one format.
        match (&mut self.data, page.map(|p| &p.data)) {
            (Data::F32(k, v), None) => {
                take(k, None, (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, None, (value(to), value(slot)), 1, l.head_dim);
            }
            (Data::F32(k, v), Some(Data::F32(k2, v2))) => {
                take(k, Some(k2), (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, Some(v2), (value(to), value(slot)), 1, l.head_dim);
            }
            (Data::F16(k, v), None) => {
                take(k, None, (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, None, (value(to), value(slot)), 1, l.head_dim);
            }
            (Data::F16(k, v), Some(Data::F16(k2, v2))) => {
                take(k, Some(k2), (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, Some(v2), (value(to), value(slot)), 1, l.head_dim);
            }
            (Data::Q8 { k, v, k_scales, v_scales }, None) => {
                take(k, None, (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, None, (value(to), value(slot)), 1, l.head_dim);
                take(k_scales, None, (row(to), row(slot)), 1, 1);
                take(v_scales, None, (row(to), row(slot)), 1, 1);
            }
            (
                Data::Q8 { k, v, k_scales, v_scales },
                Some(Data::Q8 { k: k2, v: v2, k_scales: k_scales2, v_scales: v_scales2 }),
            ) => {
                take(k, Some(k2), (key(to), key(slot)), KEY_BLOCK, l.head_dim);
                take(v, Some(v2), (value(to), value(slot)), 1, l.head_dim);
                take(k_scales, Some(k_scales2), (row(to), row(slot)), 1, 1);
                take(v_scales, Some(v_scales2), (row(to), row(slot)), 1, 1);
            }
            _ => panic!("pages of two formats"),
        }
    }
}

/// `n` values, `step` apart, from one place to another, of other memory or the same.
fn take<T: Copy>(to: &mut [T], from: Option<&[T]>, (at, old): (usize, usize), step: usize, n: usize) {
    for i in 0..n {
        to[at + i * step] = from.map_or(to[old + i * step], |from| from[old + i * step]);
    }
}

fn key_at(l: KvLayout, head: usize, slot: usize, d: usize) -> usize {
    head * l.page_tokens * l.head_dim + (slot / KEY_BLOCK * l.head_dim + d) * KEY_BLOCK + slot % KEY_BLOCK
}

fn value_at(l: KvLayout, head: usize, slot: usize, d: usize) -> usize {
    (head * l.page_tokens + slot) * l.padded() + d
}

/// One value to each key block's row.
fn scatter<T: Copy>(to: &mut [T], from: &[T]) {
    to.iter_mut().step_by(KEY_BLOCK).zip(from).for_each(|(to, from)| *to = *from);
}

/// Sets the factor of a head's values and gives its inverse; NaN and infinity make it NaN, and every value with it.
fn scale(values: &[f32], factor: &mut f32) -> f32 {
    let finite = values.iter().all(|x| x.is_finite());
    let top = if finite { values.iter().fold(0.0f32, |top, x| top.max(x.abs())) } else { f32::NAN };
    *factor = top / 127.0;
    if top < 1e-30 { 0.0 } else { 127.0 / top }
}

/// To the nearest whole number, ties to even.
fn byte(x: f32) -> i8 {
    x.round_ties_even() as i8
}

/// The pages of one layer, known by their block numbers.
#[derive(Clone, Debug)]
pub struct KvPool {
    layout: KvLayout,
    format: KvFormat,
    pooling: Option<KeyPool>,
    pages: Vec<Option<KvPage>>,
}

impl KvPool {
    /// No pages yet.
    pub fn new(layout: KvLayout, format: KvFormat) -> KvPool {
        KvPool { layout, format, pooling: None, pages: Vec::new() }
    }

    /// Keeps pooled keys in every page that is made from here on.
    pub fn pool_keys(&mut self, pool: KeyPool) {
        self.pooling = Some(pool);
    }

    /// What pooled keys its pages have.
    pub fn pooling(&self) -> Option<KeyPool> {
        self.pooling
    }

    /// Bytes of one page, pooled keys included.
    pub fn page_bytes(&self) -> usize {
        let l = self.layout;
        let pooled = self.pooling.map_or(0, |p| 4 * p.rows() * l.head_dim * l.kv_heads * l.page_tokens / KEY_BLOCK);
        l.page_bytes(self.format) + pooled
    }

    /// The shape of its pages.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// How they are written.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Makes page `block`, where it is not there yet.
    pub fn reserve(&mut self, block: u32) {
        let at = block as usize;
        if self.pages.len() <= at {
            self.pages.resize_with(at + 1, || None);
        }
        let page = || KvPage::new(self.layout, self.format);
        self.pages[at].get_or_insert_with(|| self.pooling.map_or_else(page, |pool| page().pooling(pool)));
    }

    /// Gives the memory of page `block` back.
    pub fn release(&mut self, block: u32) {
        if let Some(page) = self.pages.get_mut(block as usize) {
            *page = None;
        }
    }

    /// Copies all of page `from` to page `to`; both must be there.
    #[track_caller]
    pub fn copy(&mut self, from: u32, to: u32) {
        if from != to {
            let both = self.pages.get_disjoint_mut([from as usize, to as usize]);
            let Ok([Some(from), Some(to)]) = both else { panic!("blocks {from} and {to} were reserved") };
            to.copy_from(from);
        }
    }

    /// Fills page `to` from the pages of a table: slot `i` of each key head becomes what slot `kept[head][i]` of the
    /// table is, one after the other; key blocks that are whole behind it are pooled anew. Where `to` is a page of the
    /// table itself, no slot may move to a later one.
    /// Panics where a page is not there or a head is missing.
    #[track_caller]
    pub fn gather(&mut self, table: &[u32], to: u32, kept: &[&[usize]]) {
        assert_eq!(kept.len(), self.layout.kv_heads, "slots of every head");
        let n = self.layout.page_tokens;
        let mut page = self.pages.get_mut(to as usize).and_then(Option::take).expect("a block that was reserved");
        for (head, kept) in kept.iter().enumerate() {
            for (i, slot) in kept.iter().enumerate() {
                let block = table[slot / n];
                let from = (block != to).then(|| self.page(block));
                page.take_slot(head, i, (from, slot % n));
            }
        }
        let whole = kept.iter().map(|kept| kept.len() / KEY_BLOCK).min().unwrap_or(0);
        (0..whole).for_each(|block| page.pool(block));
        self.pages[to as usize] = Some(page);
    }

    /// Page `block`. Panics where it is not there.
    #[track_caller]
    pub fn page(&self, block: u32) -> &KvPage {
        self.pages.get(block as usize).and_then(Option::as_ref).expect("a block that was reserved")
    }

    /// The same, to write to.
    #[track_caller]
    pub fn page_mut(&mut self, block: u32) -> &mut KvPage {
        self.pages.get_mut(block as usize).and_then(Option::as_mut).expect("a block that was reserved")
    }
}

/// What attention reads of one sequence in one layer: its block table, and how many slots are written. Where every
/// entry is kept, slots are positions.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    /// The layer's pages.
    pub pool: &'a KvPool,
    /// Which of them are the sequence's, the one of slot 0 first.
    pub blocks: &'a [u32],
    /// Slots written.
    pub tokens: usize,
}

impl<'a> KvView<'a> {
    /// The pooled keys of the `nth` key block of one head, all of whose positions are written: `[head_dim]` means, or
    /// the least of each component and then the greatest. None where the pages keep none.
    #[track_caller]
    pub fn pooled(&self, head: usize, nth: usize) -> Option<&'a [f32]> {
        let within = nth % (self.pool.layout.page_tokens / KEY_BLOCK);
        self.page_of(nth * KEY_BLOCK).pooled(head, within)
    }

    /// The page of `position`.
    #[track_caller]
    pub(crate) fn page_of(&self, position: usize) -> &'a KvPage {
        self.pool.page(self.blocks[position / self.pool.layout.page_tokens])
    }
}
