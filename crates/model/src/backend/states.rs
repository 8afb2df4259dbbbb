//! The states of recurrent mixers: slots of one size, a sequence's state or a snapshot in each.

use lacuna_spec::Mixer;

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
    slots: Vec<Option<Vec<T>>>,
}

impl<T: Copy + Default> SlotStates<T> {
    /// No slots yet, for a mixer of a network of `hidden` channels.
    pub(crate) fn new(mixer: &Mixer, hidden: usize) -> SlotStates<T> {
        SlotStates { values: mixer.state_values(hidden), slots: Vec::new() }
    }

    /// Takes the states of some slots out, each for a run of rows; where the run begins its sequence, all zeros. They
    /// come back with [`SlotStates::put`].
    #[track_caller]
    pub(crate) fn take(&mut self, slots: impl Iterator<Item = (u32, bool)>) -> Vec<Vec<T>> {
        let one = |(slot, fresh): (u32, bool)| {
            let mut state = self.slots[slot as usize].take().expect("a slot that was reserved, once a step");
            if fresh {
                state.fill(T::default());
            }
            state
        };
        slots.map(one).collect()
    }

    pub(crate) fn put(&mut self, slots: impl Iterator<Item = u32>, states: Vec<Vec<T>>) {
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
