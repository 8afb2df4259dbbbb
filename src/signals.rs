//! Signals that end the program: what is not whole is taken away, and a line says what happened.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether somebody else has taken over.
static HANDED_OVER: AtomicBool = AtomicBool::new(false);

/// Leaves the signals to somebody else: a server answers what it has begun before it ends.
pub fn hand_over() {
    HANDED_OVER.store(true, Ordering::SeqCst);
}

/// Ends the program when it is told to: the status of a shell, 128 and the signal's number.
fn stop(name: &str, status: i32) {
    if HANDED_OVER.load(Ordering::SeqCst) {
        return;
    }
    lacuna_base::unfinished::end(|said| {
        // Below a bar that may be there.
        let begin = if io::IsTerminal::is_terminal(&io::stderr()) { "\n" } else { "" };
        let said: String = said.iter().map(|s| format!("; {s}")).collect();
        crate::common::say(format!("{begin}ended by {name}{said}"));
        std::process::exit(status)
    })
}

/// Watches for the signals from a thread of its own.
#[cfg(unix)]
pub fn watch() -> io::Result<()> {
    use std::future::poll_fn;
    use std::task::Poll;
    use tokio::signal::unix::{SignalKind, signal};

    let known =
        [("SIGINT", SignalKind::interrupt()), ("SIGTERM", SignalKind::terminate()), ("SIGHUP", SignalKind::hangup())];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let entered = runtime.enter();
    // A file that grows beyond the size allowed is an error of the write like a full disk; unheard, this signal ends
    // the program first.
    let too_large = signal(SignalKind::from_raw(libc::SIGXFSZ))?;
    let mut heard = Vec::new();
    for (name, kind) in known.into_iter().filter(|k| !ignored(k.1.as_raw_value())) {
        heard.push((name, kind.as_raw_value(), signal(kind)?));
    }
    drop(entered);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let _too_large = too_large;
        runtime.block_on(async {
            loop {
                let next = poll_fn(|cx| {
                    let come = heard.iter_mut().find_map(|h| h.2.poll_recv(cx).is_ready().then_some((h.0, h.1)));
                    come.map_or(Poll::Pending, Poll::Ready)
                });
                let (name, number) = next.await;
                stop(name, 128 + number);
            }
        });
    })?;
    Ok(())
}

/// Whether whoever started the program wants it to outlive this signal (`nohup`, a shell's `&`), as far as the system
/// tells.
#[cfg(unix)]
fn ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

/// Watches for ctrl-c from a thread of its own.
#[cfg(not(unix))]
pub fn watch() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                stop("ctrl-c", 130);
            }
        });
    })?;
    Ok(())
}
