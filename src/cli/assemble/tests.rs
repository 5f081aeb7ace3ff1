use super::*;

fn message(item: Item) -> CaptureResponse {
    CaptureResponse { item: Some(item) }
}

fn header(tensors: &[&str]) -> CaptureResponse {
    message(Item::Header(CaptureHeader {
        tensors: tensors.iter().map(|t| (*t).to_owned()).collect(),
        ..Default::default()
    }))
}

fn piece(name: &str, shape: &[u64], offset: u64, data: &[u8]) -> CaptureResponse {
    message(Item::Tensor(wire::Tensor {
        name: name.to_owned(),
        axes: vec!["pos".into(); shape.len()],
        dtype: wire::DType::F32.into(),
        shape: shape.to_vec(),
        offset,
        data: Bytes::copy_from_slice(data),
    }))
}

fn sparse(first_row: u64, counts: &[u32], indices: &[u32], values: &[f32]) -> CaptureResponse {
    let raw = |n: &[u32]| Bytes::from(n.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    message(Item::Sparse(SparseTensor {
        name: "s".into(),
        axes: vec!["query".into(), "key".into()],
        dtype: wire::DType::F32.into(),
        shape: vec![3, 4],
        first_row,
        counts: raw(counts),
        indices: raw(indices),
        values: Bytes::from(
            values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>(),
        ),
    }))
}

/// What an honest sender would close these messages with.
fn summary(messages: &[CaptureResponse]) -> CaptureResponse {
    let mut tally = Tally::default();
    for m in messages {
        tally.count(&payload(m));
    }
    message(Item::Summary(Summary {
        messages: tally.messages,
        bytes: tally.bytes,
        crc32c: tally.crc32c,
        ..Default::default()
    }))
}

/// Feeds all messages; the answer must come with the last and not before.
fn assemble(messages: Vec<CaptureResponse>) -> Result<Captured, Broken> {
    let mut assembler = Assembler::default();
    let last = messages.len() - 1;
    for (i, m) in messages.into_iter().enumerate() {
        if let Some(captured) = assembler.take(m)? {
            assert_eq!(i, last, "the answer ends with its summary");
            return Ok(captured);
        }
    }
    broken("no summary")
}

fn closed(mut messages: Vec<CaptureResponse>) -> Vec<CaptureResponse> {
    let end = summary(&messages);
    messages.push(end);
    messages
}

#[test]
fn pieces_join_to_the_tensor_that_was_cut() {
    let whole: Vec<u8> = (0u8..24).collect();
    let answer = assemble(closed(vec![
        header(&["a", "b"]),
        piece("a", &[2, 3], 0, &whole[..16]),
        piece("a", &[2, 3], 16, &whole[16..]),
        piece("b", &[], 0, &1.5f32.to_le_bytes()),
    ]))
    .unwrap();
    let Data::Dense(a) = &answer.tensors[0].data else {
        panic!("dense was sent");
    };
    assert_eq!(&a.bytes()[..], &whole[..]);
    assert_eq!(answer.tensors[0].shape(), [2, 3]);
    let Data::Dense(b) = &answer.tensors[1].data else {
        panic!("dense was sent");
    };
    assert_eq!(
        b.to_f32().unwrap()[..],
        [1.5],
        "a single number has no axes"
    );
}

#[test]
fn sparse_rows_join_in_their_order() {
    let answer = assemble(closed(vec![
        header(&["s"]),
        sparse(0, &[2], &[3, 0], &[0.6, 0.2]),
        sparse(1, &[0, 1], &[2], &[0.9]),
    ]))
    .unwrap();
    let Data::Sparse(s) = &answer.tensors[0].data else {
        panic!("sparse was sent");
    };
    assert_eq!(s.counts, [2, 0, 1]);
    assert_eq!(s.indices, [3, 0, 2]);
    assert_eq!(s.values.to_f32().unwrap()[..], [0.6, 0.2, 0.9]);
}

#[test]
fn an_answer_that_lost_or_changed_anything_is_refused() {
    let honest = closed(vec![
        header(&["a"]),
        piece("a", &[2], 0, &[1, 2, 3, 4]),
        piece("a", &[2], 4, &[5, 6, 7, 8]),
    ]);
    assert!(assemble(honest.clone()).is_ok());
    for lost in 0..honest.len() {
        let mut messages = honest.clone();
        messages.remove(lost);
        assert!(assemble(messages).is_err(), "without message {lost}");
    }
    let mut turned = honest.clone();
    turned.swap(1, 2);
    assert!(assemble(turned).is_err(), "pieces out of order");
    let mut doubled = honest.clone();
    doubled.insert(1, honest[0].clone());
    assert!(assemble(doubled).is_err(), "two headers");
    let mut flipped = honest;
    flipped[1] = piece("a", &[2], 0, &[1, 2, 3, 5]);
    let error = assemble(flipped).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
}

#[test]
fn tensors_other_than_the_announced_are_refused() {
    let error = assemble(closed(vec![
        header(&["a", "b"]),
        piece("a", &[1], 0, &[0; 4]),
    ]))
    .unwrap_err();
    assert!(
        error.to_string().contains("announces [a, b], [a] came"),
        "{error}"
    );
}

#[test]
fn claims_cost_no_memory_and_impossible_ones_are_errors() {
    let mut assembler = Assembler::default();
    assembler.take(header(&["a"])).unwrap();
    let huge = piece("a", &[u64::MAX, u64::MAX], 0, &[0; 8]);
    assert!(
        assembler.take(huge).unwrap().is_none(),
        "waits for the rest"
    );
    assert!(
        assembler
            .take(summary(&[]))
            .unwrap_err()
            .to_string()
            .contains("incomplete")
    );
    for (shape, bytes) in [(vec![1], vec![0; 8]), (vec![2], vec![])] {
        let mut assembler = Assembler::default();
        assembler.take(header(&["a"])).unwrap();
        assert!(assembler.take(piece("a", &shape, 0, &bytes)).is_err());
    }
}

#[test]
fn sparse_entries_outside_of_the_tensor_are_refused() {
    for (counts, indices) in [
        (vec![1, 0, 0], vec![4]),
        (vec![2, 0, 0], vec![1]),
        (vec![1, 0, 0, 0], vec![1]),
    ] {
        let values = vec![0.5; indices.len()];
        let messages = closed(vec![header(&["s"]), sparse(0, &counts, &indices, &values)]);
        assert!(assemble(messages).is_err(), "{counts:?} {indices:?}");
    }
}
