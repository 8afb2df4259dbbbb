//! What a program may use: steps, and memory held at one time.

use std::cell::Cell;
use std::rc::Rc;

use super::{Fault, Outcome, Str};

/// Steps that a program may take: a hundred times what a long conversation needs, and about a second.
const FUEL: u64 = 10_000_000;

/// Bytes that a program's values and its output may hold at one time.
const MEMORY: usize = 64 << 20;

/// A step is paid for every so many bytes that are made or searched.
const BYTES_A_STEP: usize = 64;

/// What the making of anything costs beside its bytes, so that many small things cost, too.
const BYTES_A_PIECE: usize = 16;

/// The two budgets of one run.
pub(super) struct Meter {
    fuel: Cell<u64>,
    held: Cell<usize>,
    /// Bytes that no step was paid for yet.
    rest: Cell<usize>,
}

impl Meter {
    pub fn new() -> Rc<Meter> {
        Rc::new(Meter { fuel: Cell::new(FUEL), held: Cell::new(0), rest: Cell::new(0) })
    }

    /// Pays for `steps`.
    pub fn steps(&self, steps: usize) -> Outcome<()> {
        let left = self.fuel.get().checked_sub(steps as u64);
        self.fuel.set(left.ok_or_else(|| Fault::error(format!("it does not end within {FUEL} instructions")))?);
        Ok(())
    }

    /// Pays for looking at `bytes`, one step at least.
    pub fn look(&self, bytes: usize) -> Outcome<()> {
        self.steps(bytes / BYTES_A_STEP + 1)
    }

    /// Pays for going through a text letter by letter, which is slower than a search or a copy.
    pub fn walk(&self, bytes: usize) -> Outcome<()> {
        self.look(bytes.saturating_mul(4))
    }

    /// Pays for making a piece of `bytes`.
    fn make(&self, bytes: usize) -> Outcome<()> {
        let sum = self.rest.get().saturating_add(bytes).saturating_add(BYTES_A_PIECE);
        self.rest.set(sum % BYTES_A_STEP);
        self.steps(sum / BYTES_A_STEP)
    }

    /// Pays for `bytes` and holds them until the answer is dropped. Ask before allocating.
    pub fn hold(self: &Rc<Meter>, bytes: usize) -> Outcome<Held> {
        let mut held = Held { bytes: 0, meter: self.clone() };
        held.grow(bytes)?;
        Ok(held)
    }
}

/// Bytes held, given back on drop.
pub(super) struct Held {
    bytes: usize,
    meter: Rc<Meter>,
}

impl Held {
    pub fn grow(&mut self, bytes: usize) -> Outcome<()> {
        let sum = self.meter.held.get().checked_add(bytes).filter(|sum| *sum <= MEMORY);
        let sum = sum.ok_or_else(|| Fault::error(format!("it needs more than {MEMORY} bytes of memory")))?;
        self.meter.make(bytes)?;
        self.meter.held.set(sum);
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.meter.held.set(self.meter.held.get() - self.bytes);
    }
}

/// A text on its way, held as it grows.
pub(super) struct Builder {
    text: String,
    held: Held,
}

impl Builder {
    pub fn new(meter: &Rc<Meter>) -> Outcome<Builder> {
        Ok(Builder { text: String::new(), held: meter.hold(Str::OWN_BYTES)? })
    }

    pub fn push(&mut self, text: &str) -> Outcome<()> {
        self.held.grow(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    /// `text`, `times` times.
    pub fn repeat(&mut self, text: &str, times: usize) -> Outcome<()> {
        self.held.grow(text.len().saturating_mul(times))?;
        self.text.push_str(&text.repeat(times));
        Ok(())
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn into_string(self) -> String {
        self.text
    }

    pub fn finish(self) -> Str {
        Str::held(self.text, self.held)
    }
}
