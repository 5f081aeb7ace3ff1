//! A sweep, read to its end and checked against its summary.

#![allow(dead_code)] // every test binary uses a part of it

use std::collections::BTreeMap;

use introspectd::service::wire::introspect::{
    self as pb, intervention_service_client::InterventionServiceClient, sweep_response::Item,
};
use tonic::Status;

use crate::daemon::TestDaemon;

/// A sweep, complete.
pub struct Swept {
    pub header: pb::SweepHeader,
    pub tensors: BTreeMap<String, Vec<f32>>,
    pub shapes: BTreeMap<String, (Vec<String>, Vec<u64>)>,
    pub result: pb::SweepResult,
    pub summary: pb::Summary,
}

impl Swept {
    pub fn of(&self, what: &str, hook: &str) -> &[f32] {
        &self.tensors[&format!("{what}:{hook}")]
    }
}

pub async fn swept(d: &TestDaemon, request: pb::SweepRequest) -> Result<Swept, Status> {
    let mut client = InterventionServiceClient::new(d.channel().await);
    let mut stream = client.sweep(request).await?.into_inner();
    let (mut header, mut result, mut summary) = (None, None, None);
    let (mut tensors, mut shapes) = (BTreeMap::<String, Vec<f32>>::new(), BTreeMap::new());
    let (mut messages, mut crc) = (0, 0);
    while let Some(message) = stream.message().await? {
        assert!(summary.is_none(), "nothing comes behind the summary");
        match message.item.unwrap() {
            Item::Header(h) => header = Some(h),
            Item::Progress(p) => assert!(p.rows_done <= p.rows_planned),
            Item::Tensor(t) => {
                crc = crc32c::crc32c_append(crc, &t.data);
                let floats = t.data.as_chunks().0.iter();
                let whole = tensors.entry(t.name.clone()).or_default();
                whole.extend(floats.map(|b| f32::from_le_bytes(*b)));
                shapes.insert(t.name, (t.axes, t.shape));
            }
            Item::Result(r) => result = Some(r),
            Item::Summary(s) => {
                assert_eq!((s.messages, s.crc32c), (messages, crc));
                summary = Some(s);
            }
        }
        messages += 1;
    }
    Ok(Swept {
        header: header.unwrap(),
        tensors,
        shapes,
        result: result.unwrap(),
        summary: summary.unwrap(),
    })
}
