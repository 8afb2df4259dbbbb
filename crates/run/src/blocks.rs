//! Keys and values in blocks: a budget of them, shared between texts that begin alike.
//!
//! A block holds the keys and values of [`BLOCK_TOKENS`] positions in every layer. A text's full blocks are published
//! under their tokens and the block before them, so that a later text with the same beginning takes them over instead
//! of computing them. When a text is closed, its last block, which is not full, is published as a *tail*. A text that
//! agrees with a tail or with a block for some positions only copies those. Here are tables and books alone: what lies in
//! a block is in the backend's pages of each layer, under the block's number. What is published never changes. A block
//! that nobody uses stays until its room is needed; the least recently used goes first, a longer beginning before a
//! shorter one.

pub(crate) mod keep;
pub(crate) mod select;
mod states;
mod store;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use lacuna_kernels::{KEY_BLOCK, KvFormat, KvLayout};
use lacuna_model::{Backend, Cpu, ModelError, Pages};
use lacuna_spec::Spec;

use self::keep::{Keeping, Left};
use self::select::Selecting;
pub use self::states::SNAPSHOT_TOKENS;
use self::states::{Kept, Own};

/// Positions of a block.
pub const BLOCK_TOKENS: usize = KEY_BLOCK;

/// Bytes in which states count where there are no keys and values.
const STATE_PAGE: usize = 4096;

/// Below this, numbers of published blocks are beginnings: texts that must not share (LongRoPE turns long ones by other
/// factors).
const FIRST: u64 = 1 << 32;

/// What a published block is known by: the block before it, and its tokens (fewer than [`BLOCK_TOKENS`]: a tail).
type Key = (u64, Box<[u32]>);

/// A block that texts may share.
struct Published {
    key: Key,
    /// Its number.
    block: u32,
    /// Texts that use it.
    users: usize,
    /// When it was last taken or given back.
    used: u64,
    /// Blocks before it.
    depth: usize,
    /// Where the state behind its last token is kept.
    state: Option<u32>,
}

/// One text's keys and values.
struct Text {
    /// Its blocks, in order: the same in every layer with attention.
    blocks: Vec<u32>,
    /// Positions written, of each layer with attention.
    written: Vec<usize>,
    /// Positions written in every layer, as the owner told.
    tokens: usize,
    /// The published ones among them, from the first on.
    shared: Vec<u64>,
    /// The tokens of the positions behind those.
    tail: Vec<u32>,
    /// Where its chain of blocks begins.
    beginning: u64,
    /// Of a fork: how many of its blocks are those of the text that it was forked from.
    lent: usize,
    left: Left,
    own: Own,
}

impl Text {
    /// Which of the text's blocks a position to be written lies in; none where it comes before what is left.
    fn block_of(&self, position: usize) -> Option<usize> {
        position.checked_sub(self.left.shift).map(|slot| slot / BLOCK_TOKENS)
    }
}

/// How many blocks are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Blocks that the budget allows.
    pub total: usize,
    /// Blocks that hold nothing.
    pub free: usize,
    /// Blocks of texts at work.
    pub used: usize,
    /// Of these, blocks that several texts use.
    pub shared: usize,
    /// Blocks kept for texts to come; room for others when needed.
    pub cached: usize,
    /// Published blocks thrown away to make room, since the start.
    pub evicted: u64,
}

/// A store of keys and values for many texts, within a budget.
pub struct BlockStore<B: Backend = Cpu> {
    /// The pages of each layer that has attention, and the number of each layer among those.
    pools: Vec<B::Pages>,
    places: Vec<Option<usize>>,
    total: usize,
    /// Blocks that exist: of the numbers below this and `gone` together all but those in `gone`.
    made: usize,
    /// Numbers whose memory was given back.
    gone: Vec<u32>,
    spare: Vec<u32>,
    texts: Vec<Option<Text>>,
    published: HashMap<u64, Published>,
    /// Ordered, so that what has the most tokens in common with some lies beside them.
    index: BTreeMap<Key, u64>,
    /// Published blocks without users: when last used, the deepest first.
    idle: BTreeSet<(u64, Reverse<usize>, u64)>,
    /// Published blocks with several users.
    shared: usize,
    clock: u64,
    next: u64,
    evicted: u64,
    /// Whose texts keep some entries only.
    keeping: Option<Keeping>,
    /// Whose rows read some blocks only.
    selecting: Option<Selecting>,
    /// The texts of the batch that was prepared last.
    prepared: Vec<usize>,
    states: Kept<B>,
    /// Bytes that a block counts.
    unit: usize,
}

impl BlockStore {
    /// An empty store for a model, of as many blocks as `bytes` hold.
    pub fn new(spec: &Spec, format: KvFormat, bytes: usize) -> BlockStore {
        BlockStore::on(&Cpu, spec, format, bytes)
    }
}

impl<B: Backend> BlockStore<B> {
    /// The same in pages of a backend.
    pub fn on(backend: &B, spec: &Spec, format: KvFormat, bytes: usize) -> BlockStore<B> {
        let (mut pools, mut places) = (Vec::new(), Vec::with_capacity(spec.layers.len()));
        for layer in &spec.layers {
            // Layers that read another one's keys and values have no pool.
            let own = layer.attn.as_ref().filter(|a| a.kv_from.is_none());
            places.push(own.map(|_| pools.len()));
            pools.extend(own.map(|a| {
                let layout = KvLayout { kv_heads: a.kv_heads, head_dim: a.head_dim, page_tokens: BLOCK_TOKENS };
                backend.pages(layout, format)
            }));
        }
        let block: usize = pools.iter().map(B::Pages::block_bytes).sum();
        // A model without attention keeps no keys; its blocks still count tokens, and a state counts pages of memory.
        let mixes = spec.first_mixer().is_some();
        let unit = if block == 0 && mixes { STATE_PAGE } else { block.max(1) };
        let total = bytes / unit;
        BlockStore {
            pools,
            places,
            total: total.min(u32::MAX as usize),
            made: 0,
            gone: Vec::new(),
            spare: Vec::new(),
            texts: Vec::new(),
            published: HashMap::new(),
            index: BTreeMap::new(),
            idle: BTreeSet::new(),
            shared: 0,
            clock: 0,
            next: FIRST,
            evicted: 0,
            keeping: None,
            selecting: None,
            prepared: Vec::new(),
            states: Kept::new(backend, spec, unit),
            unit,
        }
    }

    /// Bytes that a block counts against the budget: its own, or a page of a state where it has none.
    pub fn unit_bytes(&self) -> usize {
        self.unit
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.pools.iter().map(B::Pages::block_bytes).sum::<usize>() + self.decision_bytes()
    }

    /// Blocks that the budget allows.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Allows `blocks` from now on, or as many as texts at work hold, if those are more. Room beyond that is given back
    /// to the system, cached blocks thrown away if need be.
    pub fn set_total(&mut self, blocks: usize) {
        while self.made + self.states.taken() > blocks {
            if self.states.shrink() {
                continue;
            }
            let Some(block) = self.spare.pop().or_else(|| self.evict()) else { break };
            self.give_back(block);
        }
        self.total = blocks.max(self.made + self.states.taken()).min(u32::MAX as usize);
    }

    /// Gives a block's memory back to the system.
    fn give_back(&mut self, block: u32) {
        self.made -= 1;
        self.gone.push(block);
        self.forget_decisions(block);
        self.pools.iter_mut().for_each(|p| p.release(block));
    }

    /// Blocks that could be had now, cached ones thrown away if need be.
    pub fn available(&self) -> usize {
        let [spare, idle] = self.states.free();
        self.total - self.made - self.states.taken() + self.spare.len() + self.idle.len() + spare + idle
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> BlockCounts {
        let [spare, idle] = self.states.free();
        let free = self.total - self.made - self.states.taken() + self.spare.len() + spare;
        let cached = self.idle.len() + idle;
        BlockCounts {
            total: self.total,
            free,
            used: self.total - free - cached,
            shared: self.shared,
            cached,
            evicted: self.evicted,
        }
    }

    /// Bytes of pages and states that exist.
    pub fn bytes(&self) -> usize {
        self.made * self.block_bytes() + self.states.held_bytes()
    }

    /// Opens a text and returns its number. Texts of another `class` never share blocks with it.
    pub fn open(&mut self, class: u32) -> usize {
        let text = Text {
            blocks: Vec::new(),
            written: vec![0; self.pools.len()],
            tokens: 0,
            shared: Vec::new(),
            tail: Vec::with_capacity(BLOCK_TOKENS),
            beginning: u64::from(class),
            lent: 0,
            left: self.nothing_left(),
            own: self.own_state(),
        };
        self.place_for(text)
    }

    fn place_for(&mut self, text: Text) -> usize {
        match self.texts.iter().position(Option::is_none) {
            Some(slot) => {
                self.texts[slot] = Some(text);
                slot
            }
            None => {
                self.texts.push(Some(text));
                self.texts.len() - 1
            }
        }
    }

    /// Forks a text: another one that has the same positions written and room for `tokens`, for a branch of a draft. It
    /// shares whole blocks with the text, which must outlive it, and is never published; it ends with
    /// [`BlockStore::join`] or [`BlockStore::close_fork`]. None where there is no room.
    #[track_caller]
    pub fn fork(&mut self, slot: usize, tokens: usize) -> Option<usize> {
        let t = self.text(slot);
        let (shift, slots) = (t.left.shift, t.tokens - t.left.shift);
        let lent = slots / BLOCK_TOKENS;
        let own = (tokens - shift).div_ceil(BLOCK_TOKENS).saturating_sub(lent).max(1);
        if own > self.available() {
            return None;
        }
        let mut blocks = t.blocks[..lent].to_vec();
        let (written, begun) = (t.tokens, t.blocks.get(lent).copied().filter(|_| slots % BLOCK_TOKENS > 0));
        blocks.extend((0..own).map(|_| self.fresh()));
        if let Some(theirs) = begun {
            self.copy_block(theirs, blocks[lent]);
        }
        Some(self.place_for(Text {
            blocks,
            written: vec![written; self.pools.len()],
            tokens: written,
            shared: Vec::new(),
            tail: Vec::new(),
            beginning: 0,
            lent,
            left: self.nothing_left().after(shift),
            own: Own::NONE,
        }))
    }

    /// Ends a fork, whose positions the text takes over in the place of its own, as far as they are not published.
    #[track_caller]
    pub fn join(&mut self, slot: usize, fork: usize) {
        let mut f = self.texts[fork].take().expect("an open fork");
        let keep = f.lent.max(self.text(slot).shared.len()).min(f.blocks.len());
        self.spare.extend(f.blocks.drain(f.lent..keep));
        let theirs = f.blocks.split_off(f.lent);
        let t = self.text_mut(slot);
        let mine = t.blocks.split_off(keep);
        t.blocks.extend(theirs);
        t.written = f.written;
        self.spare.extend(mine);
    }

    /// Ends a fork of which nothing is taken over.
    #[track_caller]
    pub fn close_fork(&mut self, fork: usize) {
        let f = self.texts[fork].take().expect("an open fork");
        self.spare.extend(&f.blocks[f.lent..]);
    }

    /// Positions of a text that are written.
    #[track_caller]
    pub fn tokens(&self, slot: usize) -> usize {
        self.text(slot).tokens
    }

    /// What the text's current block will be published under, if `tokens` fill it: two texts with the same answer
    /// compute the same block.
    #[track_caller]
    pub fn next_key(&self, slot: usize, tokens: &[u32]) -> Option<(u64, Box<[u32]>)> {
        let t = self.text(slot);
        if !self.shares(slot) {
            return None;
        }
        let at = t.shared.len() * BLOCK_TOKENS;
        let block = tokens.get(at..at + BLOCK_TOKENS)?;
        Some((t.last(), block.into()))
    }

    /// How many of the first `tokens` are published, in whole blocks.
    pub fn known(&self, class: u32, tokens: &[u32]) -> usize {
        let mut parent = u64::from(class);
        let mut blocks = 0;
        for block in tokens.chunks_exact(BLOCK_TOKENS) {
            let Some(&serial) = self.index.get(&(parent, Box::from(block))) else { break };
            (parent, blocks) = (serial, blocks + 1);
        }
        blocks * BLOCK_TOKENS
    }

    /// Takes over published blocks that go on with `tokens`, the text's own tokens, where the text stands at the end of
    /// its published blocks. Returns the positions it has then. A text with a state takes over what lies before the last
    /// snapshot of it.
    #[track_caller]
    pub fn take_over(&mut self, slot: usize, tokens: &[u32]) -> usize {
        let t = self.text(slot);
        if !self.keeps_states() {
            return self.take_blocks(slot, tokens, usize::MAX);
        }
        let aligned = t.tokens == t.shared.len() * BLOCK_TOKENS;
        let Some(blocks) = self.reach(slot, tokens).filter(|_| aligned) else { return t.tokens };
        let read = self.take_blocks(slot, tokens, blocks);
        if let Some(&serial) = self.text(slot).shared.last() {
            self.go_on(slot, serial);
        }
        read
    }

    /// The same up to so many blocks of the text.
    fn take_blocks(&mut self, slot: usize, tokens: &[u32], most: usize) -> usize {
        loop {
            let t = self.text(slot);
            if t.shared.len() == most {
                return t.tokens;
            }
            let aligned = t.tokens == t.shared.len() * BLOCK_TOKENS;
            let serial = self.next_key(slot, tokens).filter(|_| aligned).and_then(|key| self.index.get(&key).copied());
            let Some(serial) = serial else { return self.text(slot).tokens };
            let block = self.use_published(serial);
            let t = self.text_mut(slot);
            // Room that was made for this block already is not needed.
            let surplus = match t.blocks.get_mut(t.shared.len()) {
                Some(mine) => Some(std::mem::replace(mine, block)),
                None => {
                    t.blocks.push(block);
                    None
                }
            };
            t.shared.push(serial);
            t.tokens += BLOCK_TOKENS;
            t.written.fill(t.tokens);
            self.spare.extend(surplus);
        }
    }

    /// As [`BlockStore::take_over`], for positions short of a whole block, for which there must be room already: copies
    /// those that a published block or tail has in common with `tokens`; with a state, those of a tail that has nothing
    /// else.
    #[track_caller]
    pub fn take_part(&mut self, slot: usize, tokens: &[u32]) -> usize {
        let t = self.text(slot);
        let at = t.shared.len();
        let rest = tokens.get(at * BLOCK_TOKENS..).unwrap_or_default();
        let rest = &rest[..rest.len().min(BLOCK_TOKENS)];
        let ready = t.tokens == at * BLOCK_TOKENS && t.blocks.len() > at;
        let found = match self.keeps_states() {
            true => self.whole_tail(t.last(), rest).filter(|_| t.own.slot.is_some()),
            false => self.nearest(t.last(), rest),
        };
        let Some((n, serial)) = found.filter(|_| ready) else { return self.text(slot).tokens };
        let clock = self.tick();
        self.touch(serial, clock);
        let (mine, theirs) = (self.text(slot).blocks[at], self.published.get(&serial).map(|p| p.block));
        theirs.iter().for_each(|&theirs| self.copy_block(theirs, mine));
        let t = self.text_mut(slot);
        t.tail.extend_from_slice(&rest[..n]);
        t.tokens += n;
        t.written.fill(t.tokens);
        self.go_on(slot, serial);
        self.text(slot).tokens
    }

    /// The published block or tail behind block `parent` that begins with the most of `tokens`, and how many those are.
    fn nearest(&self, parent: u64, tokens: &[u32]) -> Option<(usize, u64)> {
        let key: Key = (parent, tokens.into());
        let before = self.index.range((Bound::Unbounded, Bound::Included(&key))).next_back();
        let after = self.index.range((Bound::Excluded(&key), Bound::Unbounded)).next();
        let both = before.into_iter().chain(after).filter(|(k, _)| k.0 == parent);
        let common = |theirs: &[u32]| theirs.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        both.map(|(k, &serial)| (common(&k.1), serial)).max().filter(|(n, _)| *n > 0)
    }

    /// Makes room for `tokens` positions, or as many of their slots as a text ever holds; false, and nothing changed but
    /// that cached blocks may be gone, where there is none.
    #[track_caller]
    pub fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        let t = self.text(slot);
        let slots = self.slots(usize::MAX).min(tokens.saturating_sub(t.left.shift));
        let need = slots.div_ceil(BLOCK_TOKENS).saturating_sub(t.blocks.len());
        let lacks = self.lacks_state(t);
        if need.saturating_add(lacks) > self.available() {
            return false;
        }
        self.give_state(slot);
        for _ in 0..need {
            let block = self.fresh();
            self.text_mut(slot).blocks.push(block);
        }
        true
    }

    /// Tells that the text has `tokens`, all of them written, and publishes its full blocks.
    #[track_caller]
    pub fn publish(&mut self, slot: usize, tokens: &[u32]) {
        self.text_mut(slot).tokens = tokens.len();
        while let Some(key) = self.next_key(slot, tokens) {
            let (i, clock) = (self.text(slot).shared.len(), self.tick());
            let serial = match self.index.get(&key) {
                // Somebody computed the same block meanwhile: bit for bit the same, by the law of rows. One of them is
                // enough.
                Some(&serial) => {
                    let theirs = self.use_published(serial);
                    let mine = std::mem::replace(&mut self.text_mut(slot).blocks[i], theirs);
                    self.spare.push(mine);
                    serial
                }
                None => {
                    let serial = self.next;
                    self.next += 1;
                    let block = self.text(slot).blocks[i];
                    self.index.insert(key.clone(), serial);
                    self.published.insert(serial, Published::new(key, block, 1, clock, i, None));
                    serial
                }
            };
            self.text_mut(slot).shared.push(serial);
        }
        if self.shares(slot) {
            let t = self.text_mut(slot);
            t.tail.clear();
            t.tail.extend_from_slice(&tokens[t.shared.len() * BLOCK_TOKENS..]);
        }
    }

    /// Forgets what was written behind the first `tokens` positions, which must not lie in a published block.
    #[track_caller]
    pub fn truncate(&mut self, slot: usize, tokens: usize) {
        let t = self.text_mut(slot);
        assert!(tokens >= t.shared.len() * BLOCK_TOKENS, "position {tokens} lies in a published block");
        t.tokens = t.tokens.min(tokens);
        t.tail.truncate(t.tokens - t.shared.len() * BLOCK_TOKENS);
        t.written.iter_mut().for_each(|w| *w = (*w).min(tokens));
        t.own.forget(tokens);
    }

    /// Closes a text: its published blocks stay for others, and so does its tail; the rest is free.
    #[track_caller]
    pub fn close(&mut self, slot: usize) {
        let clock = self.tick();
        let mut t = self.texts[slot].take().expect("an open text");
        let whole = t.shared.len();
        let state = self.last_state(&t);
        // Without its state a tail is of no use to a model that has one.
        let tail = !t.tail.is_empty() && (state.is_some() || !self.keeps_states());
        let kept = (whole + usize::from(tail)).min(t.blocks.len());
        self.spare.extend(t.blocks.drain(kept..).rev());
        match t.blocks.get(whole) {
            Some(&block) => self.keep_tail((t.last(), t.tail.as_slice().into()), block, clock, whole, state),
            None => {
                let here = t.shared.last().copied().filter(|_| t.tokens == whole * BLOCK_TOKENS);
                self.leave_state(here, state);
            }
        }
        t.shared.into_iter().for_each(|serial| self.leave(serial, clock));
    }

    /// One text less uses a published block.
    fn leave(&mut self, serial: u64, clock: u64) {
        let p = self.published.get_mut(&serial).expect("a block in use is published");
        self.shared -= usize::from(p.users == 2);
        p.users -= 1;
        p.used = clock;
        if p.users == 0 {
            self.idle.insert((clock, Reverse(p.depth), serial));
            self.states.count_idle(p.state, true);
        }
    }

    /// Publishes a block that is not full, unless another one holds what it holds; one that holds less makes way. Of
    /// tails with a state each is of use to those that go on from it alone.
    fn keep_tail(&mut self, key: Key, block: u32, clock: u64, depth: usize, state: Option<u32>) {
        let near = match self.keeps_states() {
            true => self.index.get(&key).map(|&serial| (key.1.len(), serial)),
            false => self.nearest(key.0, &key.1),
        };
        if let Some((_, serial)) = near.filter(|(n, _)| *n == key.1.len()) {
            self.touch(serial, clock);
            self.spare.push(block);
            self.states.give_up(state);
            return;
        }
        if let Some((_, serial)) = near.filter(|(n, serial)| self.published[serial].key.1.len() == *n) {
            let less = self.remove(serial);
            self.spare.extend(less);
        }
        let serial = self.next;
        self.next += 1;
        self.index.insert(key.clone(), serial);
        self.published.insert(serial, Published::new(key, block, 0, clock, depth, state));
        self.idle.insert((clock, Reverse(depth), serial));
        self.states.count_idle(state, true);
    }

    /// Throws away every cached block that nobody uses.
    pub fn forget(&mut self) {
        while let Some(block) = self.evict() {
            self.spare.push(block);
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The number of a published block, with one user more.
    fn use_published(&mut self, serial: u64) -> u32 {
        let clock = self.tick();
        let p = self.published.get_mut(&serial).expect("an indexed block is published");
        if p.users == 0 {
            self.idle.remove(&(p.used, Reverse(p.depth), serial));
            self.states.count_idle(p.state, false);
        }
        p.users += 1;
        self.shared += usize::from(p.users == 2);
        p.used = clock;
        p.block
    }

    /// Marks a published block as used at `clock`, if nobody uses it now.
    fn touch(&mut self, serial: u64, clock: u64) {
        let Some(p) = self.published.get_mut(&serial).filter(|p| p.users == 0) else { return };
        self.idle.remove(&(p.used, Reverse(p.depth), serial));
        p.used = clock;
        self.idle.insert((clock, Reverse(p.depth), serial));
    }

    /// A block that nobody uses. The caller has seen that one is available.
    fn any_block(&mut self) -> u32 {
        if let Some(block) = self.spare.pop() {
            return block;
        }
        while self.made + self.states.taken() >= self.total {
            if !self.states.shrink() {
                return self.evict().expect("a block is available");
            }
        }
        let block = self.gone.pop().unwrap_or(self.made as u32);
        self.made += 1;
        self.pools.iter_mut().for_each(|p| p.reserve(block));
        block
    }

    /// Throws away the published block that was not used for longest.
    fn evict(&mut self) -> Option<u32> {
        let &(_, _, serial) = self.idle.first()?;
        self.evicted += 1;
        self.remove(serial)
    }

    /// Takes out a published block that nobody uses.
    fn remove(&mut self, serial: u64) -> Option<u32> {
        let p = self.published.remove(&serial)?;
        self.idle.remove(&(p.used, Reverse(p.depth), serial));
        self.index.remove(&p.key);
        self.states.count_idle(p.state, false);
        self.states.give_up(p.state);
        Some(p.block)
    }

    #[track_caller]
    fn text(&self, slot: usize) -> &Text {
        self.texts[slot].as_ref().expect("an open text")
    }

    #[track_caller]
    fn text_mut(&mut self, slot: usize) -> &mut Text {
        self.texts[slot].as_mut().expect("an open text")
    }

    /// An open text, and the number of `layer` among those with attention.
    fn place(&self, layer: usize, slot: usize) -> Result<(&Text, usize), ModelError> {
        let store = |what: String| ModelError::Store { what };
        let place = self.places.get(layer).copied().flatten();
        let place = place.ok_or_else(|| store(format!("block {layer} has no attention")))?;
        let text = self.texts.get(slot).and_then(Option::as_ref);
        Ok((text.ok_or_else(|| store(format!("text {slot} is not open")))?, place))
    }
}

impl Text {
    /// The last published block, or where the chain of blocks begins.
    fn last(&self) -> u64 {
        self.shared.last().copied().unwrap_or(self.beginning)
    }
}
