//! Both ends of the connection over a real socket pair, with a thread as the worker.

#![allow(clippy::wildcard_enum_match_arm)] // a test panics on what it does not expect

use std::os::unix::net::UnixStream;

use introspectd::ipc::{
    front::Connection,
    wire::{Pong, Ran, Run, TensorRef, Tokenize, Tokenized, command, event},
    worker_side,
};

/// A worker that answers each run with its input doubled byte by byte, and hangs up on `Tokenize` without texts.
fn start(budget: usize) -> Connection {
    let (front, worker) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let (sender, mut receiver) = worker_side::split(worker, budget).unwrap();
        while let Ok(Some((command, views))) = receiver.receive() {
            match command {
                command::Kind::Run(run) => {
                    let total: usize = views.iter().map(bytes::Bytes::len).sum();
                    let mut segment = sender.pool().with(|p| p.take(total)).unwrap();
                    let (mut tensors, mut at) = (Vec::new(), 0);
                    for (input, view) in run.inputs.iter().zip(&views) {
                        let out = &mut segment.bytes_mut()[at..at + view.len()];
                        out.iter_mut()
                            .zip(view)
                            .for_each(|(o, i)| *o = i.wrapping_mul(2));
                        tensors.push(TensorRef {
                            span: Some(segment.span(at, view.len())),
                            ..input.clone()
                        });
                        at += view.len();
                    }
                    let ran = Ran {
                        tensors,
                        ..Ran::default()
                    };
                    sender
                        .send(run.id, event::Kind::Ran(ran), Some(segment))
                        .unwrap();
                }
                command::Kind::Tokenize(t) if t.texts.is_empty() => return,
                command::Kind::Tokenize(t) => sender
                    .send(t.id, event::Kind::Tokenized(Tokenized::default()), None)
                    .unwrap(),
                command::Kind::Ping(p) => {
                    let pong = Pong {
                        nonce: p.nonce,
                        resident_bytes: 7,
                    };
                    sender.send(0, event::Kind::Pong(pong), None).unwrap();
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    });
    Connection::new(front, budget).unwrap()
}

async fn double(connection: &Connection, bytes: &[u8]) -> Vec<u8> {
    let mut segment = connection.pool().with(|p| p.take(bytes.len())).unwrap();
    segment.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    let id = connection.next_id();
    let run = Run {
        id,
        inputs: vec![TensorRef {
            span: Some(segment.span(0, bytes.len())),
            ..TensorRef::default()
        }],
        ..Run::default()
    };
    let (kind, views) = connection
        .call(id, command::Kind::Run(run), Some(segment))
        .await
        .unwrap();
    assert!(matches!(kind, event::Kind::Ran(_)));
    views[0].to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_at_once_each_get_their_own_answer_and_segments_are_reused() {
    let connection = start(1 << 26);
    let runs = (0..400u32).map(|i| {
        let connection = connection.clone();
        tokio::spawn(async move {
            let bytes = i.to_le_bytes().repeat(1 + i as usize % 700);
            let wanted: Vec<u8> = bytes.iter().map(|b| b.wrapping_mul(2)).collect();
            assert_eq!(double(&connection, &bytes).await, wanted);
        })
    });
    for run in runs.collect::<Vec<_>>() {
        run.await.unwrap();
    }
    let first = connection.pool().with(|p| p.bytes());
    for _ in 0..200 {
        double(&connection, &[1; 1000]).await;
    }
    let later = connection.pool().with(|p| p.bytes());
    assert!(later <= first, "no growth: {first} then {later}");
}

#[tokio::test]
async fn a_worker_that_hangs_up_ends_every_wait() {
    let connection = start(1 << 20);
    let id = connection.next_id();
    let got = connection
        .call(
            id,
            command::Kind::Tokenize(Tokenize {
                id,
                ..Tokenize::default()
            }),
            None,
        )
        .await;
    assert!(got.is_err());
    connection.closed().await;
    let id = connection.next_id();
    let again = connection
        .call(
            id,
            command::Kind::Run(Run {
                id,
                ..Run::default()
            }),
            None,
        )
        .await;
    assert!(again.is_err());
}

#[tokio::test]
async fn a_frame_that_announces_too_much_ends_the_connection() {
    use std::io::Write as _;
    let (front, mut worker) = UnixStream::pair().unwrap();
    let connection = Connection::new(front, 1 << 20).unwrap();
    worker.write_all(&u32::MAX.to_le_bytes()).unwrap();
    connection.closed().await;
}
