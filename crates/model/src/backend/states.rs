//! The states of recurrent mixers: slots of one size, a sequence's state or a snapshot in each.

use std::ops::Range;

use lacuna_spec::Mixer;

use crate::Batch;

/// The states of one layer, known by slot numbers as pages are by block numbers.
pub trait States {
    /// Bytes of one.
    fn slot_bytes(&self) -> usize;

    /// Makes a slot, where it is not there yet; its content is unspecified. A sequence's first position begins it anew.
    fn reserve(&mut self, slot: u32);

    /// Gives a slot's memory back.
    fn release(&mut self, slot: u32);

    /// Copies all of slot `from` to slot `to`; both are there.
    fn copy(&mut self, from: u32, to: u32);
}

/// States in plain memory.
#[derive(Clone, Debug)]
pub struct SlotStates<T> {
    values: usize,
    /// Of these the first, which are the convolution's.
    before: usize,
    slots: Vec<Option<Vec<T>>>,
}

impl<T: Copy + Default> SlotStates<T> {
    /// No slots yet, for a mixer of a network of `hidden` channels.
    pub(crate) fn new(mixer: &Mixer, hidden: usize) -> SlotStates<T> {
        let before = (mixer.kernel() - 1) * mixer.channels(hidden);
        SlotStates { values: mixer.state_values(hidden), before, slots: Vec::new() }
    }

    /// Lends the states of a step's runs of rows to `f`, in the `slots` of its tables; then, where some go on apart,
    /// copies of what became of those for the rest of their rows. `begins`: by the convolution, which takes up a
    /// sequence anew where it begins; else by the heads, whose part of the state is another.
    pub(crate) fn lend(
        &mut self,
        slots: &[u32],
        batch: &Batch,
        begins: bool,
        mut f: impl FnMut(Vec<(Range<usize>, &mut [T])>),
    ) {
        let fresh = batch.own_runs().map(|(_, rows)| begins && batch.positions()[rows.start] == 0);
        let mut own = self.take(slots.iter().copied().zip(fresh));
        f(batch.own_runs().map(|(_, rows)| rows).zip(own.iter_mut().map(Vec::as_mut_slice)).collect());
        let behind = &slots[own.len()..];
        if !behind.is_empty() {
            let mut apart = self.take(behind.iter().map(|slot| (*slot, false)));
            let part = if begins { 0..self.before } else { self.before..self.values };
            for ((run, ..), apart) in batch.apart_runs().zip(&mut apart) {
                apart[part.clone()].copy_from_slice(&own[run][part.clone()]);
            }
            f(batch.apart_runs().map(|(.., rows)| rows).zip(apart.iter_mut().map(Vec::as_mut_slice)).collect());
            self.put(behind.iter().copied(), apart);
        }
        self.put(slots.iter().copied(), own);
    }

    /// Takes the states of some slots out, each for a run of rows; where the run begins its sequence, all zeros. They
    /// come back with [`SlotStates::put`].
    #[track_caller]
    fn take(&mut self, slots: impl Iterator<Item = (u32, bool)>) -> Vec<Vec<T>> {
        let one = |(slot, fresh): (u32, bool)| {
            let mut state = self.slots[slot as usize].take().expect("a slot that was reserved, once a step");
            if fresh {
                state.fill(T::default());
            }
            state
        };
        slots.map(one).collect()
    }

    fn put(&mut self, slots: impl Iterator<Item = u32>, states: Vec<Vec<T>>) {
        slots.zip(states).for_each(|(slot, state)| self.slots[slot as usize] = Some(state));
    }
}

impl<T: Copy + Default> States for SlotStates<T> {
    fn slot_bytes(&self) -> usize {
        self.values * size_of::<T>()
    }
    fn reserve(&mut self, slot: u32) {
        let slot = slot as usize;
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        let values = self.values;
        self.slots[slot].get_or_insert_with(|| vec![T::default(); values]);
    }
    fn release(&mut self, slot: u32) {
        if let Some(state) = self.slots.get_mut(slot as usize) {
            *state = None;
        }
    }
    fn copy(&mut self, from: u32, to: u32) {
        let state = self.slots.get(from as usize).and_then(Clone::clone);
        if let (Some(state), Some(to)) = (state, self.slots.get_mut(to as usize)) {
            *to = Some(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use lacuna_spec::ShortConv;

    use super::*;

    /// A state that counts rows: what goes on apart begins with what the rows before it left, and leaves that as it is.
    #[test]
    fn what_goes_on_apart_is_a_copy() {
        let mixer = Mixer::ShortConv(ShortConv { kernel: 3, bias: false });
        let mut states = SlotStates::<f32>::new(&mixer, 1);
        (0..4).for_each(|slot| states.reserve(slot));
        let mut batch = Batch::new();
        batch.push(0, 0..5);
        batch.push(1, 0..2);
        batch.part_state(3);
        let mut seen = Vec::new();
        let mut count = |runs: Vec<(Range<usize>, &mut [f32])>| {
            for (rows, state) in runs {
                state.iter_mut().for_each(|s| *s += rows.len() as f32);
                seen.push((rows, state[0]));
            }
        };
        states.lend(&[2, 0, 3], &batch, true, &mut count);
        states.lend(&[2, 0, 3], &batch, false, &mut count);
        // The heads have no part of this state: what goes on apart keeps its own.
        let want = [(0..3, 3.0), (5..7, 2.0), (3..5, 5.0), (0..3, 6.0), (5..7, 4.0), (3..5, 7.0)];
        assert_eq!(seen, want);
        let slots: Vec<_> = states.slots.iter().map(|s| s.clone().unwrap_or_default()).collect();
        assert_eq!(slots, [[4.0; 2], [0.0; 2], [6.0; 2], [7.0; 2]]);
    }
}
