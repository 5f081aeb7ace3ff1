//! Daemons that send half of an answer, or another one than they say: nothing of it reaches a file.

mod cli_support;

use std::{collections::HashSet, net::SocketAddr, pin::Pin, time::Duration};

use bytes::Bytes;
use cli_support::run;
use futures::{Stream, stream};
use introspectd::service::wire::introspect::{
    CaptureHeader, CaptureRequest, CaptureResponse, CaptureStreamRequest, CaptureStreamResponse,
    DType, Failure, StreamSummary, Summary, Tensor,
    capture_response::Item,
    capture_service_server::{CaptureService, CaptureServiceServer},
    capture_stream_response::Answer,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    NoSummary,
    Checksum,
    MissingPiece,
    MissingTensor,
    AfterSummary,
    Died,
    Silence,
}

/// Answers every call with the one answer, and the fault that the model's name asks for.
struct Liar;

fn fault(model: &str) -> Fault {
    [
        Fault::NoSummary,
        Fault::Checksum,
        Fault::MissingPiece,
        Fault::MissingTensor,
        Fault::AfterSummary,
        Fault::Died,
        Fault::Silence,
    ]
    .into_iter()
    .find(|f| format!("{f:?}") == model)
    .unwrap_or(Fault::None)
}

/// One tensor of four numbers in two pieces.
fn answer(fault: Fault) -> Vec<Result<CaptureResponse, Status>> {
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let piece = |offset: usize, end: usize| {
        Item::Tensor(Tensor {
            name: "t".into(),
            axes: vec!["pos".into()],
            dtype: DType::F32.into(),
            shape: vec![4],
            offset: offset as u64,
            data: Bytes::copy_from_slice(&data[offset..end]),
        })
    };
    let summary = Summary {
        messages: 3,
        bytes: 16,
        crc32c: crc32c::crc32c(&data),
        ..Summary::default()
    };
    let header = Item::Header(CaptureHeader {
        tensors: vec!["t".into()],
        ..CaptureHeader::default()
    });
    let (first, second) = (piece(0, 8), piece(8, 16));
    let end = Item::Summary(summary.clone());
    let items = match fault {
        Fault::None => vec![header, first, second, end],
        Fault::NoSummary => vec![header, first, second],
        Fault::Checksum => {
            let crc32c = summary.crc32c ^ 1;
            vec![
                header,
                first,
                second,
                Item::Summary(Summary { crc32c, ..summary }),
            ]
        }
        Fault::MissingPiece => vec![header, first, end],
        Fault::MissingTensor => vec![
            header,
            Item::Summary(Summary {
                messages: 1,
                ..Summary::default()
            }),
        ],
        Fault::AfterSummary => vec![header, first, second.clone(), end, second],
        Fault::Died => vec![header, first],
        Fault::Silence => vec![],
    };
    let mut messages: Vec<_> = items
        .into_iter()
        .map(|item| Ok(CaptureResponse { item: Some(item) }))
        .collect();
    if matches!(fault, Fault::Died) {
        messages.push(Err(Status::unavailable("the worker died")));
    }
    messages
}

#[tonic::async_trait]
impl CaptureService for Liar {
    type CaptureStream = Messages<CaptureResponse>;
    type CaptureStreamStream = Messages<CaptureStreamResponse>;

    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let fault = fault(&request.into_inner().model);
        Ok(Response::new(Box::pin(stream::iter(answer(fault)))))
    }

    /// Of the model `Busy`, each text at its second try. Of others, the first text, and then a summary of two.
    async fn capture_stream(
        &self,
        request: Request<Streaming<CaptureStreamRequest>>,
    ) -> Result<Response<Self::CaptureStreamStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let asked = first.clone().and_then(|r| r.request).unwrap_or_default();
        if asked.model == "Busy" {
            return Ok(Response::new(Box::pin(busy(first, requests))));
        }
        let id = requests.message().await?.map(|r| r.id).unwrap_or_default();
        let mut messages: Vec<_> = answer(Fault::None)
            .into_iter()
            .map(|m| {
                Ok(CaptureStreamResponse {
                    id: id.clone(),
                    answer: Some(Answer::Capture(m?)),
                })
            })
            .collect();
        messages.push(Ok(CaptureStreamResponse {
            id: String::new(),
            answer: Some(Answer::Summary(StreamSummary {
                answered: 2,
                messages: 4,
                bytes: 16,
                crc32c: 0,
                ..StreamSummary::default()
            })),
        }));
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }
}

/// Fails every text at its first try, with advice to retry; `never` at every try, without.
fn busy(
    first: Option<CaptureStreamRequest>,
    mut requests: Streaming<CaptureStreamRequest>,
) -> impl Stream<Item = Result<CaptureStreamResponse, Status>> + Send {
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        let mut tried = HashSet::new();
        let mut summary = StreamSummary::default();
        let mut next = first;
        while let Some(request) = next {
            let id = request.id;
            let never = format!("{:?}", request.request).contains("never");
            let mut answers = Vec::new();
            if never || tried.insert(id.clone()) {
                summary.failed += 1;
                summary.messages += 1;
                answers.push(Answer::Failure(Failure {
                    code: 14,
                    message: "not yet".into(),
                    retry_after_seconds: (!never).then_some(0.05),
                    ..Failure::default()
                }));
            } else {
                summary.answered += 1;
                for message in answer(Fault::None) {
                    let message = message.unwrap();
                    summary.messages += 1;
                    if let Some(Item::Tensor(t)) = &message.item {
                        summary.bytes += t.data.len() as u64;
                        summary.crc32c = crc32c::crc32c_append(summary.crc32c, &t.data);
                    }
                    answers.push(Answer::Capture(message));
                }
            }
            for a in answers {
                let message = CaptureStreamResponse {
                    id: id.clone(),
                    answer: Some(a),
                };
                sender.send(Ok(message)).await.unwrap();
            }
            next = requests.message().await.unwrap();
        }
        let end = CaptureStreamResponse {
            id: String::new(),
            answer: Some(Answer::Summary(summary)),
        };
        sender.send(Ok(end)).await.unwrap();
    });
    ReceiverStream::new(receiver)
}

async fn liar() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder()
        .timeout(Duration::from_secs(30))
        .add_service(CaptureServiceServer::new(Liar))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_with_a_fault_is_refused_whole() {
    let server = format!("http://{}", liar().await);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.npz");
    let capture = async |model: &str| {
        let (model, server) = (model.to_owned(), server.clone());
        let file = file.display().to_string();
        tokio::task::spawn_blocking(move || {
            run(&["capture", &model, "text", "--server", &server, "-o", &file])
        })
        .await
        .unwrap()
    };
    for (fault, said) in [
        (Fault::NoSummary, "ended without its summary"),
        (Fault::Checksum, "checksum does not match"),
        (Fault::MissingPiece, "tensor \"t\" is incomplete"),
        (Fault::MissingTensor, "announces [t], [] came"),
        (Fault::AfterSummary, "goes on after its summary"),
        (Fault::Died, "the worker died"),
        (Fault::Silence, "ended without its summary"),
    ] {
        capture(&format!("{fault:?}")).await.failed(1, said);
        assert!(!file.exists(), "{fault:?}: nothing is written");
    }
    capture("honest").await.ok();
    assert!(file.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_stream_that_does_not_add_up_is_refused() {
    let server = format!("http://{}", liar().await);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("texts.txt"), "one\ntwo\n").unwrap();
    let (texts, out) = (path("texts.txt"), path("out.jsonl"));
    tokio::task::spawn_blocking(move || {
        run(&[
            "capture",
            "m",
            "--text-file",
            &texts,
            "--server",
            &server,
            "-o",
            &out,
        ])
        .failed(1, "the answer is broken")
    })
    .await
    .unwrap();
}

/// Texts that the daemon cannot take now are sent again; what fails for good is told once.
#[tokio::test(flavor = "multi_thread")]
async fn texts_are_sent_again_when_the_daemon_says_so() {
    let server = format!("http://{}", liar().await);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (texts, out) = (path("texts.txt"), path("out.jsonl"));
    let many: String = (0..200).map(|i| format!("text {i}\n")).collect();
    std::fs::write(&texts, many + "never\n").unwrap();
    let ran = tokio::task::spawn_blocking({
        let out = out.clone();
        move || {
            run(&[
                "capture",
                "Busy",
                "--text-file",
                &texts,
                "--server",
                &server,
                "-o",
                &out,
            ])
        }
    })
    .await
    .unwrap()
    .failed(1, "line 201: not yet");
    assert_eq!(ran.err.matches("not yet").count(), 1, "{ran:?}");
    let lines: HashSet<u64> = std::fs::read_to_string(out)
        .unwrap()
        .lines()
        .map(|l| {
            serde_json::from_str::<serde_json::Value>(l).unwrap()["line"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(lines, (1..=200).collect());
}
