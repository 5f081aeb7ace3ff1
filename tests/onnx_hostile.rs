//! Model files that are broken or mean harm: each is refused with an error that names the place; none panics, hangs or takes
//! memory that its size does not warrant.

mod onnx_wire;

use std::{fs, os::unix::fs::symlink, path::Path};

use bytes::Bytes;
use introspectd::onnx::{Folder, Limits, Model, OnnxError, Weights};
use onnx_wire::*;
use proptest::prelude::*;

fn parse(model: &Wire) -> Result<Model, OnnxError> {
    Model::parse(Bytes::copy_from_slice(&model.0), &Limits::default())
}

/// The model is refused, and the error says so in these words.
#[track_caller]
fn refused(model: &Wire, words: &[&str]) {
    let said = match parse(model) {
        Ok(m) => panic!("accepted:\n{}", m.graph.dump()),
        Err(e) => e.to_string(),
    };
    assert!(said.len() < 1024, "{} bytes of error", said.len());
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

/// One of everything.
fn zoo() -> Vec<Wire> {
    vec![diamond(), weighted(), branching(), calling()]
}

// ---------------------------------------------------------------------------------------------- bytes

#[test]
fn the_whole_zoo_loads() {
    for model in zoo() {
        parse(&model).unwrap();
    }
}

#[test]
fn every_truncation_is_refused() {
    for model in zoo() {
        for length in 0..model.0.len() {
            let cut = Wire(model.0[..length].to_vec());
            assert!(parse(&cut).is_err(), "{length} of {}", model.0.len());
        }
    }
}

#[test]
fn every_bit_flip_is_refused_or_read() {
    for model in zoo() {
        for bit in 0..model.0.len() * 8 {
            let mut bytes = model.0.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            survive(bytes);
        }
    }
}

/// Reads bytes, and when they are a model uses all that an accepted model offers.
fn survive(bytes: Vec<u8>) {
    let Ok(model) = Model::parse(bytes.into(), &Limits::default()) else {
        return;
    };
    let graph = &model.graph;
    let dump = graph.dump();
    graph.integer_divisions();
    for value in graph.values() {
        let _ = (graph.constant(value), graph.constant_scalar(value));
    }
    let again = model.encode(Weights::Inline);
    let again = Model::parse(again.into(), &Limits::default())
        .expect("what is accepted is accepted when it is written again");
    assert_eq!(again.graph.dump(), dump);
}

/// One change to a file.
#[derive(Clone, Debug)]
enum Mutation {
    Set(usize, u8),
    Cut(usize, usize),
    Double(usize, usize),
    Insert(usize, Vec<u8>),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<usize>();
    prop_oneof![
        4 => (at, any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        1 => (at, 0usize..40).prop_map(|(at, n)| Mutation::Cut(at, n)),
        1 => (at, 0usize..40).prop_map(|(at, n)| Mutation::Double(at, n)),
        1 => (at, prop::collection::vec(any::<u8>(), 1..12))
            .prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
    ]
}

fn mutated(mut bytes: Vec<u8>, mutations: &[Mutation]) -> Vec<u8> {
    for m in mutations {
        let place = |at: usize| at % (bytes.len() + 1);
        match m {
            Mutation::Set(at, byte) => {
                let at = place(*at);
                if let Some(b) = bytes.get_mut(at) {
                    *b = *byte;
                }
            }
            Mutation::Cut(at, n) => {
                let at = place(*at);
                bytes.drain(at..(at + n).min(bytes.len()));
            }
            Mutation::Double(at, n) => {
                let at = place(*at);
                let part = bytes[at..(at + n).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Mutation::Insert(at, new) => {
                let at = place(*at);
                bytes.splice(at..at, new.iter().copied());
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4000) })]

    #[test]
    fn mutated_models_are_refused_or_read(
        which in 0usize..4,
        mutations in prop::collection::vec(mutation(), 1..8),
    ) {
        let model = zoo().swap_remove(which);
        survive(mutated(model.0, &mutations));
    }

    #[test]
    fn random_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        survive(bytes);
    }
}

#[test]
fn an_exported_model_with_mutated_bytes_is_refused_or_read() {
    let file = Path::new("tests/fixtures/models/bert.legacy14/model.onnx");
    let whole = fs::read(file).unwrap();
    // A fixed sequence (a linear congruence), so that a failure repeats.
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    for _ in 0..40 {
        let mut bytes = whole.clone();
        for _ in 0..1 + next() % 4 {
            let at = next() % bytes.len();
            bytes[at] = next() as u8;
        }
        survive(bytes);
    }
}

// ---------------------------------------------------------------------------------------------- limits

#[test]
fn a_few_bytes_that_would_decode_to_gigabytes_are_refused() {
    // Two bytes each, hundreds once decoded: empty nodes, weights, attributes, dimensions.
    let many = |field: u8, n: usize| Wire::new().raw(&[field << 3 | 2, 0].repeat(n));
    refused(&model(&many(1, 2 << 20)), &["too large", "number of nodes"]);
    refused(&model(&many(5, 2 << 20)), &["too large", "memory"]);
    let node = node("y = Relu x").raw(&many(5, 2 << 20).0);
    refused(&model(&Wire::new().put(1, node)), &["too large", "memory"]);
    let shape = Wire::new().put(2, many(1, 16 << 20));
    let input = Wire::new().put(2, Wire::new().put(1, shape));
    refused(
        &model(&Wire::new().put(11, input)),
        &["too large", "memory"],
    );
    // One byte each, eight once decoded.
    let dims = Wire::new().put(1, vec![1; 64 << 20]);
    refused(&model(&Wire::new().put(5, dims)), &["too large", "memory"]);
}

#[test]
fn subgraphs_in_subgraphs_end_at_a_depth() {
    let mut inner = graph(&[], "y = Relu x", &["y"]);
    for _ in 0..40 {
        let holder = node("y = If c").put(5, attribute("then_branch", 5, 6, inner));
        inner = Wire::new().put(1, holder).put(12, port("y"));
    }
    refused(&model(&inner), &["nesting"]);
}

#[test]
fn types_in_types_end_at_a_depth() {
    let mut inner = Wire::new();
    for _ in 0..10_000 {
        inner = Wire::new().put(4, Wire::new().put(1, inner));
    }
    let input = Wire::new().put(1, "x").put(2, inner);
    let graph = graph(&[], "y = Relu x", &["y"]).put(11, input);
    refused(&model(&graph), &["nesting"]);
}

#[test]
fn a_chain_of_a_hundred_thousand_nodes_loads_and_more_nodes_than_the_limit_do_not() {
    let mut text = String::from("v0 = Identity x\n");
    for n in 1..100_000 {
        text += &format!("v{n} = Identity v{}\n", n - 1);
    }
    let chain = model(&graph(&["x"], &text, &["v99999"]));
    let loaded = parse(&chain).unwrap();
    let last = loaded.graph.outputs()[0].value;
    assert_eq!(loaded.graph.constant(last), None, "found without recursion");
    let limits = Limits {
        nodes: 99_999,
        ..Limits::default()
    };
    let got = Model::parse(chain.0.into(), &limits);
    assert!(matches!(got, Err(OnnxError::Limit { .. })), "{got:?}");
}

#[test]
fn functions_that_double_at_each_call_are_refused() {
    let mut wire = header().put(8, opset("local", 1));
    wire = wire.put(25, function("f0", &["i"], "o = Neg i", &["o"]));
    for n in 1..15 {
        let body: String = (0..40)
            .map(|at| format!("t{} = local:f{} t{at}\n", at + 1, n - 1))
            .collect();
        let f = function(&format!("f{n}"), &["t0"], &body, &["t40"]);
        wire = wire.put(25, f.put(9, opset("local", 1)));
    }
    let wire = wire.put(7, graph(&["x"], "y = local:f14 x", &["y"]));
    refused(&wire, &["too large", "inlin"]);
}

#[test]
fn functions_with_large_names_and_attributes_do_not_multiply() {
    let long = "n".repeat(100_000);
    let body: String = (0..1000).map(|n| format!("{long}{n} = Neg i\n")).collect();
    let f = function("f", &["i"], &body, &[&format!("{long}0")]);
    let calls: String = (0..1000).map(|n| format!("y{n} = local:f x\n")).collect();
    let wire = header().put(8, opset("local", 1)).put(25, f);
    let wire = wire.put(7, graph(&["x"], &calls, &["y0"]));
    refused(&wire, &["too large", "memory of inlined functions"]);
}

#[test]
fn functions_that_call_themselves_are_refused_with_their_name() {
    for (a, b) in [("local:a i", "Neg i"), ("local:b i", "local:a i")] {
        let wire = header()
            .put(8, opset("local", 1))
            .put(25, function("a", &["i"], &format!("o = {a}"), &["o"]))
            .put(25, function("b", &["i"], &format!("o = {b}"), &["o"]))
            .put(7, graph(&["x"], "y = local:a x", &["y"]));
        refused(&wire, &["function \"a\"", "calls itself"]);
    }
}

#[test]
fn a_chain_of_functions_ends_at_a_depth() {
    let mut wire = header().put(8, opset("local", 1));
    wire = wire.put(25, function("f0", &["i"], "o = Neg i", &["o"]));
    for n in 1..2000 {
        let body = format!("o = local:f{} i", n - 1);
        wire = wire.put(25, function(&format!("f{n}"), &["i"], &body, &["o"]));
    }
    let wire = wire.put(7, graph(&["x"], "y = local:f1999 x", &["y"]));
    refused(&wire, &["nesting"]);
}

// ---------------------------------------------------------------------------------------------- graphs

#[test]
fn graphs_that_cannot_run_are_refused_with_the_place() {
    for (text, outputs, words) in [
        ("a = Add x b\nb = Relu a", &["b"][..], &["cycle"][..]),
        ("a = Add x b\nb = Relu a\nc = Neg b", &["c"], &["cycle"]),
        (
            "a = Relu gone",
            &["a"],
            &["a (Relu)", "\"gone\"", "nothing makes"],
        ),
        ("a = Relu x\na = Tanh x", &["a"], &["\"a\"", "made twice"]),
        ("x = Relu x", &["x"], &["\"x\"", "made twice"]),
        ("a b b = Split x", &["a"], &["\"b\"", "made twice"]),
        ("a = Relu x", &["z"], &["\"z\"", "nothing makes"]),
        ("a = Relu x", &["a", "a"], &["output \"a\"", "twice"]),
        ("a = Relu x", &[], &["no output"]),
    ] {
        refused(&model(&graph(&["x"], text, outputs)), words);
    }
    refused(
        &model(&graph(&["x", "x"], "a = Relu x", &["a"])),
        &["input twice"],
    );
    refused(&header(), &["no graph"]);
}

#[test]
fn the_cycle_is_named_and_not_what_hangs_below_it() {
    let text = "below = Neg b\na = Add x b\nb = Relu a";
    let e = parse(&model(&graph(&["x"], text, &["below"]))).unwrap_err();
    assert!(!e.to_string().contains("below"), "{e}");
}

#[test]
fn subgraphs_keep_the_same_rules() {
    for (text, words) in [
        ("t = Relu u\nu = Neg t", &["subgraph", "cycle"][..]),
        ("t = Relu a\nt = Neg a", &["made twice"]),
        ("t = Relu gone", &["y (If)", "\"gone\"", "nothing makes"]),
        ("t = evil:Thing a", &["t (Thing)", "custom-operator"]),
    ] {
        let then = attribute("then_branch", 5, 6, graph(&[], text, &["t"]));
        let graph = graph(&["x", "c"], "a = Relu x", &["y"]).put(1, node("y = If c").put(5, then));
        refused(&model(&graph), words);
    }
}

#[test]
fn versions_that_no_runtime_has_are_refused() {
    let plain = graph(&["x"], "y = Relu x", &["y"]);
    let with = |ir: i64, sets: &[(&str, i64)]| {
        let sets = sets.iter().map(|(d, v)| opset(d, *v));
        Wire::new().int(1, ir).all(8, sets).put(7, &plain)
    };
    assert!(parse(&with(8, &[("", 17)])).is_ok());
    for ir in [0, 1, 2, 99, -1, i64::MAX] {
        refused(&with(ir, &[("", 17)]), &["ir_version"]);
    }
    for version in [0, -1, 6, 9999, i64::MAX] {
        refused(&with(8, &[("", version)]), &["operator set"]);
    }
    refused(&with(8, &[]), &["export the model again"]);
    refused(&with(8, &[("", 17), ("ai.onnx", 18)]), &["imported twice"]);
    refused(&with(8, &[("", 17), ("com.microsoft", 0)]), &["impossible"]);
}

#[test]
fn code_from_elsewhere_is_refused() {
    let unknown = graph(&["x"], "y = custom.ops:Evil x", &["y"]);
    let import = |domain: &str| header().put(8, opset(domain, 1));
    refused(
        &import("custom.ops").put(7, &unknown),
        &["y (Evil)", "\"custom.ops\"", "never loaded"],
    );
    let missing = graph(&["x"], "y = com.microsoft:Gelu x", &["y"]);
    refused(&model(&missing), &["y (Gelu)", "does not import"]);
    assert!(parse(&import("com.microsoft").put(7, &missing)).is_ok());
    let context = graph(&["x"], "y = com.microsoft:EPContext x", &["y"]);
    refused(
        &import("com.microsoft").put(7, &context),
        &["y (EPContext)", "refused"],
    );
    for key in ["ort_config", "custom_op_library_path", "EP_Library"] {
        let entry = Wire::new().put(1, key).put(2, "/tmp/evil.so");
        refused(&diamond().put(14, entry), &[key, "never loaded"]);
    }
}

#[test]
fn attributes_that_lie_about_their_kind_are_refused() {
    let with = |a: Wire| model(&graph(&["x"], "", &["y"]).put(1, node("y = Relu x").put(5, a)));
    let named = || Wire::new().put(1, "k");
    assert!(parse(&with(named().int(20, 2).int(3, 5))).is_ok());
    refused(
        &with(named().int(20, 1).int(3, 5)),
        &["y (Relu)", "\"k\"", "kind 2"],
    );
    refused(&with(named().int(20, 4)), &["carries nothing"]);
    refused(&with(named().int(20, 5)), &["carries nothing"]);
    refused(&with(named().int(20, 99)), &["unknown kind"]);
    refused(
        &with(named().int(20, 2).put(21, "outer")),
        &["outside of one"],
    );
    refused(&with(Wire::new().int(20, 2).int(3, 5)), &["no name"]);
    let twice = node("y = Relu x").all(5, [named().int(20, 2), named().int(20, 2)]);
    refused(
        &model(&graph(&["x"], "", &["y"]).put(1, twice)),
        &["there twice"],
    );
}

#[test]
fn tensors_that_lie_about_their_shape_or_type_are_refused() {
    let raw = f32s(&[1.0, 2.0]);
    let broken = [
        tensor("w", FLOAT, &[3], &raw),
        tensor("w", FLOAT, &[-2], &raw),
        tensor("w", FLOAT, &[i64::MAX, i64::MAX, i64::MAX], &raw),
        tensor("w", FLOAT, &[1 << 33, 1 << 33], &raw),
        tensor("w", FLOAT, &[1; 65], &raw[..4]),
        tensor("w", 0, &[2], &raw),
        tensor("w", 999, &[2], &raw),
        // A string tensor cannot have raw data.
        tensor("w", 8, &[2], &raw),
        // Integers under a float type, data in two places, an unknown location.
        Wire::new().int(1, 1).int(2, FLOAT).put(8, "w").int(7, 5),
        tensor("w", FLOAT, &[2], &raw).put(4, &raw),
        tensor("w", FLOAT, &[2], &raw).int(14, 7),
        // Seven values of four bits take four bytes.
        tensor("w", 22, &[7], &[0; 3]),
    ];
    for w in broken {
        let weight = graph(&["x"], "y = Add x w", &["y"]).put(5, &w);
        refused(&model(&weight), &["\"w\""]);
        let constant = node("w = Constant").put(5, attribute("value", 4, 5, &w));
        let inside = graph(&["x"], "y = Add x w", &["y"]).put(1, constant);
        refused(&model(&inside), &["node \"w (Constant)\"", "\"w\""]);
    }
    let twice = tensor("w", FLOAT, &[2], &raw);
    let graph = graph(&["x"], "y = Add x w", &["y"]).all(5, [&twice, &twice]);
    refused(&model(&graph), &["weight \"w\"", "twice"]);
}

#[test]
fn declared_shapes_beyond_reason_are_refused() {
    for dims in [&[1i64 << 50][..], &[-7], &[1; 65]] {
        let input = typed("x", FLOAT, Some(dims));
        let graph = graph(&[], "y = Relu x", &["y"]).put(11, input);
        refused(&model(&graph), &["\"x\"", "impossible shape"]);
    }
}

#[test]
fn what_a_file_says_is_escaped_and_cut_in_errors() {
    let name = format!("bad\n\u{1b}[31m{}", "n".repeat(5000));
    let graph =
        graph(&["x"], "", &["y"]).put(1, Wire::new().put(1, &name).put(2, "y").put(4, "Relu"));
    let e = parse(&model(&graph)).unwrap_err().to_string();
    assert!(e.len() < 1024 && !e.contains(['\n', '\u{1b}']), "{e:?}");
}

// ---------------------------------------------------------------------------------------------- external data

const WEIGHTS: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

/// A model folder with `weights.bin`, and beside it a secret of the same size.
fn folder() -> (tempfile::TempDir, std::path::PathBuf) {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().join("model");
    fs::create_dir(&path).unwrap();
    fs::write(outside.path().join("secret"), f32s(&WEIGHTS)).unwrap();
    fs::write(path.join("weights.bin"), f32s(&WEIGHTS)).unwrap();
    (outside, path)
}

/// Every place of a model where a tensor may stand.
fn everywhere(t: &Wire) -> Vec<(&'static str, Wire)> {
    let base = || graph(&["x", "c"], "y = Relu x", &["y"]);
    let holder = |a: Wire| model(&base().put(1, node("k = Constant").put(5, a)));
    let branch = |g: Wire| {
        let then = attribute("then_branch", 5, 6, g);
        model(&base().put(1, node("b = If c").put(5, then)))
    };
    let indices = tensor("", INT64, &[4], &[0u8; 32]);
    let sparse = Wire::new().put(1, t).put(2, &indices).int(3, 8);
    let inner = || graph(&[], "t = Relu x", &["t"]);
    let constant = node("k = Constant").put(5, attribute("value", 4, 5, t));
    let function = function("f", &["i"], "o = Neg i", &["o"]).put(7, &constant);
    let calling = header()
        .put(8, opset("local", 1))
        .put(25, function)
        .put(7, base().put(1, node("z = local:f x")));
    vec![
        ("weight", model(&base().put(5, t))),
        ("sparse weight", model(&base().put(15, &sparse))),
        ("attribute", holder(attribute("value", 4, 5, t))),
        ("attribute list", holder(attribute("values", 9, 10, t))),
        (
            "sparse attribute",
            holder(attribute("sparse_value", 11, 22, &sparse)),
        ),
        (
            "sparse attribute list",
            holder(attribute("values", 12, 23, &sparse)),
        ),
        ("weight of a subgraph", branch(inner().put(5, t))),
        (
            "sparse weight of a subgraph",
            branch(inner().put(15, &sparse)),
        ),
        ("attribute in a subgraph", branch(inner().put(1, &constant))),
        ("attribute in a function", calling),
    ]
}

fn open(path: &Path, model: &Wire) -> Result<Model, OnnxError> {
    fs::write(path.join("model.onnx"), &model.0).unwrap();
    Model::open(
        &Folder::open(path).unwrap(),
        "model.onnx",
        &Limits::default(),
    )
}

#[test]
fn data_beside_the_model_are_read_in_every_place() {
    let (_keep, path) = folder();
    let t = external("w", &[4], &[("location", "weights.bin"), ("length", "16")]);
    for (place, wire) in everywhere(&t) {
        let model = open(&path, &wire).unwrap_or_else(|e| panic!("{place}: {e}"));
        // What is written inline needs no file any more: the data were brought in.
        let whole = model.encode(Weights::Inline);
        let again = Model::parse(whole.into(), &Limits::default());
        assert!(again.is_ok(), "{place}: {again:?}");
    }
}

#[test]
fn data_that_lead_out_of_the_folder_are_refused_in_every_place() {
    let (keep, path) = folder();
    symlink("../secret", path.join("link")).unwrap();
    symlink("weights.bin", path.join("inner_link")).unwrap();
    symlink("..", path.join("up")).unwrap();
    fs::hard_link(keep.path().join("secret"), path.join("hard")).unwrap();
    fs::create_dir(path.join("sub")).unwrap();
    let fifo = path.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let absolute = keep.path().join("secret");
    for location in [
        "../secret",
        "sub/../../secret",
        "/dev/zero",
        "/proc/self/mem",
        absolute.to_str().unwrap(),
        "link",
        "inner_link",
        "up/secret",
        "hard",
        "fifo",
        "sub",
        "",
        ".",
        "..",
        "weights.bin\0",
        "missing.bin",
    ] {
        let t = external("w", &[4], &[("location", location), ("length", "16")]);
        for (place, wire) in everywhere(&t) {
            let got = open(&path, &wire);
            let good = matches!(got, Err(OnnxError::Confined { .. } | OnnxError::Io { .. }));
            assert!(good, "{location:?} as {place}: {got:?}");
            let said = got.unwrap_err().to_string();
            let host = keep.path().to_str().unwrap();
            assert!(location.starts_with('/') || !said.contains(host), "{said}");
        }
    }
}

#[test]
fn offsets_and_lengths_that_lie_are_refused_in_every_place() {
    let (_keep, path) = folder();
    let good = ("location", "weights.bin");
    let max = u64::MAX.to_string();
    for entries in [
        vec![good, ("offset", "4"), ("length", "16")],
        vec![good, ("offset", "4")],
        vec![good, ("length", "12")],
        vec![good, ("length", "20")],
        vec![good, ("offset", &max), ("length", "16")],
        vec![good, ("offset", "18446744073709551600"), ("length", "16")],
        vec![good, ("offset", "-4"), ("length", "16")],
        vec![
            good,
            ("offset", "99999999999999999999999"),
            ("length", "16"),
        ],
        vec![good, ("length", "0x10")],
        vec![good, good],
        vec![("length", "16")],
        vec![],
    ] {
        let t = external("w", &[4], &entries);
        for (place, wire) in everywhere(&t) {
            let got = open(&path, &wire);
            let good = matches!(got, Err(OnnxError::Invalid { .. }));
            assert!(good, "{entries:?} as {place}: {got:?}");
        }
    }
    // A shape whose bytes do not fit any file.
    let huge = external("w", &[1 << 40, 1 << 40], &[good]);
    for (place, wire) in everywhere(&huge) {
        assert!(open(&path, &wire).is_err(), "{place}");
    }
}

#[test]
fn a_model_without_a_folder_has_no_other_files() {
    let t = external("w", &[4], &[("location", "weights.bin")]);
    for (place, wire) in everywhere(&t) {
        let e = parse(&wire).unwrap_err().to_string();
        assert!(e.contains("no folder"), "{place}: {e}");
    }
}
