//! The gate of the thread pool under a model checker: every order in which its steps can be seen (up to a bound of
//! preemptions), on the memory model of the language.

// What only the pool uses of it is dead here.
#[allow(dead_code)]
#[path = "../src/gate.rs"]
mod gate;

/// What the gate stands on, as the model checker has it.
mod sync {
    pub use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    pub struct Cell<T>(pub loom::cell::UnsafeCell<T>);

    impl<T: Copy> Cell<T> {
        pub unsafe fn get(&self) -> T {
            // SAFETY: held by the model checker, which fails where somebody writes.
            self.0.with(|p| unsafe { *p })
        }

        pub unsafe fn set(&self, value: T) {
            // SAFETY: as above.
            self.0.with_mut(|p| unsafe { *p = value })
        }
    }

    pub fn pause(_: u32) {
        loom::thread::yield_now();
    }
}

use gate::Gate;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use sync::{AtomicBool, AtomicUsize, Cell, Ordering};

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

fn gate() -> Arc<Gate<usize>> {
    Arc::new(Gate {
        busy: AtomicBool::new(false),
        epoch: AtomicUsize::new(0),
        state: AtomicUsize::new(0),
        job: Cell(UnsafeCell::new(None)),
    })
}

/// What lives on the caller's stack: read by those inside, written by the caller before it opens and after it shut.
struct Stack([UnsafeCell<u32>; 2]);
// SAFETY: the model checker finds every access that another thread's might meet.
unsafe impl Sync for Stack {}
// SAFETY: as above.
unsafe impl Send for Stack {}

#[test]
fn nobody_is_inside_once_the_caller_goes_on() {
    model(|| {
        let (gate, stack) = (gate(), Arc::new(Stack([UnsafeCell::new(0), UnsafeCell::new(0)])));
        let joined = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (gate, stack, joined) = (Arc::clone(&gate), Arc::clone(&stack), Arc::clone(&joined));
                thread::spawn(move || {
                    for _ in 0..2 {
                        if let Some(job) = gate.join() {
                            joined[job].fetch_add(1, Ordering::Relaxed);
                            // SAFETY: what is held here.
                            assert_eq!(stack.0[job].with(|p| unsafe { *p }), 1 + job as u32, "the call has ended");
                            gate.leave();
                        }
                    }
                })
            })
            .collect();
        for job in 0..2 {
            assert!(gate.take(), "nobody else calls");
            // SAFETY: nobody knows of it yet.
            stack.0[job].with_mut(|p| unsafe { *p = 1 + job as u32 });
            // SAFETY: taken; the stack lives on.
            unsafe { gate.open(job, 1) };
            gate.shut();
            // SAFETY: what is held here: nobody is inside.
            stack.0[job].with_mut(|p| unsafe { *p = 9 });
            assert!(joined[job].load(Ordering::Relaxed) <= 1, "one ticket, one worker");
        }
        workers.into_iter().for_each(|w| w.join().unwrap());
    });
}

#[test]
fn one_call_at_a_time() {
    model(|| {
        let (gate, stack) = (gate(), Arc::new(Stack([UnsafeCell::new(0), UnsafeCell::new(0)])));
        let call = |gate: &Gate<usize>, stack: &Stack| {
            if gate.take() {
                // SAFETY: taken; nothing is pointed to.
                unsafe { gate.open(0, 1) };
                // SAFETY: what is held here.
                stack.0[0].with_mut(|p| unsafe { *p += 1 });
                gate.shut();
            }
        };
        let other = {
            let (gate, stack) = (Arc::clone(&gate), Arc::clone(&stack));
            thread::spawn(move || call(&gate, &stack))
        };
        call(&gate, &stack);
        other.join().unwrap();
        assert!(gate.join().is_none(), "shut");
    });
}
