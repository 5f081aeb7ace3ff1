//! What happens to every call: a deadline over the whole of it, counts and times, no compression that nobody asked for.
//!
//! tonic bounds only the time to the head of a response; here the deadline bounds the stream too, and ends it with
//! DEADLINE_EXCEEDED. Whatever works for the call is dropped with it, which cancels its rows.
//!
//! Answers are compressed only when the request was: clients announce gzip by default, and tensors hardly shrink.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response, header::HeaderValue};
use metrics::{counter, gauge, histogram};
use prost::Message as _;
use tonic::{Code, Status, service::Routes};
use tower::ServiceExt as _;

use super::{
    call::Call,
    status,
    watched::{Stalls, Watched},
    wire,
};
use crate::{engine::EngineError, telemetry::names};

const TIMEOUT: &str = "grpc-timeout";
const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";
const REQUEST_ID: &str = "x-request-id";
/// A call that is cancelled so short of its deadline ended by it.
const HANG_UP: Duration = Duration::from_millis(10);
/// Longest request id that is taken over from a caller.
const ID_LIMIT: usize = 128;

/// Shared by all connections.
pub(super) struct Edge {
    routes: Routes,
    /// Methods that metrics may name.
    methods: HashSet<&'static str>,
    stalls: Stalls,
}

impl Edge {
    pub(super) fn new(routes: Routes, stalls: Stalls) -> Self {
        Self {
            routes: routes.prepare(),
            methods: methods(),
            stalls,
        }
    }

    /// Answers a call that came by the connection `client`.
    pub(super) async fn answer<B>(&self, client: Arc<str>, request: Request<B>) -> Response<Watched>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let arrived = Instant::now();
        let (mut head, body) = request.into_parts();
        let id = request_id(&head.headers);
        let mut open = Open::new(self.method(head.uri.path()), arrived, id.clone());
        let deadline = match deadline(&head.headers, arrived) {
            Ok(deadline) => deadline,
            Err(error) => return self.refuse(&error, open),
        };
        open.until(deadline);
        if deadline.is_some_and(|d| d <= Instant::now()) {
            return self.refuse(&EngineError::DeadlineExceeded, open);
        }
        // tonic would answer it in its own way.
        head.headers.remove(TIMEOUT);
        compress_as_asked(&mut head.headers);
        head.extensions.insert(Call {
            arrived,
            deadline,
            id,
            client,
        });
        let answering = self.routes.clone().oneshot(Request::from_parts(head, body));
        let response = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), answering).await,
            None => Ok(answering.await),
        };
        match response {
            Err(_) => self.refuse(&EngineError::DeadlineExceeded, open),
            Ok(Err(never)) => match never {},
            Ok(Ok(response)) => {
                let head_status = Status::from_header_map(response.headers()).map(|s| s.code());
                response.map(|body| Watched::new(body, head_status, deadline, open, &self.stalls))
            }
        }
    }

    fn refuse(&self, error: &EngineError, open: Open) -> Response<Watched> {
        let status = status::status(error);
        let code = status.code();
        status
            .into_http::<tonic::body::Body>()
            .map(|body| Watched::new(body, Some(code), None, open, &self.stalls))
    }

    /// The method of a path as metrics name it; one name for all that we do not have.
    fn method(&self, path: &str) -> &'static str {
        let path = path.strip_prefix('/').unwrap_or(path);
        self.methods.get(path).copied().unwrap_or("unknown")
    }
}

/// Every method of the protos, and those of health and reflection.
fn methods() -> HashSet<&'static str> {
    let mut methods = HashSet::new();
    for descriptors in [
        wire::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        let set = prost_types::FileDescriptorSet::decode(descriptors).unwrap_or_default();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    // A few dozen names for the life of the process.
                    methods.insert(&*name.leak());
                }
            }
        }
    }
    methods
}

/// The instant that `grpc-timeout` asks for.
fn deadline(headers: &HeaderMap, arrived: Instant) -> Result<Option<Instant>, EngineError> {
    let Some(value) = headers.get(TIMEOUT) else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse).ok_or_else(|| {
        EngineError::invalid(
            TIMEOUT,
            "is not a timeout: up to eight digits and one of H, M, S, m, u, n",
        )
    })?;
    // One that is too far to count is none.
    Ok(arrived.checked_add(timeout))
}

fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

fn compress_as_asked(headers: &mut HeaderMap) {
    let identity = HeaderValue::from_static("identity");
    if headers.get(ENCODING).is_none_or(|e| e == identity) {
        headers.remove(ACCEPT_ENCODING);
    }
}

/// The caller's id, if it is fit for a log line; otherwise one of ours.
fn request_id(headers: &HeaderMap) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    headers
        .get(REQUEST_ID)
        .and_then(|v| v.to_str().ok())
        .filter(|id| !id.is_empty() && id.len() <= ID_LIMIT)
        .map_or_else(
            || {
                format!(
                    "{:x}-{}",
                    std::process::id(),
                    NEXT.fetch_add(1, Ordering::Relaxed)
                )
            },
            str::to_owned,
        )
}

/// A call that is open. Records how it ended when it is dropped, in the metrics and in the log; a call that nobody ended was
/// cancelled.
pub(super) struct Open {
    method: &'static str,
    arrived: Instant,
    id: String,
    deadline: Option<Instant>,
    code: Code,
}

impl Open {
    fn new(method: &'static str, arrived: Instant, id: String) -> Self {
        gauge!(names::INFLIGHT, "method" => method).increment(1.0);
        Self {
            method,
            arrived,
            id,
            deadline: None,
            code: Code::Cancelled,
        }
    }

    /// Until when it is wanted.
    fn until(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// How it is going to end.
    pub(super) fn ends(&mut self, code: Code) {
        self.code = code;
    }

    /// Payload went out.
    pub(super) fn sent(&self, bytes: usize) {
        counter!(names::STREAM_BYTES, "method" => self.method).increment(bytes as u64);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // Callers keep their deadlines too, and hang up a moment before ours.
        let late = |d: Instant| Instant::now() + HANG_UP >= d;
        if self.code == Code::Cancelled && self.deadline.is_some_and(late) {
            self.code = Code::DeadlineExceeded;
        }
        gauge!(names::INFLIGHT, "method" => self.method).decrement(1.0);
        let code = status::name(self.code);
        counter!(names::REQUESTS, "method" => self.method, "code" => code).increment(1);
        let took = self.arrived.elapsed();
        histogram!(names::REQUEST_DURATION, "method" => self.method).record(took);
        let (request_id, method, seconds) = (&self.id, self.method, took.as_secs_f64());
        match self.code {
            Code::Ok => tracing::debug!(request_id, method, code, seconds, "a call ended"),
            Code::Internal | Code::Unknown | Code::DataLoss => {
                tracing::error!(request_id, method, code, seconds, "a call failed");
            }
            Code::Cancelled
            | Code::InvalidArgument
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unavailable
            | Code::Unauthenticated => {
                tracing::info!(request_id, method, code, seconds, "a call ended");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_of_every_unit() {
        for (text, wanted) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(parse(text), Some(wanted), "{text}");
        }
        for bad in [
            "",
            "1",
            "S",
            "1s",
            "-1S",
            "+1S",
            "123456789S",
            "1 S",
            "1é",
            "1.5S",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_timeout_that_is_over_or_malformed_is_answered_at_once() {
        let edge = Edge::new(Routes::default(), Stalls::new(Duration::from_secs(1)));
        for (timeout, code) in [
            ("0S", Code::DeadlineExceeded),
            ("1n", Code::DeadlineExceeded),
            ("1x", Code::InvalidArgument),
            ("123456789S", Code::InvalidArgument),
            ("99999999H", Code::Unimplemented),
        ] {
            let request = Request::builder()
                .uri("/nobody/Asks")
                .header(TIMEOUT, timeout)
                .body(tonic::body::Body::empty())
                .unwrap();
            let response = edge.answer(Arc::from("test"), request).await;
            let status = Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), code, "{timeout}");
        }
    }

    #[test]
    fn methods_are_those_of_the_descriptors() {
        let methods = methods();
        for method in [
            "introspect.v1.CaptureService/Capture",
            "inference.GRPCInferenceService/ModelInfer",
            "grpc.health.v1.Health/Check",
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert!(methods.contains(method), "{method}");
        }
    }

    #[test]
    fn answers_are_compressed_only_when_the_request_was() {
        let with = |encoding: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
            if let Some(encoding) = encoding {
                headers.insert(ENCODING, HeaderValue::from_static(encoding));
            }
            compress_as_asked(&mut headers);
            headers.contains_key(ACCEPT_ENCODING)
        };
        assert!(with(Some("gzip")));
        assert!(!with(Some("identity")));
        assert!(!with(None));
    }
}
