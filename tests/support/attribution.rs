//! Asks the daemon of a test for explanations, and checks what it reads.

#![allow(dead_code)] // every test binary uses a part of it

use std::collections::BTreeMap;

use introspectd::service::wire::introspect::{
    self as pb, attribute_response::Item, attribution_service_client::AttributionServiceClient,
    method::Kind,
};
use tonic::{Status, transport::Channel};

use super::daemon::TestDaemon;

/// An explanation, put together and checked against its summary.
#[derive(Clone, Debug, Default)]
pub struct Explained {
    pub header: pb::AttributionHeader,
    pub progress: Vec<pb::AttributionProgress>,
    pub result: pb::AttributionResult,
    pub tensors: BTreeMap<String, (Vec<u64>, Vec<f32>)>,
    pub summary: pb::Summary,
}

pub async fn client(d: &TestDaemon) -> AttributionServiceClient<Channel> {
    AttributionServiceClient::new(d.channel().await).max_decoding_message_size(64 << 20)
}

/// Reads an explanation to its end.
pub async fn explain(d: &TestDaemon, request: pb::AttributeRequest) -> Result<Explained, Status> {
    let mut stream = client(d).await.attribute(request).await?.into_inner();
    let mut reader = Reader::default();
    while let Some(message) = stream.message().await? {
        if let Some(explained) = reader.take(message.item.expect("a message holds something")) {
            assert!(stream.message().await?.is_none(), "the summary comes last");
            return Ok(explained);
        }
    }
    panic!("a stream ended without a summary and without an error");
}

/// Puts messages together.
#[derive(Default)]
pub struct Reader {
    explained: Explained,
    parts: BTreeMap<String, (Vec<u64>, Vec<u8>)>,
    messages: u64,
    bytes: u64,
    crc: u32,
}

impl Reader {
    pub fn take(&mut self, item: Item) -> Option<Explained> {
        match item {
            Item::Header(h) => {
                assert_eq!(self.messages, 0, "the header comes first");
                self.explained.header = h;
            }
            Item::Progress(p) => {
                if let Some(t) = &p.partial {
                    self.payload(&t.data);
                }
                self.explained.progress.push(p);
            }
            Item::Result(r) => self.explained.result = r,
            Item::Tensor(t) => {
                self.payload(&t.data);
                let (_, bytes) = self.parts.entry(t.name).or_insert((t.shape, Vec::new()));
                assert_eq!(t.offset as usize, bytes.len(), "pieces follow each other");
                bytes.extend_from_slice(&t.data);
            }
            Item::Summary(s) => {
                assert_eq!(s.messages, self.messages);
                assert_eq!(s.bytes, self.bytes);
                assert_eq!(s.crc32c, self.crc);
                self.explained.summary = s;
                for (name, (shape, bytes)) in std::mem::take(&mut self.parts) {
                    let values = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                    self.explained
                        .tensors
                        .insert(name, (shape, values.collect()));
                }
                return Some(std::mem::take(&mut self.explained));
            }
        }
        self.messages += 1;
        None
    }

    fn payload(&mut self, part: &[u8]) {
        self.bytes += part.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, part);
    }
}

impl Explained {
    /// The scores.
    pub fn scores(&self) -> Vec<f64> {
        self.tensor("attributions")
    }

    pub fn tensor(&self, name: &str) -> Vec<f64> {
        let (_, values) = self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not among {:?}", self.tensors.keys()));
        values.iter().map(|v| f64::from(*v)).collect()
    }

    pub fn sum(&self) -> f64 {
        self.scores().iter().sum()
    }

    /// What F changes by from the baseline.
    pub fn change(&self) -> f64 {
        self.result.value
            - self
                .result
                .baseline_value
                .expect("the method has a baseline")
    }
}

/// A question about token ids.
pub fn about(model: &str, ids: &[u32], kind: Kind) -> pb::AttributeRequest {
    pb::AttributeRequest {
        model: model.to_owned(),
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
                ids: ids.to_vec(),
                type_ids: Vec::new(),
            })),
        }),
        method: Some(pb::Method { kind: Some(kind) }),
        ..pb::AttributeRequest::default()
    }
}

/// One class or token, at a position where the model has scores at each.
pub fn choice(index: u32, position: Option<i32>) -> Option<pb::Target> {
    Some(pb::Target {
        of: Some(pb::target::Of::Choice(pb::Choice {
            what: Some(pb::choice::What::Index(index)),
            position,
        })),
        ..pb::Target::default()
    })
}

/// A baseline of ids.
pub fn against(ids: &[u32]) -> Option<pb::Baseline> {
    Some(pb::Baseline {
        kind: Some(pb::baseline::Kind::Tokens(pb::TokenIds {
            ids: ids.to_vec(),
            type_ids: Vec::new(),
        })),
        replace_special: false,
    })
}

/// The greatest difference, relative to the greatest entry.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let off = a
        .iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f64::max);
    off / largest
}
