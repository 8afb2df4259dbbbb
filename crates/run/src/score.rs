//! What an engine, its run plan included, makes of texts: how probable it finds them, what their tokens become.

use std::sync::Arc;

use lacuna_base::MatRef;

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
    let mut out: Vec<Vec<f64>> = texts.iter().map(|t| Vec::with_capacity(t.len().saturating_sub(1))).collect();
    let ask = |text: &[u32]| Request::new(text.to_vec(), Job::Forced(Vec::new())).scored(0);
    let loss = |p: &crate::Picked| p.probability.as_ref().map_or(f64::NAN, |p| -f64::from(p.logprob));
    one_by_one(engine.into(), texts, ask, progress, &mut |text, event| {
        if let Event::Read(tokens) = event {
            out[text].extend(tokens.iter().map(loss));
        }
        Ok(())
    })?;
    Ok(out)
}

/// Reads texts in the same way, and hands `rows` what their tokens become: the text, the position of the first row, and
/// the residual stream behind the last block, `[tokens, hidden]`; all of a text in order, text after text. An error of
/// `rows` ends it.
pub fn read(
    engine: impl Into<Arc<Engine>>,
    texts: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
    rows: &mut dyn FnMut(usize, usize, MatRef<'_>) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let ask = |text: &[u32]| Request::new(text.to_vec(), Job::Read);
    one_by_one(engine.into(), texts, ask, progress, &mut |text, event| match event {
        Event::Rows { from, rows: of } => rows(text, from, of.view()),
        _ => Ok(()),
    })
}

/// Lets a scheduler work on one text after the other; what is told goes to `on` with the text's number.
fn one_by_one(
    engine: Arc<Engine>,
    texts: &[Vec<u32>],
    ask: impl Fn(&[u32]) -> Request,
    progress: &mut dyn FnMut(usize, usize),
    on: &mut dyn FnMut(usize, Event) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let mut scheduler = Scheduler::without_text(engine, one_text(DEFAULT_CHUNK));
    scheduler.set_room(texts.iter().map(Vec::len).max().unwrap_or(0));
    for (id, text) in texts.iter().enumerate() {
        scheduler.submit(id as u64, ask(text))?;
        let mut failed = None;
        while !scheduler.is_idle() && failed.is_none() {
            let step = scheduler.step(&mut |_, event| {
                let result = if let Event::Failed(e) = event { Err(e) } else { on(id, event) };
                failed = failed.take().or(result.err());
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
        progress(id + 1, texts.len());
    }
    Ok(())
}
