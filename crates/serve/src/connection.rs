//! Connections: who may hold one, for how long, and how they end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::app::App;
use crate::error::ApiError;

/// Limits on connections.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Connections at once.
    pub connections: usize,
    /// Time for the head of a request to come; so long an idle connection lives, too.
    pub head: Duration,
    /// Time in which a client must take something of what is sent to it.
    pub write: Duration,
    /// Time for what is at work to end once the server is told to stop.
    pub drain: Duration,
}

/// Takes connections until told to stop, then waits for what is at work. Returns how many connections had to be cut.
pub async fn accept(
    listener: TcpListener,
    router: Router,
    app: Arc<App>,
    patience: Patience,
    mut stop: watch::Receiver<bool>,
) -> usize {
    let (drain, drained) = watch::channel(false);
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            Some(_) = open.join_next(), if !open.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of file descriptors, most likely: others must close first.
                tracing::warn!(error = %e, "no connection could be taken");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        if open.len() >= patience.connections {
            open.spawn(turn_away(stream));
            continue;
        }
        let (router, app, drained) = (router.clone(), Arc::clone(&app), drained.clone());
        open.spawn(async move {
            app.metrics.connections.fetch_add(1, Ordering::Relaxed);
            hold(stream, router, patience, drained).await;
            app.metrics.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
    drop(listener);
    app.draining.store(true, Ordering::Release);
    let _ = drain.send(true);
    let all = async { while open.join_next().await.is_some() {} };
    if timeout(patience.drain, all).await.is_ok() {
        return 0;
    }
    let cut = open.len();
    open.shutdown().await;
    cut
}

async fn hold(stream: TcpStream, router: Router, patience: Patience, mut drained: watch::Receiver<bool>) {
    let io = TokioIo::new(Timed { stream, limit: patience.write, waiting: None });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let told = async move {
        let _ = drained.wait_for(|d| *d).await;
    };
    let early = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = told => None,
    };
    let result = match early {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = result {
        tracing::debug!(error = %e, "a connection ended");
    }
}

/// Says why there is no room, and closes.
async fn turn_away(mut stream: TcpStream) {
    let body = ApiError::new(503, "too many connections are open").code("too_many_connections").body().to_string();
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let _ = timeout(Duration::from_secs(1), async {
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
}

/// A connection whose client must take what is sent, however slowly: one that takes nothing for a while is gone.
struct Timed {
    stream: TcpStream,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    fn within<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = None;
            return polled;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + limit)));
        match waiting.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.within(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.within(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
