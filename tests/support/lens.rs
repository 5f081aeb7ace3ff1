//! A lens, read to its end and checked against its summary.

#![allow(dead_code)] // every test binary uses a part of it
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

use std::collections::BTreeMap;

use introspectd::service::wire::introspect::{
    self as pb, analysis_service_client::AnalysisServiceClient, lens_response::Item,
};
use tonic::Status;

use crate::daemon::TestDaemon;

#[derive(Debug, Default)]
pub struct Answer {
    pub header: pb::LensHeader,
    pub attribution: Option<pb::DirectAttribution>,
    pub labels: BTreeMap<u32, String>,
    pub tensors: BTreeMap<String, Array>,
    pub summary: pb::Summary,
}

#[derive(Clone, Debug, Default)]
pub struct Array {
    pub axes: Vec<String>,
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Answer {
    pub fn array(&self, name: &str) -> &Array {
        let known: Vec<&String> = self.tensors.keys().collect();
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not among {known:?}"))
    }

    pub fn values(&self, name: &str) -> &[f64] {
        &self.array(name).values
    }

    /// Of a tensor that counts states first, the part of one.
    pub fn state(&self, name: &str, state: usize) -> &[f64] {
        let array = self.array(name);
        let size = array.values.len() / array.shape[0];
        &array.values[state * size..][..size]
    }

    pub fn last(&self) -> usize {
        self.header.states.len() - 1
    }
}

pub async fn ask(d: &TestDaemon, request: pb::LensRequest) -> Result<Answer, Status> {
    let mut client =
        AnalysisServiceClient::new(d.channel().await).max_decoding_message_size(64 << 20);
    let mut stream = client.lens(request).await?.into_inner();
    let mut answer = Answer::default();
    let mut parts: BTreeMap<String, (pb::Tensor, Vec<u8>)> = BTreeMap::new();
    let (mut messages, mut bytes, mut crc, mut ended) = (0, 0, 0, false);
    while let Some(message) = stream.message().await? {
        assert!(!ended, "the summary comes last");
        match message.item.unwrap() {
            Item::Header(h) => {
                assert_eq!(messages, 0, "the header comes first");
                answer.header = h;
            }
            Item::Progress(p) => assert!(p.rows_done <= p.rows_planned),
            Item::Attribution(a) => answer.attribution = Some(a),
            Item::Labels(l) => {
                assert!(l.labels.len() <= 4096);
                let named = l.labels.into_iter().map(|l| (l.index, l.label));
                answer.labels.extend(named);
            }
            Item::Tensor(t) => {
                assert!(t.data.len() <= 256 << 10, "a piece is bounded");
                bytes += t.data.len() as u64;
                crc = crc32c::crc32c_append(crc, &t.data);
                let (_, all) = parts
                    .entry(t.name.clone())
                    .or_insert_with(|| (t.clone(), Vec::new()));
                assert_eq!(t.offset as usize, all.len());
                all.extend_from_slice(&t.data);
            }
            Item::Summary(s) => {
                assert_eq!((s.messages, s.bytes, s.crc32c), (messages, bytes, crc));
                answer.summary = s;
                ended = true;
            }
        }
        messages += 1;
    }
    assert!(ended, "a stream ends with its summary");
    for (name, (t, bytes)) in parts {
        let words = bytes.chunks_exact(4).map(|b| b.try_into().unwrap());
        let values: Vec<f64> = match t.dtype() {
            pb::DType::F32 => words.map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            pb::DType::U32 => words.map(|b| f64::from(u32::from_le_bytes(b))).collect(),
            other => panic!("{other:?}"),
        };
        let shape: Vec<usize> = t.shape.iter().map(|n| *n as usize).collect();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        assert_eq!(shape.len(), t.axes.len(), "{name}");
        let array = Array {
            axes: t.axes,
            shape,
            values,
        };
        answer.tensors.insert(name, array);
    }
    Ok(answer)
}

pub fn tokens(of: &[u32]) -> Option<pb::Input> {
    Some(pb::Input {
        kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
            ids: of.to_vec(),
            type_ids: Vec::new(),
        })),
    })
}

/// Largest difference, relative to the largest magnitude.
pub fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let off = a.iter().zip(b).map(|(x, y)| (x - y).abs());
    off.fold(0.0, f64::max) / largest
}
