//! Keys and values in blocks: a budget of them, shared between texts that begin alike.
//!
//! A block holds the keys and values of [`BLOCK_TOKENS`] positions in every layer. A text's full blocks are published
//! under their tokens and the block before them, so that a later text with the same beginning takes them over instead
//! of computing them. Here are tables and books alone: what lies in a block is in the backend's pages of each layer,
//! under the block's number. A published block never changes. One that nobody uses stays until its room is needed; the
//! least recently used goes first, a longer beginning before a shorter one.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use lacuna_kernels::{KEY_BLOCK, KvFormat, KvLayout};
use lacuna_model::{Backend, Batch, Cpu, KvStore, ModelError, Pages, Table};
use lacuna_spec::Spec;

/// Positions of a block.
pub const BLOCK_TOKENS: usize = KEY_BLOCK;

/// Below this, numbers of published blocks are beginnings: texts that must not share (LongRoPE turns long ones by other
/// factors).
const FIRST: u64 = 1 << 32;

/// What a published block is known by: the block before it, and its tokens.
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
    /// Where its chain of blocks begins.
    beginning: u64,
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
    /// Blocks that exist: those of the numbers below.
    made: usize,
    spare: Vec<u32>,
    texts: Vec<Option<Text>>,
    published: HashMap<u64, Published>,
    index: HashMap<Key, u64>,
    /// Published blocks without users: when last used, the deepest first.
    idle: BTreeSet<(u64, Reverse<usize>, u64)>,
    /// Published blocks with several users.
    shared: usize,
    clock: u64,
    next: u64,
    evicted: u64,
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
            places.push(layer.attn.as_ref().map(|_| pools.len()));
            pools.extend(layer.attn.as_ref().map(|a| {
                let layout = KvLayout { kv_heads: a.kv_heads, head_dim: a.head_dim, page_tokens: BLOCK_TOKENS };
                backend.pages(layout, format)
            }));
        }
        let block: usize = pools.iter().map(B::Pages::block_bytes).sum();
        // A model whose every attention was dropped keeps nothing; its blocks still count tokens.
        let total = bytes / block.max(1);
        BlockStore {
            pools,
            places,
            total: total.min(u32::MAX as usize),
            made: 0,
            spare: Vec::new(),
            texts: Vec::new(),
            published: HashMap::new(),
            index: HashMap::new(),
            idle: BTreeSet::new(),
            shared: 0,
            clock: 0,
            next: FIRST,
            evicted: 0,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.pools.iter().map(B::Pages::block_bytes).sum()
    }

    /// Blocks that the budget allows.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that could be had now, cached ones thrown away if need be.
    pub fn available(&self) -> usize {
        self.total - self.made + self.spare.len() + self.idle.len()
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> BlockCounts {
        let free = self.total - self.made + self.spare.len();
        let cached = self.idle.len();
        BlockCounts {
            total: self.total,
            free,
            used: self.total - free - cached,
            shared: self.shared,
            cached,
            evicted: self.evicted,
        }
    }

    /// Bytes of pages that exist.
    pub fn bytes(&self) -> usize {
        self.made * self.block_bytes()
    }

    /// Opens a text and returns its number. Texts of another `class` never share blocks with it.
    pub fn open(&mut self, class: u32) -> usize {
        let text = Text {
            blocks: Vec::new(),
            written: vec![0; self.pools.len()],
            tokens: 0,
            shared: Vec::new(),
            beginning: u64::from(class),
        };
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
        let at = t.shared.len() * BLOCK_TOKENS;
        let block = tokens.get(at..at + BLOCK_TOKENS)?;
        Some((t.shared.last().copied().unwrap_or(t.beginning), block.into()))
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
    /// its published blocks. Returns the positions it has then.
    #[track_caller]
    pub fn take_over(&mut self, slot: usize, tokens: &[u32]) -> usize {
        loop {
            let t = self.text(slot);
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

    /// Makes room for `tokens` positions; false, and nothing changed but that cached blocks may be gone, where there is
    /// none.
    #[track_caller]
    pub fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        let need = tokens.div_ceil(BLOCK_TOKENS).saturating_sub(self.text(slot).blocks.len());
        if need > self.available() {
            return false;
        }
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
                    self.published.insert(serial, Published { key, block, users: 1, used: clock, depth: i });
                    serial
                }
            };
            self.text_mut(slot).shared.push(serial);
        }
    }

    /// Forgets what was written behind the first `tokens` positions, which must not lie in a published block.
    #[track_caller]
    pub fn truncate(&mut self, slot: usize, tokens: usize) {
        let t = self.text_mut(slot);
        assert!(tokens >= t.shared.len() * BLOCK_TOKENS, "position {tokens} lies in a published block");
        t.tokens = t.tokens.min(tokens);
        t.written.iter_mut().for_each(|w| *w = (*w).min(tokens));
    }

    /// Closes a text: its published blocks stay for others, the rest is free.
    #[track_caller]
    pub fn close(&mut self, slot: usize) {
        let clock = self.tick();
        let t = self.texts[slot].take().expect("an open text");
        self.spare.extend(t.blocks[t.shared.len()..].iter().rev());
        for serial in t.shared {
            let p = self.published.get_mut(&serial).expect("a block in use is published");
            self.shared -= usize::from(p.users == 2);
            p.users -= 1;
            p.used = clock;
            if p.users == 0 {
                self.idle.insert((clock, Reverse(p.depth), serial));
            }
        }
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
        }
        p.users += 1;
        self.shared += usize::from(p.users == 2);
        p.used = clock;
        p.block
    }

    /// A block of one's own. The caller has seen that one is available.
    fn fresh(&mut self) -> u32 {
        if let Some(block) = self.spare.pop() {
            return block;
        }
        if self.made < self.total {
            let block = self.made as u32;
            self.made += 1;
            self.pools.iter_mut().for_each(|p| p.reserve(block));
            return block;
        }
        self.evict().expect("a block is available")
    }

    /// Throws away the published block that was not used for longest.
    fn evict(&mut self) -> Option<u32> {
        let (_, _, serial) = self.idle.pop_first()?;
        let p = self.published.remove(&serial)?;
        self.index.remove(&p.key);
        self.evicted += 1;
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

impl<B: Backend> KvStore<B> for BlockStore<B> {
    fn prepare(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        let store = |what: String| ModelError::Store { what };
        for (slot, rows) in batch.runs() {
            let (_, place) = self.place(layer, slot)?;
            let t = self.text_mut(slot);
            for &position in &batch.positions()[rows] {
                let have = t.written[place];
                if position > have {
                    return Err(store(format!(
                        "position {position} of text {slot} in block {layer} after only {have}"
                    )));
                }
                if position / BLOCK_TOKENS >= t.blocks.len() {
                    return Err(store(format!("no room was made for position {position} of text {slot}")));
                }
                if position / BLOCK_TOKENS < t.shared.len() {
                    return Err(store(format!("position {position} of text {slot} lies in a published block")));
                }
                t.written[place] = have.max(position + 1);
            }
        }
        Ok(())
    }

    fn table(&self, layer: usize, slot: usize) -> Result<Table<'_>, ModelError> {
        let (t, place) = self.place(layer, slot)?;
        Ok(Table { blocks: &t.blocks, tokens: t.written[place] })
    }

    fn pages(&mut self, layer: usize) -> Result<&mut B::Pages, ModelError> {
        let place = self.places.get(layer).copied().flatten();
        let place = place.ok_or_else(|| ModelError::Store { what: format!("block {layer} has no attention") })?;
        Ok(&mut self.pools[place])
    }
}
