//! Server-sent events: an answer as it comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::api::reply::Reply;
use crate::error::ApiError;
use crate::worker::Answers;

/// After so long without a word a comment is sent, so that nothing on the way takes the connection for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// The body of a streamed answer. Dropping it gives the answer up.
pub struct Events {
    reply: Reply,
    answers: Option<Answers>,
    ready: VecDeque<Bytes>,
    deadline: Pin<Box<Sleep>>,
    silence: Pin<Box<Sleep>>,
}

impl Events {
    /// A stream of `answers`, which must be over after `limit`.
    pub fn new(reply: Reply, answers: Answers, limit: Duration) -> Events {
        let now = Instant::now();
        let ready = reply.opening().iter().map(event).collect();
        Events {
            reply,
            answers: Some(answers),
            ready,
            deadline: Box::pin(sleep_until(now + limit)),
            silence: Box::pin(sleep_until(now + SILENCE)),
        }
    }

    fn fail(&mut self, e: &ApiError) {
        self.ready.push_back(event(&e.body()));
        self.answers = None;
    }
}

fn event(v: &Value) -> Bytes {
    Bytes::from(format!("data: {v}\n\n"))
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if let Some(first) = this.ready.pop_front() {
                this.silence.as_mut().reset(Instant::now() + SILENCE);
                if this.ready.is_empty() {
                    return Poll::Ready(Some(Ok(Frame::data(first))));
                }
                let mut all = first.to_vec();
                this.ready.drain(..).for_each(|more| all.extend_from_slice(&more));
                return Poll::Ready(Some(Ok(Frame::data(all.into()))));
            }
            let Some(answers) = &mut this.answers else { return Poll::Ready(None) };
            match answers.poll_next(cx) {
                Poll::Ready(Some((choice, told))) => match this.reply.take(choice, told) {
                    Ok(chunks) => this.ready.extend(chunks.iter().map(event)),
                    Err(e) => this.fail(&e),
                },
                Poll::Ready(None) => {
                    this.answers = None;
                    if this.reply.is_whole() {
                        this.ready.extend(this.reply.closing().as_ref().map(event));
                        this.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    } else {
                        this.fail(&ApiError::going_down());
                    }
                }
                Poll::Pending => {
                    if this.deadline.as_mut().poll(cx).is_ready() {
                        this.fail(&ApiError::new(504, "the answer took too long").code("timeout"));
                        continue;
                    }
                    if this.silence.as_mut().poll(cx).is_ready() {
                        this.ready.push_back(Bytes::from_static(b": still at work\n\n"));
                        continue;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}
