use proptest::prelude::*;

use super::*;
use crate::engine::testing;

fn named(name: &str, shape: &[usize], values: &[i64]) -> NamedTensor {
    NamedTensor {
        name: name.into(),
        tensor: Tensor::from_i64(shape.to_vec(), values).unwrap(),
    }
}

fn group(shape: [usize; 2], ids: &[i64]) -> RowGroup {
    RowGroup {
        inputs: vec![named("input_ids", &shape, ids)],
        rows: shape[0],
        length: None,
        picks: Vec::new(),
    }
}

fn written(planned: &Planned<'_>) -> Vec<i64> {
    let mut bytes = vec![0xee; planned.bytes()];
    planned.write(&mut bytes);
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b))
        .collect()
}

fn whole(rows: &Rows) -> Slice<'_> {
    Slice {
        rows,
        range: 0..rows.rows,
    }
}

fn message(result: Result<Rows, EngineError>) -> String {
    let error = result.unwrap_err();
    let EngineError::InvalidArgument { field, message } = error else {
        panic!("{error:?}");
    };
    format!("{field}: {message}")
}

#[test]
fn what_is_left_out_is_filled_in_by_its_role() {
    let mut info = testing::info();
    for (name, role, dtype) in [
        ("token_type_ids", InputRole::TypeIds, DType::I64),
        ("position_ids", InputRole::PositionIds, DType::I32),
        ("mask", InputRole::AttentionMask, DType::F32),
    ] {
        info.inputs.push(InputInfo {
            name: name.into(),
            dtype,
            role,
            ..info.inputs[0].clone()
        });
    }
    let rows = ModelInputs::new(&info)
        .check(&group([2, 3], &[1, 2, 3, 4, 5, 6]), "g")
        .unwrap();
    assert_eq!(rows.length, 3);
    assert_eq!(
        rows.tensors[1],
        Tensor::from_i64(vec![2, 3], &[1; 6]).unwrap()
    );
    assert_eq!(
        rows.tensors[2],
        Tensor::from_i64(vec![2, 3], &[0; 6]).unwrap()
    );
    let positions: Vec<u8> = [0i32, 1, 2, 0, 1, 2]
        .iter()
        .flat_map(|p| p.to_le_bytes())
        .collect();
    assert_eq!(rows.tensors[3].bytes()[..], positions[..]);
    assert_eq!(
        rows.tensors[4],
        Tensor::from_f32(vec![2, 3], &[1.0; 6]).unwrap()
    );
}

#[test]
fn what_only_the_caller_knows_is_missed_by_name() {
    let mut info = testing::info();
    info.inputs.push(InputInfo {
        name: "pixels".into(),
        role: InputRole::Pixels,
        ..info.inputs[0].clone()
    });
    let inputs = ModelInputs::new(&info);
    assert_eq!(
        message(inputs.check(&group([1, 1], &[1]), "g")),
        "g.pixels: input \"pixels\" (i64) is missing and cannot be filled in: give it as a tensor, beside the other inputs"
    );
    let twice = RowGroup {
        inputs: vec![
            named("input_ids", &[1, 1], &[1]),
            named("input_ids", &[1, 1], &[1]),
        ],
        ..group([1, 1], &[1])
    };
    assert_eq!(
        message(inputs.check(&twice, "g")),
        "g.input_ids: input \"input_ids\" is given twice"
    );
    let unknown = RowGroup {
        inputs: vec![named("inputs", &[1, 1], &[1])],
        ..group([1, 1], &[1])
    };
    assert!(
        message(inputs.check(&unknown, "g"))
            .contains("it has \"input_ids\", \"attention_mask\", \"pixels\"")
    );
}

#[test]
fn shapes_dtypes_and_ids_are_checked() {
    let inputs = ModelInputs::new(&testing::info());
    let wrong = |tensor: Tensor, rows: usize| {
        let group = RowGroup {
            inputs: vec![NamedTensor {
                name: "input_ids".into(),
                tensor,
            }],
            rows,
            ..RowGroup::default()
        };
        message(inputs.check(&group, "g"))
    };
    let i64s = |shape: &[usize], values: &[i64]| Tensor::from_i64(shape.to_vec(), values).unwrap();
    assert!(
        wrong(Tensor::from_f32(vec![1, 1], &[1.0]).unwrap(), 1).contains("is i64, f32 was given")
    );
    assert!(wrong(i64s(&[2], &[1, 2]), 2).contains("has 2 axes"));
    assert!(wrong(i64s(&[2, 1], &[1, 2]), 3).contains("2 along axis 0 where 3 belong"));
    assert!(wrong(i64s(&[1, 0], &[]), 1).contains("empty along axis 1"));
    assert!(
        wrong(i64s(&[1, 2], &[1, 100]), 1)
            .contains("token id 100 is outside of the vocabulary of 100")
    );
    assert!(wrong(i64s(&[1, 2], &[i64::MIN, 1]), 1).contains("outside"));
    assert!(wrong(i64s(&[1, 513], &[1; 513]), 1).contains("at most 512 tokens, 513 were given"));
    let uneven = RowGroup {
        inputs: vec![
            named("input_ids", &[1, 2], &[1, 2]),
            named("attention_mask", &[1, 3], &[1; 3]),
        ],
        ..group([1, 2], &[1, 2])
    };
    assert!(message(inputs.check(&uneven, "g")).contains("3 along axis 1 where 2 belong"));
}

#[test]
fn rows_of_a_run_are_padded_to_the_longest() {
    let mut info = testing::info();
    info.tokenizer = Some(crate::ipc::info::TokenizerInfo {
        vocab: 100,
        max_tokens: 512,
        pad_id: 9,
        mask_id: None,
        unk_id: None,
        special_ids: Vec::new(),
    });
    let inputs = ModelInputs::new(&info);
    let short = inputs.check(&group([2, 2], &[1, 2, 3, 4]), "g").unwrap();
    let long = inputs.check(&group([1, 4], &[5, 6, 7, 8]), "g").unwrap();
    let slices = [
        Slice {
            rows: &short,
            range: 1..2,
        },
        whole(&long),
    ];
    let planned = inputs.assemble(&slices);
    assert_eq!(planned[0].shape, [2, 4]);
    assert_eq!(written(&planned[0]), [3, 4, 9, 9, 5, 6, 7, 8]);
    assert_eq!(written(&planned[1]), [1, 1, 0, 0, 1, 1, 1, 1]);
}

#[test]
fn fixed_batch_and_length_are_filled_up_or_refused() {
    let mut info = testing::info();
    info.fixed_batch = Some(3);
    info.fixed_length = Some(4);
    let inputs = ModelInputs::new(&info);
    let rows = inputs.check(&group([2, 2], &[1, 2, 3, 4]), "g").unwrap();
    assert_eq!(rows.cost, 4, "padding is paid for");
    let slices = [whole(&rows)];
    let planned = inputs.assemble(&slices);
    assert_eq!(planned[0].shape, [3, 4]);
    assert_eq!(
        written(&planned[0]),
        [1, 2, 0, 0, 3, 4, 0, 0, 3, 4, 0, 0],
        "the last row is repeated"
    );
    assert!(
        message(inputs.check(&group([1, 5], &[1; 5]), "g"))
            .contains("exactly 4 tokens (shorter rows are padded)")
    );
    info.pads = false;
    let inputs = ModelInputs::new(&info);
    assert!(message(inputs.check(&group([1, 3], &[1; 3]), "g")).contains("no mask to pad with"));
    assert!(inputs.check(&group([1, 4], &[1; 4]), "g").is_ok());
}

#[test]
fn an_input_without_batch_axis_keeps_its_group_alone() {
    let mut info = testing::info();
    info.inputs.push(InputInfo {
        name: "scale".into(),
        dtype: DType::I64,
        dims: vec![Some(2)],
        axes: vec![Axis::Other("constant".into())],
        role: InputRole::Other,
    });
    let inputs = ModelInputs::new(&info);
    let mut given = group([2, 2], &[1, 2, 3, 4]);
    given.inputs.push(named("scale", &[2], &[7, 8]));
    let rows = inputs.check(&given, "g").unwrap();
    assert!(rows.alone);
    let slices = [whole(&rows)];
    let planned = inputs.assemble(&slices);
    assert_eq!(
        (planned[2].shape.as_slice(), written(&planned[2])),
        (&[2][..], vec![7, 8])
    );
}

#[test]
fn rows_of_other_extents_do_not_meet() {
    let mut info = testing::info();
    info.inputs = vec![InputInfo {
        name: "pixels".into(),
        dtype: DType::I64,
        dims: vec![None, Some(3), None, None],
        axes: vec![
            Axis::Batch,
            Axis::Other("channel".into()),
            Axis::Other("height".into()),
            Axis::Other("width".into()),
        ],
        role: InputRole::Pixels,
    }];
    let inputs = ModelInputs::new(&info);
    let image = |side: usize| RowGroup {
        inputs: vec![named(
            "pixels",
            &[1, 3, side, side],
            &vec![1; 3 * side * side],
        )],
        rows: 1,
        ..RowGroup::default()
    };
    let signature = |side| inputs.check(&image(side), "g").unwrap().signature;
    assert_eq!(signature(2), signature(2));
    assert_ne!(signature(2), signature(4));
    assert_eq!(inputs.check(&image(2), "g").unwrap().length, 0);
}

proptest! {
    /// Cut to its length, every row of a padded run is what was given, and everything else is padding.
    #[test]
    fn padding_only_adds(lengths in prop::collection::vec((1usize..20, 1usize..4), 1..10)) {
        let inputs = ModelInputs::new(&testing::info());
        let groups: Vec<Rows> = lengths
            .iter()
            .map(|(length, rows)| {
                let ids: Vec<i64> = (0..(length * rows) as i64).map(|i| i % 99 + 1).collect();
                inputs.check(&group([*rows, *length], &ids), "g").unwrap()
            })
            .collect();
        let slices: Vec<Slice<'_>> = groups.iter().map(whole).collect();
        let planned = inputs.assemble(&slices);
        let longest = planned[0].shape[1];
        let ids = written(&planned[0]);
        let mut rows = ids.chunks(longest);
        for group in &groups {
            let given: Vec<i64> = group.tensors[0].bytes().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
            for row in given.chunks(group.length) {
                let padded = rows.next().unwrap();
                prop_assert_eq!(&padded[..group.length], row);
                prop_assert!(padded[group.length..].iter().all(|id| *id == 0));
            }
        }
        prop_assert!(rows.next().is_none());
        let mask: i64 = written(&planned[1]).iter().sum();
        prop_assert_eq!(mask as usize, groups.iter().map(|g| g.rows * g.length).sum::<usize>());
    }
}

fn moving(points: &[&str]) -> ModelInputs {
    let info = testing::info();
    let spec = VariantSpec {
        intervene: points.iter().map(|p| (*p).to_owned()).collect(),
        ..VariantSpec::rewritten()
    };
    ModelInputs::new(&info).of_variant(&spec, &info).unwrap()
}

fn floats(name: &str, shape: &[usize], values: &[f32]) -> NamedTensor {
    NamedTensor {
        name: name.into(),
        tensor: Tensor::from_f32(shape.to_vec(), values).unwrap(),
    }
}

fn written_floats(planned: &Planned<'_>) -> Vec<f32> {
    let mut bytes = vec![0xee; planned.bytes()];
    planned.write(&mut bytes);
    let floats = bytes.as_chunks().0.iter();
    floats.map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn what_a_run_begins_at_must_be_given_whole() {
    let info = testing::info();
    let spec = VariantSpec {
        enter: ["hook_embed".to_owned()].into(),
        ..VariantSpec::rewritten()
    };
    let inputs = ModelInputs::new(&info).of_variant(&spec, &info).unwrap();
    let with = |shape: &[usize]| {
        let mut row = group([1, 2], &[5, 6]);
        let values = vec![0.5; shape.iter().product()];
        row.inputs.push(floats("state:hook_embed", shape, &values));
        inputs.check(&row, "g")
    };
    with(&[1, 2, 16]).unwrap();
    for shape in [[1, 1, 16], [1, 2, 1], [1, 3, 16]] {
        assert!(with(&shape).is_err(), "{shape:?}");
    }
    assert!(inputs.check(&group([1, 2], &[5, 6]), "g").is_err());
}

#[test]
fn what_moves_a_hook_point_broadcasts_is_padded_and_moves_nothing_when_left_out() {
    let inputs = moving(&["hook_embed"]);
    let full: Vec<f32> = (0..2 * 16).map(|i| i as f32).collect();
    let mut moved = group([1, 2], &[5, 6]);
    moved
        .inputs
        .push(floats("shift:hook_embed", &[1, 2, 16], &full));
    let moved = inputs.check(&moved, "g").unwrap();
    let mut longer = group([1, 3], &[7, 8, 9]);
    let whole_shift: Vec<f32> = vec![0.5; 3 * 16];
    longer
        .inputs
        .push(floats("shift:hook_embed", &[1, 3, 16], &whole_shift));
    let longer = inputs.check(&longer, "g").unwrap();
    assert_eq!(moved.signature, longer.signature, "they may share a run");
    let slices = [whole(&moved), whole(&longer)];
    let planned = inputs.assemble(&slices);
    let find = |name: &str| planned.iter().find(|p| p.name == name).unwrap();
    let (scale, shift) = (find("scale:hook_embed"), find("shift:hook_embed"));
    assert_eq!(
        (&scale.shape[..], &shift.shape[..]),
        (&[2, 1, 1][..], &[2, 3, 16][..])
    );
    assert_eq!(written_floats(scale), [1.0, 1.0]);
    let shifts = written_floats(shift);
    assert_eq!(shifts[..32], full[..]);
    assert!(
        shifts[32..48].iter().all(|v| *v == 0.0),
        "padding is not shifted"
    );
    assert_eq!(shifts[48..], whole_shift[..]);
}

#[test]
fn a_row_that_is_shifted_as_a_whole_shares_no_run_with_one_that_is_shifted_by_token() {
    let inputs = moving(&["hook_embed"]);
    let shifted = |shape: [usize; 3]| {
        let mut group = group([1, 2], &[5, 6]);
        let values = vec![1.0; shape.iter().product()];
        group
            .inputs
            .push(floats("shift:hook_embed", &shape, &values));
        inputs.check(&group, "g")
    };
    let (all, each) = (shifted([1, 1, 16]).unwrap(), shifted([1, 2, 16]).unwrap());
    assert_ne!(all.signature, each.signature);
    let wrong = message(shifted([1, 3, 16]));
    assert!(
        wrong.starts_with("g.shift:hook_embed: ") && wrong.contains("axis 1"),
        "{wrong}"
    );
    let wrong = message(shifted([2, 2, 16]));
    assert!(wrong.contains("axis 0"), "{wrong}");
    let wrong = message(shifted([1, 2, 15]));
    assert!(wrong.contains("axis 2"), "{wrong}");
}

#[test]
fn an_objective_must_be_given_and_its_terms_count() {
    use crate::ipc::spec::{GradientSpec, Quantity, Rules};
    let info = testing::info();
    let spec = VariantSpec {
        gradient: Some(GradientSpec {
            rules: Rules::Gradient,
            at: None,
            of: Quantity::Logit,
            points: [("hook_embed".to_owned(), Reduction::Dot)].into(),
        }),
        ..VariantSpec::rewritten()
    };
    let inputs = ModelInputs::new(&info).of_variant(&spec, &info).unwrap();
    let missing = message(inputs.check(&group([1, 2], &[5, 6]), "g"));
    assert!(
        missing.contains("target:label") && missing.contains("give it"),
        "{missing}"
    );
    let terms = |n: usize| {
        let mut group = group([1, 2], &[5, 6]);
        group
            .inputs
            .push(named("target:label", &[1, n], &vec![0; n]));
        group
            .inputs
            .push(floats("target:weight", &[1, n], &vec![1.0; n]));
        group
            .inputs
            .push(floats("direction:hook_embed", &[1, 1, 1], &[1.0]));
        inputs.check(&group, "g").unwrap()
    };
    assert_ne!(terms(1).signature, terms(2).signature);
    let unknown = VariantSpec {
        intervene: ["value:x".to_owned()].into(),
        ..VariantSpec::rewritten()
    };
    let refused = ModelInputs::new(&info).of_variant(&unknown, &info);
    assert!(matches!(
        refused,
        Err(EngineError::FailedPrecondition { .. })
    ));
}
