//! Which key blocks a row reads: what attention leaves out.

use super::{SEGMENT, SUBS};
use crate::kv::KEY_BLOCK;

/// The key blocks that each of some rows reads in each key head, a bit a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Key heads.
    heads: usize,
    /// Where the bits of each row's heads begin in `words`, row after row.
    starts: Vec<usize>,
    words: Vec<u64>,
}

impl Chosen {
    /// For rows over `heads` key heads; none yet.
    pub fn new(heads: usize) -> Chosen {
        Chosen { heads, starts: Vec::new(), words: Vec::new() }
    }

    /// Adds the next head of a row, whose own key is at `slot`: it reads the key blocks of `read` that are not behind its
    /// own, and its own.
    pub fn push(&mut self, slot: usize, read: impl IntoIterator<Item = usize>) {
        let (at, own) = (self.words.len(), slot / KEY_BLOCK);
        self.starts.push(at);
        self.words.resize(at + own / 64 + 1, 0);
        for block in read.into_iter().filter(|b| *b < own).chain([own]) {
            self.words[at + block / 64] |= 1 << (block % 64);
        }
    }

    /// Rows times heads.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.starts.len() / self.heads.max(1), self.heads)
    }

    /// The bits of one head of a row.
    pub(super) fn of(&self, row: usize, head: usize) -> Bits<'_> {
        let i = row * self.heads + head;
        let end = self.starts.get(i + 1).copied().unwrap_or(self.words.len());
        Bits(Some(&self.words[self.starts[i]..end]))
    }
}

/// One query's key blocks; none where it reads all.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a>(pub(super) Option<&'a [u64]>);

impl Bits<'_> {
    /// Those of the tile at `start`, the first in the lowest of [`SUBS`] bits.
    #[inline(always)]
    pub(super) fn tile(self, start: usize) -> usize {
        let Some(words) = self.0 else { return (1 << SUBS) - 1 };
        let block = start / KEY_BLOCK;
        let word = words.get(block / 64).copied().unwrap_or(0);
        (word >> (block % 64)) as usize & ((1 << SUBS) - 1)
    }

    /// Whether any is in a segment.
    #[inline(always)]
    pub(super) fn any_in(self, segment: usize) -> bool {
        const BLOCKS: usize = SEGMENT / KEY_BLOCK;
        let Some(words) = self.0 else { return true };
        let block = segment * BLOCKS;
        words.get(block / 64).is_some_and(|w| (w >> (block % 64)) & ((1 << BLOCKS) - 1) != 0)
    }
}

/// The runs of bits that are set among the lowest [`SUBS`]: from and to, rising.
pub(super) fn runs(mut mask: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let skip = mask.trailing_zeros() as usize;
        let n = (mask >> skip).trailing_ones() as usize;
        let from = at + skip;
        at = from + n;
        mask >>= skip + n;
        Some((from, at))
    })
}

const _: () =
    assert!(64 % SUBS == 0 && 64 % (SEGMENT / KEY_BLOCK) == 0, "a tile's and a segment's bits are of one word");
