//! How probable texts are under an engine, its run plan included.

use std::sync::Arc;

use crate::request::{Event, Job, Request};
use crate::session::{DEFAULT_CHUNK, one_text};
use crate::{Engine, RunError, Scheduler};

/// The negative log likelihood of every token of each text but the first, nats, as the scheduler reads prompts: what
/// the engine's plan leaves out is left out. Texts have two tokens or more. `progress` is told texts done and their
/// number.
pub fn score(
    engine: impl Into<Arc<Engine>>,
    texts: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<f64>>, RunError> {
    let mut scheduler = Scheduler::without_text(engine, one_text(DEFAULT_CHUNK));
    scheduler.set_room(texts.iter().map(Vec::len).max().unwrap_or(0));
    let mut out = Vec::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        scheduler.submit(id as u64, Request::new(text.clone(), Job::Forced(Vec::new())).scored(0))?;
        let (mut losses, mut failed) = (Vec::with_capacity(text.len().saturating_sub(1)), None);
        while !scheduler.is_idle() && failed.is_none() {
            let step = scheduler.step(&mut |_, event| match event {
                Event::Read(tokens) => losses
                    .extend(tokens.iter().map(|t| t.probability.as_ref().map_or(f64::NAN, |p| -f64::from(p.logprob)))),
                Event::Failed(e) => failed = Some(e),
                _ => {}
            });
            if failed.is_none() && step.decode_rows + step.prefill_rows == 0 && !scheduler.is_idle() {
                let blocks = scheduler.gauges().blocks.total;
                failed = Some(RunError::Request(format!(
                    "a text of {} tokens finds no room in {blocks} blocks",
                    text.len()
                )));
            }
        }
        if let Some(e) = failed {
            return Err(e);
        }
        out.push(losses);
        progress(id + 1, texts.len());
    }
    Ok(out)
}
