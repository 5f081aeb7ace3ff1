//! Accepts connections and bounds them.
//!
//! Our own loop around hyper in place of tonic's, because ours ends: connections that nobody closes are cut when the grace is
//! over, connections above the limit wait to be accepted, and a shortage of descriptors slows accepting down in place of
//! spinning.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::gauge;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::edge::Edge;
use crate::telemetry::names;

/// After accepting failed: descriptors are short, or memory.
const BACK_OFF: Duration = Duration::from_millis(50);
/// A connection that says nothing at first is closed.
const FIRST_BYTES: Duration = Duration::from_secs(10);
/// A connection that does not answer a ping is closed.
const PING_LIMIT: Duration = Duration::from_secs(10);
/// What is given to the kernel of one stream before its reader takes it.
const SEND_BUFFER: usize = 512 << 10;
/// Flow-control windows for what callers send.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Bytes of the header of a call.
const HEADER_LIMIT: u32 = 16 << 10;

/// Bounds of connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// At a time.
    pub connections: usize,
    /// Calls at a time on each.
    pub streams: u32,
    /// A silent connection is pinged so often.
    pub keepalive: Duration,
}

/// Accepts until `drain`; then asks every connection to finish its calls. `kill` cuts what is left. Comes back when the last
/// connection is closed.
pub(super) async fn serve(
    listener: TcpListener,
    edge: Arc<Edge>,
    limits: Limits,
    drain: CancellationToken,
    kill: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            () = drain.cancelled() => break,
        };
        match accepted {
            Ok((stream, client, permit)) => {
                let (edge, drain, kill) = (edge.clone(), drain.clone(), kill.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    gauge!(names::CONNECTIONS).increment(1.0);
                    tokio::select! {
                        () = connection(stream, client, edge, limits, drain) => {}
                        () = kill.cancelled() => {}
                    }
                    gauge!(names::CONNECTIONS).decrement(1.0);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, Arc<str>, OwnedSemaphorePermit)> {
    let permit = room
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, address.to_string().into(), permit))
}

async fn connection(
    stream: TcpStream,
    client: Arc<str>,
    edge: Arc<Edge>,
    limits: Limits,
    drain: CancellationToken,
) {
    let spoke = tokio::select! {
        spoke = tokio::time::timeout(FIRST_BYTES, stream.readable()) => spoke,
        () = drain.cancelled() => return,
    };
    if !matches!(spoke, Ok(Ok(()))) {
        return;
    }
    let service = hyper::service::service_fn(move |request| {
        let (edge, client) = (edge.clone(), client.clone());
        async move { Ok::<_, Infallible>(edge.answer(client, request).await) }
    });
    let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(PING_LIMIT)
        .max_concurrent_streams(limits.streams)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = drain.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}
