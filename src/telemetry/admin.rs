//! The admin listener: `/metrics`, `/livez`, `/readyz` over plain HTTP/1.1.
//!
//! It shares nothing with the gRPC port, so that it answers when that one is full. It takes no input but the path.

use std::{io, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};

use super::recorder::Recorder;

/// What the pages are made from.
#[derive(Clone)]
pub struct Admin {
    /// Where `/metrics` comes from; without it the page is empty.
    pub recorder: Option<Recorder>,
    /// Whether the daemon takes requests.
    pub ready: watch::Receiver<bool>,
}

/// The pages.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(admin)
}

/// Serves the pages until `shutdown` comes; then gives open connections a second.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    admin: Admin,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = axum::serve(listener, router(admin)).with_graceful_shutdown(async move {
        shutdown.await;
        drop(stop);
    });
    tokio::select! {
        result = server => result,
        () = async {
            let _ = stopped.await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        } => Ok(()),
    }
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let text = admin.recorder.map(|r| r.render()).unwrap_or_default();
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        text,
    )
}

async fn ready(State(admin): State<Admin>) -> impl IntoResponse {
    if *admin.ready.borrow() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "loading or draining\n")
    }
}
