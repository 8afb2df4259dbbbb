//! An answer as it comes.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::api::dialect::Dialect;
use crate::api::reply::Reply;
use crate::error::ApiError;
use crate::worker::Answers;

/// After so long without a word a sign of life is sent, so that nothing on the way takes the connection for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// The body of a streamed answer. Dropping it gives the answer up.
pub struct Events {
    reply: Reply,
    dialect: Box<dyn Dialect>,
    answers: Option<Answers>,
    /// What is to be sent.
    ready: Vec<u8>,
    deadline: Pin<Box<Sleep>>,
    silence: Pin<Box<Sleep>>,
}

impl Events {
    /// A stream of `answers`, which must be over after `limit`.
    pub fn new(reply: Reply, mut dialect: Box<dyn Dialect>, answers: Answers, limit: Duration) -> Events {
        let now = Instant::now();
        let mut ready = dialect.begin(reply.prompt_tokens());
        reply.opening().iter().for_each(|chunk| ready += &dialect.chunk(chunk));
        Events {
            reply,
            dialect,
            answers: Some(answers),
            ready: ready.into_bytes(),
            deadline: Box::pin(sleep_until(now + limit)),
            silence: Box::pin(sleep_until(now + SILENCE)),
        }
    }

    fn fail(&mut self, e: &ApiError) {
        let told = self.dialect.error(e);
        self.ready.extend_from_slice(told.as_bytes());
        self.answers = None;
    }

    fn tell(&mut self, chunks: &[Value]) {
        for chunk in chunks {
            let told = self.dialect.chunk(chunk);
            self.ready.extend_from_slice(told.as_bytes());
        }
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                this.silence.as_mut().reset(Instant::now() + SILENCE);
                return Poll::Ready(Some(Ok(Frame::data(Bytes::from(std::mem::take(&mut this.ready))))));
            }
            let Some(answers) = &mut this.answers else { return Poll::Ready(None) };
            match answers.poll_next(cx) {
                Poll::Ready(Some((choice, told))) => match this.reply.take(choice, told) {
                    Ok(chunks) => this.tell(&chunks),
                    Err(e) => this.fail(&e),
                },
                Poll::Ready(None) => {
                    this.answers = None;
                    if this.reply.is_whole() {
                        this.tell(this.reply.closing().as_slice());
                        let end = this.dialect.end();
                        this.ready.extend_from_slice(end.as_bytes());
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
                        // One that is not sent leaves the clock to be set again.
                        this.silence.as_mut().reset(Instant::now() + SILENCE);
                        this.ready.extend_from_slice(this.dialect.alive().unwrap_or_default().as_bytes());
                        continue;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}
