//! What a step computes: which texts are at work, and which of their rows come next.

use std::collections::HashSet;

use lacuna_contract::Company;

use super::text::{Active, Work};
use super::{Part, Scheduler, Step};
use crate::request::Event;
use crate::{BlockStore, Stop};

impl Scheduler {
    /// Texts that have become too long for the class of their keys are to be read again.
    pub(super) fn outgrown(&mut self) {
        for index in (0..self.running.len()).rev() {
            let class = self.engine.class(self.running[index].tokens.len());
            if class != self.running[index].class {
                let a = self.running.remove(index);
                self.wait(Active { class, ..a });
            }
        }
    }

    /// Brings waiting texts to work while there is room.
    pub(super) fn admit(&mut self, on: &mut dyn FnMut(u64, Event)) {
        while self.running.len() < self.limits.batch {
            let Some(mut a) = self.waiting.pop_front() else { return };
            if a.is_answered() && a.score.is_none() {
                on(a.id, Event::Finished(a.finished(Stop::MaxTokens)));
                continue;
            }
            let slot = self.store.open(a.class);
            a.slot = Some(slot);
            a.read = take_over(&mut self.store, &a, self.limits.reuse);
            // Room for what it is and its next token; and one block left for each text at work, or the next steps would
            // drive it out again.
            let spare = self.running.len();
            let fits = self.store.reserve(slot, (a.tokens.len() + 1).min(a.extent));
            if !fits || (spare > 0 && self.store.available() < spare) {
                self.store.close(slot);
                (a.slot, a.read) = (None, 0);
                self.waiting.push_front(a);
                return;
            }
            if self.limits.reuse && !a.needs_all_rows() {
                a.read = self.store.take_part(slot, a.known());
            }
            a.reused.get_or_insert(a.read);
            self.running.push(a);
        }
    }

    /// Which rows come next, in `parts`.
    pub(super) fn plan(&mut self, parts: &mut Vec<Part>) -> Step {
        parts.clear();
        let mut step = Step::default();
        // Whom a text drafts beside: the rows of all others.
        let (mut rows, mut others) = (0, 0);
        for a in &self.running {
            rows += a.unread();
            others += usize::from(a.goes_on());
        }
        let most = self.limits.prefill_rows + others;
        let mut company = Company { rows: rows.min(most), tokens: others as f64 };
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].goes_on() && self.make_room(index) {
                let (from, to) = (self.running[index].read, self.running[index].tokens.len());
                let mut beside = Company { rows: company.rows.saturating_sub(1), tokens: company.tokens - 1.0 };
                let drafted = self.draft(index, &mut beside);
                company = Company { rows: beside.rows + 1, tokens: beside.tokens + 1.0 };
                let part = self.part(index, from, to);
                parts.push(Part { drafted, wants: part.wants + drafted, ..part });
                step.decode_rows += to - from;
                step.drafted_rows += drafted;
            }
            index += 1;
        }
        self.plan_prompts(parts, &mut step);
        step.logits_rows = parts.iter().map(|p| p.wants).sum();
        step
    }

    /// Makes room for all of a text; the last one admitted gives way, if need be this one: then false.
    fn make_room(&mut self, index: usize) -> bool {
        let (slot, tokens) = (self.running[index].slot(), self.running[index].tokens.len());
        while !self.store.reserve(slot, tokens) {
            self.preempt();
            if index == self.running.len() {
                return false;
            }
        }
        true
    }

    /// Rows `from..to` of a text, and the logits that are wanted of them.
    pub(super) fn part(&self, index: usize, from: usize, to: usize) -> Part {
        let a = &self.running[index];
        let answers = !matches!(a.work, Work::Embed { .. } | Work::Read { .. }) && !a.is_answered();
        let wants = usize::from(to == a.tokens.len() && answers);
        Part { index, from, to, drafted: 0, wants }
    }

    /// Adds rows of prompts, each in its turn.
    fn plan_prompts(&mut self, parts: &mut Vec<Part>, step: &mut Step) {
        let rows = self.limits.prefill_rows;
        let reading = |i: &usize| !self.running[*i].goes_on() && !self.is_read_whole(*i);
        let reading: Vec<usize> = (0..self.running.len()).filter(reading).collect();
        if reading.is_empty() {
            return;
        }
        // A share for each, so that one long prompt leaves room for the others; what is left over goes to the first in
        // turn.
        let share = (rows / reading.len()).max(rows / 4).max(1);
        let first = self.turn % reading.len();
        self.turn += 1;
        let mut claimed = HashSet::new();
        let mut left = rows;
        let mut asked: Vec<(usize, usize, usize)> = Vec::new();
        for k in 0..reading.len() {
            let index = reading[(first + k) % reading.len()];
            if left == 0 {
                break;
            }
            // Others may have published the next blocks since the last step.
            let read = take_over(&mut self.store, &self.running[index], self.limits.reuse);
            self.running[index].read = read;
            let a = &self.running[index];
            if self.limits.reuse && !a.needs_all_rows() {
                // Two texts that begin alike: one computes the block, the other takes it over in the next step.
                let key = self.store.next_key(a.slot(), a.known());
                if key.is_some_and(|key| !claimed.insert(key)) {
                    continue;
                }
            }
            let to = (a.read + share.min(left)).min(a.tokens.len()).min(self.until_cut(a.read, a.tokens.len()));
            left -= to - a.read;
            asked.push((index, a.read, to));
        }
        for (index, from, mut to) in asked {
            let tokens = self.running[index].tokens.len();
            let end = tokens.min(self.until_cut(from, tokens));
            let more = left.min(end - to);
            (to, left) = (to + more, left - more);
            // Room for whole prompts was made when they were admitted.
            step.prefill_rows += to - from;
            parts.push(self.part(index, from, to));
        }
    }

    /// The text that was admitted last gives way.
    pub(super) fn preempt(&mut self) {
        let Some(a) = self.running.pop() else { return };
        self.preempted += 1;
        self.wait(a);
    }

    /// Puts a text that was at work at the head of the queue; it gives its blocks up.
    fn wait(&mut self, mut a: Active) {
        self.close(&a);
        (a.slot, a.read, a.again, a.pass) = (None, 0, 0, None);
        if let Work::Embed { sum, .. } = &mut a.work {
            sum.clear();
        }
        self.waiting.push_front(a);
    }
}

/// Takes over what others have published of a text, in whole blocks. Returns the tokens read.
pub(super) fn take_over(store: &mut BlockStore, a: &Active, reuse: bool) -> usize {
    if a.needs_all_rows() || !reuse {
        return store.tokens(a.slot());
    }
    store.take_over(a.slot(), a.known())
}
