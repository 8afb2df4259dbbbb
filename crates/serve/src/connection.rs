//! Connections: who may hold one, for how long, and how they end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::{Request, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::app::App;
use crate::error::ApiError;

/// Connections that are told at the same time why there is no room for them; more are closed without a word.
const TOLD: usize = 64;

/// Bytes that a connection without room may send and be heard out.
const HEARD: usize = 64 << 10;

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
    let (mut open, mut outside) = (JoinSet::new(), Outside::new(Duration::from_secs(1)));
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
            app.metrics.turned_away.fetch_add(1, Ordering::Relaxed);
            outside.turn_away(stream);
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

/// An address without the slashes that its path ends with, where it has some.
fn bare(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let short = path.trim_end_matches('/');
    if short.len() == path.len() || short.is_empty() {
        return None;
    }
    let query = uri.query().map_or_else(String::new, |q| format!("?{q}"));
    format!("{short}{query}").parse().ok()
}

async fn hold(stream: TcpStream, router: Router, patience: Patience, mut drained: watch::Receiver<bool>) {
    let router = TowerToHyperService::new(router);
    let pages = service_fn(move |mut request: Request<Incoming>| {
        if let Some(bare) = bare(request.uri()) {
            *request.uri_mut() = bare;
        }
        router.call(request)
    });
    let io = TokioIo::new(Timed { stream, limit: patience.write, waiting: None });
    let connection =
        http1::Builder::new().timer(TokioTimer::new()).header_read_timeout(patience.head).serve_connection(io, pages);
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

/// Those for whom there is no room.
struct Outside {
    told: JoinSet<()>,
    /// For so long one is told.
    moment: Duration,
}

impl Outside {
    fn new(moment: Duration) -> Outside {
        Outside { told: JoinSet::new(), moment }
    }

    /// Says why there is no room, and closes; closes at once where many are being told already. Whether it is told.
    fn turn_away(&mut self, stream: TcpStream) -> bool {
        while self.told.try_join_next().is_some() {}
        let room = self.told.len() < TOLD;
        if room {
            let moment = self.moment;
            self.told.spawn(async move { drop(timeout(moment, tell(stream)).await) });
        }
        room
    }
}

/// Says why there is no room, and waits until the other side has closed: whoever closes on words unheard takes back
/// what it said.
async fn tell(mut stream: TcpStream) -> io::Result<()> {
    let body = ApiError::new(503, "too many connections are open").code("too_many_connections").body().to_string();
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    let (mut rest, mut heard) = ([0; 1024], 0);
    while heard < HEARD {
        match stream.read(&mut rest).await? {
            0 => break,
            n => heard += n,
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_so_many_are_told_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let mut outside = Outside::new(Duration::from_secs(600));
        let mut clients = Vec::new();
        for i in 0..TOLD + 8 {
            let mut client = TcpStream::connect(at).await.unwrap();
            // A whole request is on its way already.
            client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            clients.push((i, client, outside.turn_away(stream)));
            assert_eq!(outside.told.len(), TOLD.min(i + 1));
        }
        for (i, client, told) in &mut clients {
            assert_eq!(*told, *i < TOLD);
            let mut text = String::new();
            // Closed at once, with what it had sent unread: an end or a reset.
            let heard = client.read_to_string(&mut text).await.is_ok() && text.contains("too_many_connections");
            assert_eq!(heard, *told, "{i}: {text}");
        }
        drop(clients);
        while outside.told.join_next().await.is_some() {}
        let client = TcpStream::connect(at).await.unwrap();
        assert!(outside.turn_away(listener.accept().await.unwrap().0), "there is room again");
        drop(client);
    }
}
