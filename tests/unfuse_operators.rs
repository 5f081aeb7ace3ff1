//! Every fused operator in every form, run in ONNX Runtime as it is and unfused: the same numbers.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/one_node.rs"]
mod one_node;
mod support;

use introspectd::{
    anatomy::normalise::Unfused,
    onnx::Attribute,
    tensor::{DType, Tensor},
};
use one_node::{Case, Fed, In, REWRITTEN, RUNTIME, Seeded, Weight, bools, ints, longs, same};

/// Sets between which operators changed their form: axes as inputs (13, 18), norms (17, 23), Gelu (20).
const OPSETS: [u8; 6] = [11, 13, 17, 18, 20, 23];

fn f(seed: u64, shape: &[usize]) -> Tensor {
    Seeded::new(seed).floats(shape)
}

fn f16(seed: u64, shape: &[usize]) -> Tensor {
    f(seed, shape).cast_float(DType::F16).unwrap()
}

/// One softmax, over a sum or scaled scores, read by one product.
fn is_attention(done: &Unfused) {
    let graph = &done.model.graph;
    let softmaxes: Vec<_> = graph.nodes().filter(|(_, n)| n.is("Softmax")).collect();
    assert_eq!(softmaxes.len(), 1);
    assert!(
        done.replaced[0]
            .with
            .iter()
            .filter(|op| *op == "MatMul")
            .count()
            >= 2
    );
}

mod standard_attention {
    use super::*;

    fn heads(q: usize, kv: usize, rows: usize, keys: usize) -> Vec<In> {
        vec![
            Fed(f(1, &[2, q, rows, 8])),
            Fed(f(2, &[2, kv, keys, 8])),
            Fed(f(3, &[2, kv, keys, 6])),
        ]
    }

    fn case(inputs: Vec<In>) -> Case {
        Case::new("", "Attention", inputs)
    }

    #[test]
    fn four_axes_with_the_scale_of_the_heads_width() {
        for opset in [23, 24, 25] {
            is_attention(&case(heads(2, 2, 3, 5)).holds(opset));
        }
        is_attention(&case(heads(2, 2, 3, 5)).float("scale", 0.3).holds(23));
    }

    #[test]
    fn grouped_queries_whose_number_only_a_run_tells() {
        is_attention(&case(heads(4, 2, 3, 5)).holds(23));
        is_attention(&case(heads(4, 1, 3, 5)).holds(23));
    }

    #[test]
    fn three_axes_with_heads_by_attribute() {
        let inputs = vec![
            Fed(f(1, &[2, 3, 32])),
            Fed(f(2, &[2, 5, 16])),
            Fed(f(3, &[2, 5, 12])),
        ];
        let grouped = case(inputs).int("q_num_heads", 4).int("kv_num_heads", 2);
        is_attention(&grouped.holds(23));
        is_attention(&grouped.int("is_causal", 1).outputs(&[true; 4]).holds(23));
    }

    #[test]
    fn masks_of_booleans_and_floats_of_every_shape() {
        for shape in [&[3, 5][..], &[2, 3, 5], &[2, 1, 3, 5], &[1, 2, 3, 5]] {
            let mut inputs = heads(2, 2, 3, 5);
            inputs.push(Fed(f(4, shape)));
            case(inputs.clone()).holds(23);
            // The first query may attend to no key: it reads zeros.
            let n = shape.iter().product();
            let keep: Vec<u8> = (0..n).map(|i| u8::from(i >= 5 && i % 3 != 0)).collect();
            inputs[3] = Fed(bools(shape, &keep));
            is_attention(&case(inputs.clone()).holds(23));
            case(inputs)
                .int("is_causal", 1)
                .outputs(&[true, false, false, true])
                .holds(23);
        }
    }

    #[test]
    fn a_float_mask_that_leaves_no_key_reads_zeros() {
        let mut mask = vec![0.0; 15];
        mask[..5].fill(f32::NEG_INFINITY);
        let mut inputs = heads(2, 2, 3, 5);
        inputs.push(Fed(Tensor::from_f32(vec![3, 5], &mask).unwrap()));
        case(inputs).holds(23);
    }

    #[test]
    fn every_mode_of_the_scores_with_soft_cap_and_mask() {
        for mode in 0..4 {
            let mut inputs = heads(2, 2, 3, 5);
            inputs.push(Fed(f(4, &[3, 5])));
            case(inputs)
                .int("qk_matmul_output_mode", mode)
                .float("softcap", 2.0)
                .int("is_causal", 1)
                .outputs(&[true, false, false, true])
                .holds(23);
        }
    }

    #[test]
    fn past_and_present() {
        let mut inputs = heads(4, 2, 3, 3);
        inputs.extend([In::None, Fed(f(5, &[2, 2, 4, 8])), Fed(f(6, &[2, 2, 4, 6]))]);
        let past = case(inputs).outputs(&[true, true, true]);
        past.holds(23);
        is_attention(&past.int("is_causal", 1).holds(23));
    }

    #[test]
    fn a_cache_from_outside_counts_its_valid_keys() {
        for causal in [0, 1] {
            let mut inputs = heads(2, 2, 2, 5);
            inputs.extend([In::None, In::None, In::None, Fed(longs(&[2], &[4, 1]))]);
            case(inputs).int("is_causal", causal).holds(24);
        }
    }

    #[test]
    fn windows_around_a_query() {
        for (left, right) in [(1, 1), (2, -1), (-1, 0)] {
            case(heads(2, 2, 5, 5))
                .int("left_window_size", left)
                .int("right_window_size", right)
                .holds(25);
        }
    }

    #[test]
    fn a_softmax_in_more_precision_than_its_scores() {
        let inputs = vec![
            Fed(f16(1, &[2, 2, 3, 8])),
            Fed(f16(2, &[2, 2, 5, 8])),
            Fed(f16(3, &[2, 2, 5, 8])),
        ];
        let (model, fed) = case(inputs.clone()).int("softmax_precision", 1).model(23);
        let done = introspectd::anatomy::normalise::unfuse(&model).unwrap();
        let got = support::run(&done.model, &fed).unwrap();
        let wide = inputs.iter().map(|i| match i {
            Fed(t) => Fed(t.cast_float(DType::F32).unwrap()),
            other => other.clone(),
        });
        let expected = case(wide.collect())
            .runs(23)
            .cast_float(DType::F16)
            .unwrap();
        // Half precision in between: eleven bits.
        same("half", got.values().next().unwrap(), &expected, 2e-3);
    }

    #[test]
    fn what_cannot_be_known_is_named() {
        let five = case(vec![
            Fed(f(1, &[1, 1, 2, 3, 8])),
            Fed(f(2, &[2, 8])),
            Fed(f(3, &[2, 8])),
        ]);
        assert!(five.stays(23).contains("5 axes"));
        let no_heads = case(vec![Fed(f(1, &[2, 3, 8])); 3]);
        assert!(no_heads.stays(23).contains("q_num_heads"));
        let uneven = case(vec![Fed(f(1, &[2, 3, 24])); 3])
            .int("q_num_heads", 3)
            .int("kv_num_heads", 2);
        assert!(uneven.stays(23).contains("cannot share"));
    }
}

mod fused_attention {
    use super::*;

    const B: usize = 2;
    const S: usize = 4;

    fn case(rest: Vec<In>) -> Case {
        let mut inputs = vec![
            Fed(f(1, &[B, S, 16])),
            Weight(f(2, &[16, 48])),
            Weight(f(3, &[48])),
        ];
        inputs.extend(rest);
        Case::new(RUNTIME, "Attention", inputs).int("num_heads", 2)
    }

    #[test]
    fn bare_in_every_operator_set() {
        for opset in OPSETS {
            is_attention(&case(vec![]).holds(opset));
            is_attention(&case(vec![]).int("unidirectional", 1).holds(opset));
        }
        case(vec![]).float("scale", 0.2).holds(17);
        let mut unbiased = case(vec![]);
        unbiased.inputs[2] = In::None;
        unbiased.holds(17);
    }

    #[test]
    fn masks_by_key_and_by_query() {
        let keys = ints(&[B, S], &[1, 1, 1, 0, 1, 1, 0, 0]);
        let pairs: Vec<i32> = (0..B * S * S).map(|i| i32::from(i % 5 != 2)).collect();
        for mask in [keys, ints(&[B, S, S], &pairs)] {
            for opset in OPSETS {
                is_attention(&case(vec![Fed(mask.clone())]).holds(opset));
            }
            let filter = case(vec![Fed(mask)]).float("mask_filter_value", -3.0);
            filter.holds(17);
            filter.int("unidirectional", 1).holds(17);
        }
    }

    #[test]
    fn masks_by_length_with_and_without_starts() {
        let forms = [
            ints(&[2], &[3, 2]),
            ints(&[4], &[3, 4, 1, 0]),
            ints(&[8], &[3, 2, 0, 3, 5, 0, 3, 5]),
        ];
        for mask in forms {
            for opset in OPSETS {
                case(vec![Fed(mask.clone())]).holds(opset);
            }
        }
    }

    #[test]
    fn a_term_added_to_the_scores() {
        let bias = f(4, &[1, 2, S, S]);
        let keys = ints(&[B, S], &[1, 1, 1, 0, 1, 1, 0, 0]);
        case(vec![In::None, In::None, Fed(bias.clone())]).holds(17);
        case(vec![Fed(keys), In::None, Fed(bias)])
            .int("unidirectional", 1)
            .holds(17);
    }

    #[test]
    fn past_and_present_in_one_tensor() {
        let past = Fed(f(5, &[2, B, 2, 3, 8]));
        for causal in [0, 1] {
            let c = case(vec![In::None, past.clone()]).outputs(&[true, true]);
            is_attention(&c.int("unidirectional", causal).holds(17));
        }
        case(vec![]).outputs(&[true, true]).holds(13);
    }

    #[test]
    fn values_of_another_width() {
        let inputs = vec![
            Fed(f(1, &[B, S, 16])),
            Weight(f(2, &[16, 40])),
            Weight(f(3, &[40])),
        ];
        let case = Case::new(RUNTIME, "Attention", inputs).int("num_heads", 2);
        case.with(Attribute::ints("qkv_hidden_sizes", &[16, 16, 8]))
            .holds(17);
    }

    #[test]
    fn what_cannot_be_undone_is_named() {
        assert!(
            case(vec![])
                .int("do_rotary", 1)
                .stays(17)
                .contains("rotates")
        );
        assert!(
            case(vec![])
                .int("past_present_share_buffer", 1)
                .stays(17)
                .contains("buffer")
        );
        let megatron = case(vec![Fed(ints(&[1, 1, S, S], &[1; 16]))]);
        assert!(megatron.stays(17).contains("4 axes"));
        let mut unknown = case(vec![]);
        unknown.inputs[1] = Fed(f(2, &[16, 48]));
        unknown.inputs[2] = Fed(f(3, &[48]));
        assert!(unknown.stays(17).contains("widths"));
        assert!(case(vec![]).stays(10).contains("older than 11"));
    }
}

mod multi_head_attention {
    use super::*;

    const B: usize = 2;
    const S: usize = 4;
    const T: usize = 6;

    fn case(inputs: Vec<In>) -> Case {
        Case::new(RUNTIME, "MultiHeadAttention", inputs).int("num_heads", 2)
    }

    fn rows() -> Vec<In> {
        vec![
            Fed(f(1, &[B, S, 16])),
            Fed(f(2, &[B, T, 16])),
            Fed(f(3, &[B, T, 12])),
        ]
    }

    #[test]
    fn rows_with_and_without_bias() {
        for opset in OPSETS {
            is_attention(&case(rows()).holds(opset));
        }
        let mut biased = rows();
        biased.push(Weight(f(4, &[44])));
        is_attention(&case(biased).holds(17));
    }

    #[test]
    fn masks_in_every_form() {
        let keys = [1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0];
        let pairs: Vec<i32> = (0..B * S * T).map(|i| i32::from(i % 5 != 2)).collect();
        let forms = [
            ints(&[B, T], &keys),
            ints(&[B, S, T], &pairs),
            ints(&[2], &[3, 5]),
            ints(&[8], &[3, 5, 0, 4, 8, 0, 3, 8]),
        ];
        for mask in forms {
            for opset in [13, 20] {
                let mut inputs = rows();
                inputs.extend([In::None, Fed(mask.clone()), Fed(f(5, &[B, 1, S, T]))]);
                case(inputs).float("mask_filter_value", -4.0).holds(opset);
            }
        }
    }

    #[test]
    fn causal_with_past_and_present() {
        let mut inputs = rows();
        inputs[1] = Fed(f(2, &[B, S, 16]));
        inputs[2] = Fed(f(3, &[B, S, 16]));
        is_attention(&case(inputs.clone()).int("unidirectional", 1).holds(17));
        inputs.extend([
            Weight(f(4, &[48])),
            Fed(ints(
                &[B, S + 3],
                &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            )),
            In::None,
            Fed(f(6, &[B, 2, 3, 8])),
            Fed(f(7, &[B, 2, 3, 8])),
        ]);
        for causal in [0, 1] {
            let past = case(inputs.clone()).int("unidirectional", causal);
            is_attention(&past.outputs(&[true; 3]).holds(17));
        }
    }

    #[test]
    fn keys_and_values_in_heads() {
        let heads = [Fed(f(2, &[B, 2, T, 8])), Fed(f(3, &[B, 2, T, 8]))];
        let mut inputs = vec![Fed(f(1, &[B, S, 16]))];
        inputs.extend(heads);
        is_attention(&case(inputs.clone()).holds(17));
        inputs.push(Weight(f(4, &[48])));
        is_attention(&case(inputs).holds(17));
    }

    /// Packed forms have no kernel on this processor: they must equal the form that has one.
    #[test]
    fn packed_rows_equal_separate_ones() {
        let parts = [f(1, &[B, S, 16]), f(2, &[B, S, 16]), f(3, &[B, S, 16])];
        let bias = Weight(f(4, &[48]));
        let packed = |of: &[Tensor]| {
            let mut values = Vec::new();
            for row in 0..B * S {
                for head in 0..2 {
                    for part in of {
                        let from = row * 16 + head * 8;
                        values.extend_from_slice(&part.to_f32().unwrap()[from..from + 8]);
                    }
                }
            }
            Fed(Tensor::from_f32(vec![B, S, 2, of.len(), 8], &values).unwrap())
        };
        let [q, k, v] = parts.clone().map(Fed);
        let separate = case(vec![q.clone(), k, v, bias.clone()]);
        separate.holds(17);
        let expected = separate.runs(17);
        let all = case(vec![packed(&parts), In::None, In::None, bias.clone()]).runs(17);
        same("packed query, key and value", &expected, &all, REWRITTEN);
        let pair = case(vec![q, packed(&parts[1..]), In::None, bias]).runs(17);
        same("packed key and value", &expected, &pair, REWRITTEN);
    }

    #[test]
    fn what_cannot_be_undone_is_named() {
        let mut inputs = rows();
        inputs.extend([
            In::None,
            In::None,
            In::None,
            In::None,
            In::None,
            Fed(ints(&[1], &[0])),
        ]);
        assert!(case(inputs).stays(17).contains("shared past"));
        assert!(
            Case::new(RUNTIME, "MultiHeadAttention", rows())
                .stays(17)
                .contains("num_heads")
        );
    }
}

mod grouped_query_attention {
    use super::*;

    /// Query heads, key heads, width of a head.
    const H: usize = 4;
    const K: usize = 2;
    const D: usize = 16;

    struct Form {
        rows: usize,
        length: usize,
        capacity: usize,
        total: i32,
        last: Vec<i32>,
    }

    fn prompt() -> Form {
        Form {
            rows: 2,
            length: 4,
            capacity: 0,
            total: 4,
            last: vec![3, 3],
        }
    }

    fn step() -> Form {
        Form {
            rows: 2,
            length: 1,
            capacity: 5,
            total: 6,
            last: vec![5, 5],
        }
    }

    fn case(form: &Form, rest: Vec<In>) -> Case {
        let (b, s) = (form.rows, form.length);
        let mut inputs = vec![
            Fed(f(1, &[b, s, H * D])),
            Fed(f(2, &[b, s, K * D])),
            Fed(f(3, &[b, s, K * D])),
            Fed(f(4, &[b, K, form.capacity, D])),
            Fed(f(5, &[b, K, form.capacity, D])),
            Fed(ints(&[b], &form.last)),
            Fed(ints(&[], &[form.total])),
        ];
        inputs.extend(rest);
        Case::new(RUNTIME, "GroupQueryAttention", inputs)
            .int("num_heads", H as i64)
            .int("kv_num_heads", K as i64)
            .outputs(&[true; 3])
    }

    fn tables() -> [In; 2] {
        let angles = f(6, &[20, D / 2]);
        let of = |g: fn(f32) -> f32| {
            let values: Vec<f32> = angles.to_f32().unwrap().iter().map(|a| g(*a)).collect();
            Weight(Tensor::from_f32(vec![20, D / 2], &values).unwrap())
        };
        [of(f32::cos), of(f32::sin)]
    }

    #[test]
    fn prompt_and_step_in_every_operator_set() {
        for opset in OPSETS {
            is_attention(&case(&prompt(), vec![]).holds(opset));
            is_attention(&case(&step(), vec![]).holds(opset));
        }
        case(&prompt(), vec![]).float("scale", 0.3).holds(17);
    }

    #[test]
    fn rotary_positions_from_the_cache_or_fed() {
        for interleaved in [0, 1] {
            for form in [prompt(), step()] {
                let rotary = |rest: Vec<In>| {
                    let mut all = tables().to_vec();
                    all.extend(rest);
                    case(&form, all)
                        .int("do_rotary", 1)
                        .int("rotary_interleaved", interleaved)
                };
                is_attention(&rotary(vec![]).holds(17));
                let places: Vec<i64> = (0..form.rows * form.length)
                    .map(|i| (i * 3 % 7) as i64)
                    .collect();
                rotary(vec![Fed(longs(&[form.rows, form.length], &places))]).holds(17);
            }
        }
        let chunk = Form {
            rows: 1,
            length: 3,
            capacity: 5,
            total: 8,
            last: vec![7],
        };
        case(&chunk, tables().to_vec())
            .int("do_rotary", 1)
            .holds(17);
    }

    #[test]
    fn rows_of_different_length() {
        // Steps: the cache of the second row holds three tokens only. The present differs in what is not valid.
        let ragged = Form {
            last: vec![5, 3],
            ..step()
        };
        let mut all = tables().to_vec();
        all.push(In::None);
        // Without its present the kernel of ONNX Runtime 1.32 computes steps from memory that nobody wrote, so that is read too.
        case(&ragged, all)
            .int("do_rotary", 1)
            .first_equal()
            .holds(17);
    }

    #[test]
    fn a_cache_with_room_to_spare_is_left_out_of_a_prompt() {
        let roomy = Form {
            capacity: 10,
            ..prompt()
        };
        case(&roomy, vec![]).outputs(&[true]).holds(17);
    }

    #[test]
    fn window_cap_bias_and_no_order_of_time() {
        let long = Form {
            length: 6,
            total: 6,
            last: vec![5, 5],
            ..prompt()
        };
        is_attention(&case(&long, vec![]).int("local_window_size", 2).holds(17));
        case(&step(), vec![]).int("local_window_size", 2).holds(17);
        let none = [In::None, In::None, In::None];
        let mut all = none.to_vec();
        all.push(Fed(f(8, &[1, H, 4, 4])));
        is_attention(&case(&prompt(), all).float("softcap", 1.5).holds(17));
        let padded = Form {
            last: vec![3, 1],
            ..prompt()
        };
        case(&padded, vec![]).int("causal", 0).holds(17);
        case(&step(), vec![]).int("causal", 0).holds(17);
    }

    #[test]
    fn packed_projections() {
        let mut packed = case(&prompt(), tables().to_vec()).int("do_rotary", 1);
        packed.inputs[0] = Fed(f(1, &[2, 4, (H + 2 * K) * D]));
        packed.inputs[1] = In::None;
        packed.inputs[2] = In::None;
        is_attention(&packed.holds(17));
    }

    #[test]
    fn without_a_cache() {
        let mut bare = case(&prompt(), vec![]);
        bare.inputs[3] = In::None;
        bare.inputs[4] = In::None;
        bare.holds(17);
    }

    #[test]
    fn what_cannot_be_undone_is_named() {
        let says = |c: Case, what: &str| assert!(c.stays(17).contains(what), "{}", c.stays(17));
        says(case(&prompt(), vec![]).int("smooth_softmax", 1), "sink");
        says(
            case(&prompt(), vec![]).int("sliding_window_cache", 1),
            "window",
        );
        says(
            case(&prompt(), vec![]).with(Attribute::string("k_quant_type", "PER_TENSOR")),
            "quantised",
        );
        let mut sinks = vec![In::None; 4];
        sinks.push(Fed(f(9, &[H])));
        says(case(&prompt(), sinks), "sinks");
        says(case(&prompt(), vec![]).int("do_rotary", 1), "missing");
    }
}

mod embeddings_and_norms {
    use super::*;

    fn embedding(mask: In, places: In, segments: bool) -> Case {
        let ids = ints(&[2, 4], &[1, 2, 3, 0, 4, 5, 0, 0]);
        let kinds = ints(&[2, 4], &[0, 0, 1, 1, 0, 1, 1, 1]);
        let (kinds, table) = if segments {
            (Fed(kinds), Weight(f(3, &[2, 8])))
        } else {
            (In::None, In::None)
        };
        Case::new(
            RUNTIME,
            "EmbedLayerNormalization",
            vec![
                Fed(ids),
                kinds,
                Weight(f(1, &[7, 8])),
                Weight(f(2, &[9, 8])),
                table,
                Weight(f(4, &[8])),
                Weight(f(5, &[8])),
                mask,
                places,
            ],
        )
        .float("epsilon", 1e-5)
        .outputs(&[true; 3])
    }

    #[test]
    fn embedding_in_every_form() {
        let mask = Fed(ints(&[2, 4], &[1, 1, 0, 1, 1, 2, 0, 0]));
        for opset in OPSETS {
            embedding(mask.clone(), In::None, true).holds(opset);
            embedding(In::None, In::None, false).holds(opset);
        }
        embedding(In::None, Fed(ints(&[1, 4], &[3, 2, 1, 0])), true).holds(17);
        embedding(mask, Fed(ints(&[2, 4], &[3, 2, 1, 0, 4, 5, 6, 7])), true).holds(17);
    }

    #[test]
    fn norms_with_the_residual_sum() {
        let x = || {
            vec![
                Fed(f(1, &[2, 4, 8])),
                Fed(f(2, &[2, 4, 8])),
                Weight(f(3, &[8])),
            ]
        };
        let read = [true, false, false, true];
        for opset in OPSETS {
            for (beta, bias) in [(true, true), (true, false), (false, true), (false, false)] {
                let mut inputs = x();
                inputs.push(if beta { Weight(f(4, &[8])) } else { In::None });
                inputs.push(if bias { Weight(f(5, &[8])) } else { In::None });
                let layer = Case::new(RUNTIME, "SkipLayerNormalization", inputs);
                let done = layer.float("epsilon", 1e-5).outputs(&read).holds(opset);
                assert_eq!(
                    done.replaced[0]
                        .with
                        .iter()
                        .filter(|op| *op == "LayerNormalization")
                        .count()
                        == 1,
                    opset >= 17
                );
            }
            let mut inputs = x();
            inputs.push(Weight(f(5, &[8])));
            let rms = Case::new(RUNTIME, "SkipSimplifiedLayerNormalization", inputs);
            let done = rms.float("epsilon", 1e-5).outputs(&read).holds(opset);
            assert_eq!(
                done.replaced[0]
                    .with
                    .iter()
                    .filter(|op| *op == "RMSNormalization")
                    .count()
                    == 1,
                opset >= 23
            );
        }
        let mut wide = x();
        wide[1] = Fed(f(2, &[1, 4, 8]));
        Case::new(RUNTIME, "SkipLayerNormalization", wide).holds(17);
    }

    #[test]
    fn norms_alone() {
        let x = || vec![Fed(f(1, &[2, 4, 8])), Weight(f(3, &[8]))];
        for opset in OPSETS {
            for axis in [-1, 2] {
                Case::new("", "SimplifiedLayerNormalization", x())
                    .int("axis", axis)
                    .holds(opset);
            }
        }
        for opset in [11, 13, 14] {
            let mut inputs = x();
            Case::new("", "LayerNormalization", inputs.clone()).holds(opset);
            inputs.push(Weight(f(4, &[8])));
            Case::new("", "LayerNormalization", inputs).holds(opset);
        }
    }

    #[test]
    fn half_precision_keeps_its_dtype() {
        let inputs = |cast: fn(Tensor) -> Tensor| {
            vec![
                Fed(cast(f16(1, &[2, 4, 8]))),
                Fed(cast(f16(2, &[2, 4, 8]))),
                Weight(cast(f16(3, &[8]))),
            ]
        };
        for opset in OPSETS {
            for op in ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"] {
                let half = Case::new(RUNTIME, op, inputs(|t| t)).runs(opset);
                assert_eq!(half.dtype(), DType::F16);
                let full = Case::new(RUNTIME, op, inputs(|t| t.cast_float(DType::F32).unwrap()))
                    .runs(opset);
                // Eleven bits, over a sum and a norm.
                same(op, &half.cast_float(DType::F32).unwrap(), &full, 5e-3);
            }
        }
    }

    #[test]
    fn a_norm_over_several_axes_or_with_its_statistics_is_named() {
        let over_two = Case::new(
            "",
            "SimplifiedLayerNormalization",
            vec![Fed(f(1, &[2, 4, 8])), Weight(f(3, &[4, 8]))],
        );
        assert!(over_two.int("axis", 1).stays(17).contains("axis 1"));
        let inputs = vec![
            Fed(f(1, &[2, 4, 8])),
            Fed(f(2, &[2, 4, 8])),
            Weight(f(3, &[8])),
        ];
        let statistics =
            Case::new(RUNTIME, "SkipLayerNormalization", inputs).outputs(&[true, true]);
        assert!(statistics.stays(17).contains("statistics"));
        // The standard operator is not a fusion.
        let (model, _) = Case::new(
            "",
            "LayerNormalization",
            vec![Fed(f(1, &[2, 8])), Weight(f(3, &[8]))],
        )
        .model(17);
        let done = introspectd::anatomy::normalise::unfuse(&model).unwrap();
        assert_eq!((done.replaced, done.left), (vec![], vec![]));
    }

    #[test]
    fn rotary_positions_of_rows_and_heads() {
        let table = |seed| Weight(f(seed, &[10, 4]));
        let narrow = |seed| Weight(f(seed, &[10, 2]));
        let places = [longs(&[2, 4], &[0, 1, 2, 3, 3, 4, 5, 9]), longs(&[1], &[2])];
        for shape in [&[2, 4, 16][..], &[2, 2, 4, 8]] {
            for at in &places {
                for interleaved in [0, 1] {
                    for opset in [11, 17, 23] {
                        let whole = vec![Fed(f(1, shape)), Fed(at.clone()), table(2), table(3)];
                        Case::new(RUNTIME, "RotaryEmbedding", whole)
                            .int("interleaved", interleaved)
                            .holds(opset);
                        let part = vec![Fed(f(1, shape)), Fed(at.clone()), narrow(2), narrow(3)];
                        Case::new(RUNTIME, "RotaryEmbedding", part)
                            .int("interleaved", interleaved)
                            .int("num_heads", 2)
                            .int("rotary_embedding_dim", 4)
                            .holds(opset);
                    }
                }
            }
        }
        let inputs = || {
            vec![
                Fed(f(1, &[2, 4, 16])),
                Fed(places[0].clone()),
                table(2),
                table(3),
            ]
        };
        let packed = Case::new(RUNTIME, "RotaryEmbedding", inputs()).int("is_packed_batching", 1);
        assert!(packed.stays(17).contains("packed"));
        let scaled = Case::new(RUNTIME, "RotaryEmbedding", inputs()).float("scale", 2.0);
        assert!(scaled.stays(17).contains("scale"));
    }
}

mod perceptrons {
    use super::*;

    #[test]
    fn activations_with_and_without_bias() {
        let x = || Fed(f(1, &[2, 3, 8]));
        let bias = || Weight(f(2, &[8]));
        for opset in OPSETS {
            Case::new(RUNTIME, "Gelu", vec![x()]).holds(opset);
            Case::new(RUNTIME, "BiasGelu", vec![x(), bias()]).holds(opset);
            Case::new(RUNTIME, "FastGelu", vec![x()]).holds(opset);
            Case::new(RUNTIME, "FastGelu", vec![x(), bias()]).holds(opset);
            for alpha in [1.0, 1.702, 0.5] {
                Case::new(RUNTIME, "QuickGelu", vec![x()])
                    .float("alpha", alpha)
                    .holds(opset);
            }
        }
        Case::new(RUNTIME, "QuickGelu", vec![x()]).holds(17);
    }

    #[test]
    fn products_with_transposes_and_a_factor() {
        let flags = ["transA", "transB", "transBatchA", "transBatchB"];
        for set in 0..16u32 {
            let on = |at: u32| set >> at & 1 == 1;
            // Whatever the flags do, (2, 3, 4, 5) meets (2, 3, 5, 6).
            let shaped = |shape: [usize; 4], last: bool, batch: bool| {
                let [a, b, mut rows, mut columns] = shape;
                if last {
                    (rows, columns) = (columns, rows);
                }
                if batch {
                    vec![rows, a, b, columns]
                } else {
                    vec![a, b, rows, columns]
                }
            };
            let inputs = vec![
                Fed(f(1, &shaped([2, 3, 4, 5], on(0), on(2)))),
                Fed(f(2, &shaped([2, 3, 5, 6], on(1), on(3)))),
            ];
            let mut case = Case::new(RUNTIME, "FusedMatMul", inputs);
            for (at, flag) in flags.iter().enumerate() {
                case = case.int(flag, i64::from(on(at as u32)));
            }
            case.clone().holds(17);
            case.float("alpha", 0.5).holds(13);
        }
        let older = vec![Fed(f(1, &[5, 4])), Weight(f(2, &[5, 6]))];
        Case::new(RUNTIME, "TransposeMatMul", older)
            .int("transA", 1)
            .holds(17);
        let vector = vec![Fed(f(1, &[2, 4, 5])), Weight(f(2, &[5]))];
        Case::new(RUNTIME, "FusedMatMul", vector)
            .int("transB", 1)
            .holds(17);
    }

    #[test]
    fn gemm_with_an_activation() {
        let kinds: [(&str, &[(&str, f32)]); 9] = [
            ("Relu", &[]),
            ("Tanh", &[]),
            ("Sigmoid", &[]),
            ("Softplus", &[]),
            ("Softsign", &[]),
            ("LeakyRelu", &[("activation_alpha", 0.2)]),
            ("Elu", &[("activation_alpha", 0.5)]),
            (
                "HardSigmoid",
                &[("activation_alpha", 0.3), ("activation_beta", 0.4)],
            ),
            (
                "Selu",
                &[("activation_alpha", 1.5), ("activation_gamma", 1.1)],
            ),
        ];
        for (kind, own) in kinds {
            let inputs = vec![
                Fed(f(1, &[4, 3])),
                Weight(f(2, &[5, 4])),
                Weight(f(3, &[5])),
            ];
            let mut case = Case::new(RUNTIME, "FusedGemm", inputs)
                .int("transA", 1)
                .int("transB", 1)
                .float("alpha", 0.5)
                .float("beta", 2.0)
                .with(Attribute::string("activation", kind));
            for (name, value) in own {
                case = case.float(name, *value);
            }
            case.holds(17);
        }
        let inputs = vec![Fed(f(1, &[3, 4])), Weight(f(2, &[4, 5]))];
        let odd = Case::new(RUNTIME, "FusedGemm", inputs)
            .with(Attribute::string("activation", "ScaledTanh"));
        assert!(odd.stays(17).contains("ScaledTanh"));
    }

    /// Without a kernel on this processor; held against their formulas.
    #[test]
    fn fusions_for_other_processors() {
        let (x, bias, skip) = (f(1, &[2, 3, 8]), f(2, &[8]), f(3, &[2, 3, 8]));
        let (xs, bs, ss) = (
            x.to_f32().unwrap(),
            bias.to_f32().unwrap(),
            skip.to_f32().unwrap(),
        );
        let sums: Vec<f32> = (0..48).map(|i| xs[i] + bs[i % 8] + ss[i]).collect();
        let add = Case::new(
            RUNTIME,
            "BiasAdd",
            vec![Fed(x.clone()), Weight(bias.clone()), Fed(skip.clone())],
        );
        same(
            "BiasAdd",
            &add.runs(17),
            &Tensor::from_f32(vec![2, 3, 8], &sums).unwrap(),
            REWRITTEN,
        );

        let gelu = Case::new(
            RUNTIME,
            "BiasGelu",
            vec![Fed(x.clone()), Weight(bias.clone())],
        )
        .runs(17);
        let gelu = gelu.to_f32().unwrap().into_owned();
        let split: Vec<f32> = (0..6)
            .flat_map(|row| {
                let (xs, bs, gelu) = (&xs, &bs, &gelu);
                (0..4).map(move |i| (xs[row * 8 + i] + bs[i]) * gelu[row * 8 + 4 + i])
            })
            .collect();
        let case = Case::new(
            RUNTIME,
            "BiasSplitGelu",
            vec![Fed(x.clone()), Weight(bias.clone())],
        );
        same(
            "BiasSplitGelu",
            &case.runs(17),
            &Tensor::from_f32(vec![2, 3, 4], &split).unwrap(),
            REWRITTEN,
        );

        let weight = Weight(f(4, &[8, 8]));
        let case = Case::new(
            RUNTIME,
            "GemmFastGelu",
            vec![Fed(x.clone()), weight.clone(), Weight(bias.clone())],
        );
        let product = Case::new(RUNTIME, "FusedMatMul", vec![Fed(x), weight]).runs(17);
        let expected = Case::new(RUNTIME, "FastGelu", vec![Fed(product), Weight(bias)]).runs(17);
        same("GemmFastGelu", &case.runs(17), &expected, REWRITTEN);
    }
}

#[test]
fn operators_that_stay_say_why() {
    let x = || vec![Fed(f(1, &[2, 3, 8]))];
    for (op, why) in [
        ("QAttention", "integer arithmetic"),
        ("MatMulNBits", "quantised"),
        ("PackedAttention", "packed"),
        ("LongformerAttention", "window"),
        ("DecoderMaskedMultiHeadAttention", "step"),
        ("BeamSearch", "loop"),
        ("FusedConv", "convolution"),
        ("RelativePositionBias", "no CPU kernel"),
        ("NeverHeardOf", "no rule is known"),
    ] {
        let said = Case::new(RUNTIME, op, x()).stays(17);
        assert!(said.contains(why), "{op}: {said}");
    }
    let blocked = Case::new("com.microsoft.nchwc", "Conv", x()).stays(17);
    assert!(blocked.contains("blocked memory layout"));
}

#[test]
fn the_same_model_gives_the_same_answer() {
    let inputs = vec![Fed(f(1, &[2, 4, 16])), Weight(f(2, &[16, 48]))];
    let (model, _) = Case::new(RUNTIME, "Attention", inputs)
        .int("num_heads", 2)
        .model(17);
    let [a, b] = [(); 2].map(|()| introspectd::anatomy::normalise::unfuse(&model).unwrap());
    assert_eq!(a.model.graph.dump(), b.model.graph.dump());
    assert_eq!(a.replaced, b.replaced);
}
