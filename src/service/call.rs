//! What the edge knows of a call, for those behind it.

use std::{sync::Arc, time::Instant};

use crate::engine::Ctx;

/// Put into the extensions of every request by the edge.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// When it arrived.
    pub arrived: Instant,
    /// When its answer stops being wanted.
    pub deadline: Option<Instant>,
    /// Stands in the log beside everything that it did.
    pub id: String,
    /// The connection that it came by: calls of one connection take turns as one client.
    pub client: Arc<str>,
}

impl Call {
    /// Of a request that came through the edge.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_else(|| Self {
            arrived: Instant::now(),
            deadline: None,
            id: String::new(),
            client: Arc::from(""),
        })
    }

    /// For the engine. Dropping what the engine gives back cancels its work, so the token is only for those who ask without holding.
    pub(super) fn ctx(&self) -> Ctx {
        Ctx {
            client: Some(self.client.clone()),
            ..Ctx::new(self.id.clone(), self.deadline)
        }
    }
}
