//! The engine's own thread: requests in through a channel, events out through one for each request.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use lacuna_run::{Event, Request, Scheduler};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::metrics::Metrics;

/// What happens to one of the answers of a request.
pub type Told = (usize, Event);

enum Command {
    Submit { id: u64, request: Box<Request>, choice: usize, events: UnboundedSender<Told>, accepted: Instant },
    Cancel(u64),
    Stop,
}

/// The handle of the engine's thread.
pub struct Worker {
    commands: Sender<Command>,
    next: AtomicU64,
    /// Answers accepted and not over.
    pending: Arc<AtomicUsize>,
    most: usize,
    alive: Arc<AtomicBool>,
}

/// Room for some answers; it is given back when this is dropped.
pub struct Ticket {
    pending: Arc<AtomicUsize>,
    most: usize,
    n: usize,
}

impl Ticket {
    /// Makes this room for `n` answers. Where too many wait it stays as it is, and false is returned.
    pub fn widen(&mut self, n: usize) -> bool {
        let more = n.saturating_sub(self.n);
        let fits = |have: usize| have.checked_add(more).filter(|&all| all <= self.most);
        let done = self.pending.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok();
        self.n += if done { more } else { 0 };
        done
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.pending.fetch_sub(self.n, Ordering::AcqRel);
    }
}

/// The answers of one request on their way. Dropping it gives them up: their room is free at the engine's next step.
pub struct Answers {
    events: UnboundedReceiver<Told>,
    ids: Vec<u64>,
    open: usize,
    commands: Sender<Command>,
    _ticket: Ticket,
}

impl Answers {
    /// The next event; none after the last answer's end.
    pub async fn next(&mut self) -> Option<Told> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Answers::next`], to be polled.
    pub fn poll_next(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Told>> {
        if self.open == 0 {
            return std::task::Poll::Ready(None);
        }
        let told = self.events.poll_recv(cx);
        if let std::task::Poll::Ready(told) = &told {
            match told {
                Some((_, event)) if !event.is_last() => {}
                Some(_) => self.open -= 1,
                None => self.open = 0,
            }
        }
        told
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if self.open > 0 {
            // An engine that is gone has nothing to give up.
            self.ids.iter().for_each(|&id| drop(self.commands.send(Command::Cancel(id))));
        }
    }
}

impl Worker {
    /// Starts the thread. `queue`: answers that may wait beyond those at work.
    pub fn start(
        scheduler: Scheduler,
        batch: usize,
        queue: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Worker, JoinHandle<()>)> {
        let (commands, inbox) = channel();
        let alive = Arc::new(AtomicBool::new(true));
        let worker = Worker {
            commands,
            next: AtomicU64::new(1),
            pending: Arc::default(),
            most: batch.saturating_add(queue),
            alive: Arc::clone(&alive),
        };
        metrics.step(lacuna_run::Step::default(), scheduler.gauges());
        let mut thread = Engine { scheduler, inbox, metrics, talks: HashMap::new() };
        let handle = std::thread::Builder::new().name("engine".into()).spawn(move || {
            thread.run();
            alive.store(false, Ordering::Release);
        })?;
        Ok((worker, handle))
    }

    /// Whether the thread runs.
    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Room for one answer, unless too many wait.
    pub fn ticket(&self) -> Option<Ticket> {
        let mut ticket = Ticket { pending: Arc::clone(&self.pending), most: self.most, n: 0 };
        ticket.widen(1).then_some(ticket)
    }

    /// Whether there is room for nobody.
    pub fn is_full(&self) -> bool {
        self.pending() >= self.most
    }

    /// Answers accepted and not over.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    /// Hands requests over, each an answer of its own.
    pub fn submit(&self, requests: Vec<Request>, ticket: Ticket) -> Answers {
        let (events, receiver) = unbounded_channel();
        let accepted = Instant::now();
        let mut answers = Answers {
            events: receiver,
            ids: Vec::with_capacity(requests.len()),
            open: requests.len(),
            commands: self.commands.clone(),
            _ticket: ticket,
        };
        for (choice, request) in requests.into_iter().enumerate() {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            answers.ids.push(id);
            // Where the engine is gone, the channel of events closes and the answer ends.
            let _ = self.commands.send(Command::Submit {
                id,
                request: Box::new(request),
                choice,
                events: events.clone(),
                accepted,
            });
        }
        answers
    }

    /// Ends the thread after its current step. What is at work is given up.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// One answer's way back, and when what happened.
struct Talk {
    choice: usize,
    events: UnboundedSender<Told>,
    accepted: Instant,
    last: Option<Instant>,
}

struct Engine {
    scheduler: Scheduler,
    inbox: Receiver<Command>,
    metrics: Arc<Metrics>,
    talks: HashMap<u64, Talk>,
}

impl Engine {
    fn run(&mut self) {
        loop {
            // Nothing to do: wait for a command. Otherwise take those that are there.
            if self.scheduler.is_idle() {
                let Ok(command) = self.inbox.recv() else { return };
                if !self.obey(command) {
                    return;
                }
            }
            loop {
                match self.inbox.try_recv() {
                    Ok(command) => {
                        if !self.obey(command) {
                            return;
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            self.step();
        }
    }

    /// False: stop.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Stop => return false,
            Command::Cancel(id) => {
                self.talks.remove(&id);
                if self.scheduler.cancel(id).is_some() {
                    self.metrics.cancelled.fetch_add(1, Ordering::Relaxed);
                    self.metrics.step(lacuna_run::Step::default(), self.scheduler.gauges());
                }
            }
            Command::Submit { id, request, choice, events, accepted } => match self.scheduler.submit(id, *request) {
                Ok(()) => {
                    self.talks.insert(id, Talk { choice, events, accepted, last: None });
                }
                Err(e) => drop(events.send((choice, Event::Failed(e)))),
            },
        }
        true
    }

    fn step(&mut self) {
        let Engine { scheduler, metrics, talks, .. } = self;
        let mut gone = Vec::new();
        let mut tell = |id: u64, event: Event| {
            let Some(talk) = talks.get_mut(&id) else { return };
            talk.count(&event, metrics);
            let over = event.is_last();
            if talk.events.send((talk.choice, event)).is_err() && !over {
                gone.push(id);
            }
            if over {
                talks.remove(&id);
            }
        };
        // A panic here would be a mistake of ours; it must not take the server down, nor leave anybody waiting.
        let step = catch_unwind(AssertUnwindSafe(|| scheduler.step(&mut tell)));
        let step = match step {
            Ok(step) => step,
            Err(_) => {
                metrics.panics.fetch_add(1, Ordering::Relaxed);
                tracing::error!("the engine panicked and begins anew");
                scheduler.fail_all("the engine failed; the request may be sent again", &mut tell);
                lacuna_run::Step::default()
            }
        };
        for id in gone {
            talks.remove(&id);
            if scheduler.cancel(id).is_some() {
                metrics.cancelled.fetch_add(1, Ordering::Relaxed);
            }
        }
        metrics.step(step, scheduler.gauges());
    }
}

impl Talk {
    fn count(&mut self, event: &Event, metrics: &Metrics) {
        let now = Instant::now();
        match event {
            Event::Text { tokens, .. } => {
                match self.last {
                    None => metrics.first_token(now - self.accepted),
                    Some(last) => metrics.next_token((now - last) / tokens.len().max(1) as u32),
                }
                self.last = Some(now);
            }
            Event::Finished(f) => {
                if self.last.is_none() {
                    metrics.first_token(now - self.accepted);
                }
                metrics.prompt_tokens.fetch_add(f.prompt_tokens as u64, Ordering::Relaxed);
                metrics.cached_tokens.fetch_add(f.reused_tokens as u64, Ordering::Relaxed);
                metrics.generated_tokens.fetch_add(f.tokens as u64, Ordering::Relaxed);
                metrics.whole(now - self.accepted);
            }
            Event::Embedding { tokens, .. } => {
                metrics.prompt_tokens.fetch_add(*tokens as u64, Ordering::Relaxed);
                metrics.whole(now - self.accepted);
            }
            Event::Read(_) | Event::Rows { .. } | Event::Failed(_) => {}
        }
    }
}
