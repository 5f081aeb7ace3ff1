//! What tests of interventions and sweeps ask with.

#![allow(dead_code)] // every test binary uses a part of it

use std::collections::{BTreeMap, HashMap};

use introspectd::service::wire::introspect::{
    self as pb, edit::Operation as Op, intervene_item::Item as Of,
    intervene_response::Item as Message, intervention_service_client::InterventionServiceClient,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::daemon::{TestDaemon, hooks};

/// The four development architectures.
pub const MODELS: [&str; 4] = [
    "bert.legacy14",
    "distilbert.legacy14",
    "gpt2.legacy14",
    "llama.dynamo20",
];
pub const IDS: [u32; 6] = [2, 9, 17, 30, 11, 3];
pub const OTHER: [u32; 6] = [2, 21, 8, 14, 25, 3];
/// Same mathematics by other operators.
pub const REWRITTEN: f32 = 1e-4;

pub fn tokens(of: &[u32]) -> pb::Input {
    pb::Input {
        kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
            ids: of.to_vec(),
            type_ids: Vec::new(),
        })),
    }
}

pub fn edit(hook: &str, operation: Op) -> pb::Edit {
    pb::Edit {
        hook: hook.to_owned(),
        operation: Some(operation),
        ..pb::Edit::default()
    }
}

pub fn edits(edits: Vec<pb::Edit>) -> pb::Intervention {
    pb::Intervention {
        edits,
        ..pb::Intervention::default()
    }
}

/// With a source called "other".
pub fn from(other: &[u32], edits: Vec<pb::Edit>) -> pb::Intervention {
    let source = pb::InterventionSource {
        input: Some(tokens(other)),
        edits: Vec::new(),
    };
    pb::Intervention {
        edits,
        sources: HashMap::from([("other".to_owned(), source)]),
    }
}

pub fn interchange() -> Op {
    Op::Interchange(pb::Interchange {
        source: "other".to_owned(),
        positions: Vec::new(),
    })
}

pub fn vector(values: &[f32]) -> pb::Tensor {
    pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![values.len() as u64],
        data: values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..pb::Tensor::default()
    }
}

/// The whole output, and these hook points.
pub fn all(names: &[&str]) -> pb::Selection {
    pb::Selection {
        logits: pb::Logits::All.into(),
        ..hooks(names)
    }
}

/// The largest difference, relative to the largest of `b`.
pub fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let off = a.iter().zip(b).map(|(x, y)| (x - y).abs());
    off.fold(0.0, f32::max) / largest
}

/// The field that is named.
pub fn field(error: &Status) -> String {
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    let details = error.get_error_details();
    details.bad_request().unwrap().field_violations[0]
        .field
        .clone()
}

/// One of both runs.
#[derive(Debug, Default)]
pub struct Run {
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub prediction: Option<pb::Prediction>,
}

impl Run {
    fn take(&mut self, item: pb::InterveneItem) {
        match item.item.unwrap() {
            Of::Tensor(t) => {
                assert_eq!(t.dtype(), pb::DType::F32);
                let values = t.data.chunks_exact(4);
                let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let shape = t.shape.iter().map(|n| *n as usize).collect();
                let (_, all) = self
                    .tensors
                    .entry(t.name)
                    .or_insert_with(|| (shape, Vec::new()));
                assert_eq!(t.offset as usize, all.len() * 4);
                all.extend(values);
            }
            Of::Prediction(p) => self.prediction = Some(p),
            other => panic!("{other:?}"),
        }
    }

    pub fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }
}

#[derive(Debug, Default)]
pub struct Answer {
    pub original: Run,
    pub modified: Run,
    pub effect: Option<pb::InterventionEffect>,
    pub summary: pb::Summary,
}

impl Answer {
    /// The only place of the prediction.
    pub fn effect(&self) -> &pb::EffectAt {
        &self.effect.as_ref().unwrap().at[0]
    }
}

/// An intervention, read to its end and checked against its summary.
pub async fn ask(d: &TestDaemon, request: pb::InterveneRequest) -> Result<Answer, Status> {
    let mut client =
        InterventionServiceClient::new(d.channel().await).max_decoding_message_size(64 << 20);
    let mut stream = client.intervene(request).await?.into_inner();
    let mut answer = Answer::default();
    let (mut messages, mut crc, mut ended) = (0, 0, false);
    while let Some(message) = stream.message().await? {
        assert!(!ended, "the summary comes last");
        match message.item.unwrap() {
            Message::Header(_) => assert_eq!(messages, 0),
            Message::Original(item) => {
                crc = checked(crc, &item);
                answer.original.take(item);
            }
            Message::Modified(item) => {
                crc = checked(crc, &item);
                answer.modified.take(item);
            }
            Message::Effect(effect) => answer.effect = Some(effect),
            Message::Summary(summary) => {
                assert_eq!((summary.messages, summary.crc32c), (messages, crc));
                answer.summary = summary;
                ended = true;
            }
        }
        messages += 1;
    }
    assert!(ended, "a stream ends with its summary");
    Ok(answer)
}

fn checked(crc: u32, item: &pb::InterveneItem) -> u32 {
    match item.item.as_ref().unwrap() {
        Of::Tensor(t) => crc32c::crc32c_append(crc, &t.data),
        _ => crc,
    }
}

pub fn request(
    model: &str,
    intervention: pb::Intervention,
    selection: pb::Selection,
) -> pb::InterveneRequest {
    pb::InterveneRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        intervention: Some(intervention),
        selection: Some(selection),
    }
}
