//! Patches on random graphs: what an edit does to the meaning of a graph, by an interpreter of scalars; and models that come
//! back from their bytes as they were.

mod onnx_wire;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use introspectd::{
    onnx::{Dim, Graph, Limits, Model, NodeSpec, Patch, ValueId, Weights},
    tensor::{DType, Tensor},
};
use onnx_wire::*;
use proptest::prelude::*;

fn parse(bytes: Vec<u8>) -> Model {
    Model::parse(Bytes::from(bytes), &Limits::default()).unwrap()
}

/// A random graph: each node reads one or two values before it; the file lists the nodes in any order; the last node and some others
/// are outputs.
fn dag() -> impl Strategy<Value = Model> {
    let node = (
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        0usize..4,
    );
    let nodes = prop::collection::vec((node, any::<u32>(), prop::bool::weighted(0.2)), 1..25);
    nodes.prop_map(|nodes| {
        let mut values = vec!["x".to_owned(), "z".to_owned()];
        let (mut lines, mut outputs) = (Vec::new(), Vec::new());
        let last = nodes.len() - 1;
        for (at, ((a, b, op), place, output)) in nodes.into_iter().enumerate() {
            let (a, b) = (a.get(&values), b.get(&values));
            let made = format!("v{at}");
            let line = match op {
                0 => format!("{made} = Neg {a}"),
                1 => format!("{made} = Relu {a}"),
                2 => format!("{made} = Add {a} {b}"),
                _ => format!("{made} = Sub {a} {b}"),
            };
            lines.push((place, line));
            if output || at == last {
                outputs.push(made.clone());
            }
            values.push(made);
        }
        lines.sort();
        let text: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        parse(model(&graph(&["x", "z"], &text.join("\n"), &outputs)).0)
    })
}

/// Every value of a graph for x = 2 and z = 5. `change` is what the readers of a value get instead of it.
fn evaluate(g: &Graph, change: Option<(ValueId, f64)>) -> BTreeMap<ValueId, f64> {
    let mut values = BTreeMap::new();
    for (port, v) in g.inputs().zip([2.0, 5.0, 0.0]) {
        values.insert(port.value, v);
    }
    for (_, node) in g.nodes() {
        let read = |slot: usize| {
            let v = node.input(slot).unwrap();
            match change {
                Some((changed, to)) if changed == v => to,
                _ => values[&v],
            }
        };
        let made = match node.op.as_str() {
            "Identity" => read(0),
            "Neg" => -read(0),
            "Relu" => read(0).max(0.0),
            "Add" => read(0) + read(1),
            "Sub" => read(0) - read(1),
            other => panic!("{other} is not in these graphs"),
        };
        values.insert(node.output(0).unwrap(), made);
    }
    values
}

/// Name and value of every output.
fn outputs(g: &Graph) -> Vec<(String, f64)> {
    let values = evaluate(g, None);
    let output = |p: &introspectd::onnx::Port| (g.name(p.value).to_owned(), values[&p.value]);
    g.outputs().iter().map(output).collect()
}

/// What every graph keeps, whatever made it.
fn sound(base: &Model, g: &Graph) {
    let names: BTreeSet<&str> = g.values().map(|v| g.name(v)).collect();
    assert_eq!(names.len(), g.values().len(), "names are unique");
    for name in names {
        assert_eq!(g.name(g.value(name).unwrap()), name);
    }
    let mut made: BTreeSet<ValueId> = g.inputs().map(|p| p.value).collect();
    for (id, node) in g.nodes() {
        for read in node.reads() {
            let known = made.contains(&read) || g.initializer(read).is_some();
            assert!(known, "{} reads before it is made", node.label());
            assert!(g.consumers(read).iter().any(|(reader, _)| *reader == id));
        }
        for output in node.outputs.iter().flatten() {
            assert_eq!(g.producer(*output), Some(id));
            assert!(made.insert(*output), "made once");
        }
    }
    let written = base.with_graph(g.clone()).encode(Weights::Inline);
    let again = parse(written.clone());
    assert_eq!(again.graph.dump(), g.dump());
    assert_eq!(again.encode(Weights::Inline), written);
}

/// Every value that depends on one, itself included.
fn below(g: &Graph, value: ValueId) -> BTreeSet<ValueId> {
    let mut found = BTreeSet::from([value]);
    for (_, node) in g.nodes() {
        if node.reads().any(|v| found.contains(&v)) {
            found.extend(node.outputs.iter().flatten());
        }
    }
    found
}

/// A value that a node makes, by a number.
fn any_made(g: &Graph, index: &prop::sample::Index) -> ValueId {
    let made: Vec<ValueId> = g.nodes().filter_map(|(_, n)| n.output(0)).collect();
    *index.get(&made)
}

/// A value, by a number.
fn any_value(g: &Graph, index: &prop::sample::Index) -> ValueId {
    let all: Vec<ValueId> = g.values().collect();
    *index.get(&all)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn a_model_comes_back_from_its_bytes(m in dag()) {
        sound(&m, &m.graph);
    }

    #[test]
    fn a_null_patch_is_the_identity(m in dag()) {
        let g = Patch::new(&m.graph, "p").apply().unwrap();
        prop_assert_eq!(
            m.with_graph(g).encode(Weights::Inline),
            m.encode(Weights::Inline)
        );
    }

    #[test]
    fn a_tap_shows_the_value_and_changes_no_other_output(m in dag(), at: prop::sample::Index) {
        let value = any_value(&m.graph, &at);
        let mut p = Patch::new(&m.graph, "p");
        let tapped = p.tap(value, "seen").unwrap();
        let g = p.apply().unwrap();
        sound(&m, &g);
        let mut expected = outputs(&m.graph);
        expected.push(("seen".to_owned(), evaluate(&m.graph, None)[&value]));
        prop_assert_eq!(outputs(&g), expected);
        prop_assert_eq!(g.name(tapped), "seen");
        for v in m.graph.values() {
            prop_assert_eq!(g.name(v), m.graph.name(v));
        }
    }

    #[test]
    fn a_null_intercept_changes_no_output(m in dag(), at: prop::sample::Index) {
        let value = any_made(&m.graph, &at);
        let mut p = Patch::new(&m.graph, "p");
        p.intercept(value, |p, v| p.op("Identity", &[v], vec![]));
        let g = p.apply().unwrap();
        sound(&m, &g);
        prop_assert_eq!(outputs(&g), outputs(&m.graph));
    }

    #[test]
    fn an_intercept_is_what_every_reader_and_the_output_get(m in dag(), at: prop::sample::Index) {
        let value = any_made(&m.graph, &at);
        let mut p = Patch::new(&m.graph, "p");
        p.intercept(value, |p, v| p.op("Neg", &[v], vec![]));
        let g = p.apply().unwrap();
        sound(&m, &g);
        let changed = -evaluate(&m.graph, None)[&value];
        let mut expected = evaluate(&m.graph, Some((value, changed)));
        expected.insert(value, changed);
        let expected: Vec<(String, f64)> = m.graph.outputs().iter()
            .map(|o| (m.graph.name(o.value).to_owned(), expected[&o.value]))
            .collect();
        prop_assert_eq!(outputs(&g), expected);
    }

    #[test]
    fn a_shunt_is_refused_exactly_when_it_makes_a_cycle(
        m in dag(),
        from: prop::sample::Index,
        to: prop::sample::Index,
    ) {
        let (from, to) = (any_made(&m.graph, &from), any_value(&m.graph, &to));
        let mut p = Patch::new(&m.graph, "p");
        p.shunt(from, to);
        let cycle = from != to && below(&m.graph, from).contains(&to);
        match p.apply() {
            Ok(g) => {
                prop_assert!(!cycle);
                sound(&m, &g);
                let to = evaluate(&m.graph, None)[&to];
                let mut expected = evaluate(&m.graph, Some((from, to)));
                expected.insert(from, to);
                for (name, value) in outputs(&g) {
                    prop_assert_eq!(value, expected[&m.graph.value(&name).unwrap()]);
                }
            }
            Err(e) => prop_assert!(cycle && e.to_string().contains("cycle"), "{}", e),
        }
    }

    #[test]
    fn kept_outputs_keep_their_values_and_nothing_else_stays(m in dag(), at: prop::sample::Index) {
        let value = any_made(&m.graph, &at);
        let mut p = Patch::new(&m.graph, "p");
        p.output(value);
        p.keep_outputs(&[value]);
        let g = p.apply().unwrap();
        sound(&m, &g);
        let name = m.graph.name(value).to_owned();
        prop_assert_eq!(outputs(&g), [(name, evaluate(&m.graph, None)[&value])]);
        let needed = |v: ValueId| below(&m.graph, v).contains(&value);
        let expected = m.graph.nodes().filter(|(_, n)| needed(n.output(0).unwrap())).count();
        prop_assert_eq!(g.node_count(), expected);
        prop_assert_eq!(g.inputs().count(), 2, "the contract with the caller stays");
    }

    #[test]
    fn replacing_nodes_by_what_they_mean_changes_no_output(m in dag()) {
        let mut p = Patch::new(&m.graph, "p");
        for (id, node) in m.graph.nodes().filter(|(_, n)| n.op == "Sub") {
            let minus = p.op("Neg", &[node.input(1).unwrap()], vec![]);
            p.replace(id, NodeSpec {
                op: "Add",
                inputs: vec![node.input(0), Some(minus)],
                ..NodeSpec::default()
            });
        }
        let g = p.apply().unwrap();
        sound(&m, &g);
        prop_assert!(g.nodes().all(|(_, n)| n.op != "Sub"));
        prop_assert_eq!(outputs(&g), outputs(&m.graph));
    }

    #[test]
    fn many_edits_at_once_are_the_same_as_one_after_another(
        m in dag(),
        places in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
    ) {
        let values: Vec<ValueId> = places.iter().map(|i| any_made(&m.graph, i)).collect();
        let negate = |p: &mut Patch, v: ValueId| p.intercept(v, |p, v| p.op("Neg", &[v], vec![]));
        let mut whole = Patch::new(&m.graph, "p");
        values.iter().for_each(|v| negate(&mut whole, *v));
        let whole = whole.apply().unwrap();
        let mut step = m.graph.clone();
        for v in values {
            let mut p = Patch::new(&step, "q");
            negate(&mut p, v);
            step = p.apply().unwrap();
        }
        sound(&m, &whole);
        prop_assert_eq!(outputs(&whole), outputs(&step));
    }
}

// ---------------------------------------------------------------------------------------------- single cases

#[test]
fn every_kind_of_model_comes_back_from_its_bytes() {
    for wire in [diamond(), weighted(), branching(), calling()] {
        let m = parse(wire.0);
        let again = parse(m.encode(Weights::Inline));
        assert_eq!(again.encode(Weights::Inline), m.encode(Weights::Inline));
        assert_eq!(again.graph.dump(), m.graph.dump());
        assert_eq!(
            (
                again.ir_version,
                &again.opsets,
                &again.producer,
                &again.metadata
            ),
            (m.ir_version, &m.opsets, &m.producer, &m.metadata)
        );
        let facts = |m: &Model| -> BTreeMap<String, String> {
            let fact = |v| {
                Some((
                    m.graph.name(v).to_owned(),
                    format!("{:?}", m.graph.declared(v)?),
                ))
            };
            m.graph.values().filter_map(fact).collect()
        };
        assert_eq!(facts(&again), facts(&m));
    }
}

#[test]
fn constants_inputs_and_outputs_can_be_added() {
    let m = parse(weighted().0);
    let mut p = Patch::new(&m.graph, "p");
    let scale = p.constant("scale", &Tensor::from_f32(vec![1], &[0.5]).unwrap());
    let shift = p
        .input(
            "shift",
            DType::F32,
            vec![Dim::Named("batch".to_owned()), Dim::Fixed(2)],
        )
        .unwrap();
    p.intercept(m.graph.value("p").unwrap(), |p, v| {
        let scaled = p.op("Mul", &[v, scale], vec![]);
        p.op("Add", &[scaled, shift], vec![])
    });
    p.output(m.graph.value("p").unwrap());
    let g = p.apply().unwrap();
    assert_eq!(g.constant_scalar(scale), Some(0.5));
    let inputs: Vec<&str> = g.inputs().map(|i| g.name(i.value)).collect();
    assert_eq!(inputs, ["x", "shift"]);
    let again = parse(m.with_graph(g.clone()).encode(Weights::Inline));
    assert_eq!(again.graph.dump(), g.dump());
}

#[test]
fn a_value_that_a_subgraph_reads_cannot_be_rerouted_but_can_be_seen() {
    let m = parse(branching().0);
    let a = m.graph.value("a").unwrap();
    let mut p = Patch::new(&m.graph, "p");
    p.intercept(a, |p, v| p.op("Neg", &[v], vec![]));
    let e = p.apply().unwrap_err().to_string();
    assert!(
        e.contains("\"a\"") && e.contains("subgraph of node \"y (If)\""),
        "{e}"
    );
    let mut p = Patch::new(&m.graph, "p");
    p.tap(a, "seen").unwrap();
    assert_eq!(p.apply().unwrap().outputs().len(), 2);
}

#[test]
fn names_inside_subgraphs_are_taken() {
    let m = parse(branching().0);
    let a = m.graph.value("a").unwrap();
    let mut p = Patch::new(&m.graph, "p");
    for name in ["t", "m", "e", "y", "x", ""] {
        assert!(p.tap(a, name).is_err(), "{name:?}");
    }
    assert!(p.input("m", DType::F32, vec![]).is_err());
}

#[test]
fn patches_that_make_no_sense_are_refused() {
    let m = parse(diamond().0);
    let other = parse(branching().0);
    let y = m.graph.value("y").unwrap();
    let keep = |values: &[ValueId]| {
        let mut p = Patch::new(&m.graph, "p");
        p.keep_outputs(values);
        p.apply().unwrap_err().to_string()
    };
    assert!(keep(&[]).contains("no output would be left"));
    assert!(keep(&[m.graph.value("a").unwrap()]).contains("\"a\" is no output"));

    let mut p = Patch::new(&m.graph, "p");
    let add = m.graph.producer(y).unwrap();
    p.remove(add);
    assert!(
        p.apply().unwrap_err().to_string().contains("\"y\""),
        "nothing makes it any more"
    );

    // An id of a larger graph.
    let mut large = Patch::new(&other.graph, "p");
    let strange = (0..20).map(|_| large.scalar(1.0)).next_back().unwrap();
    let mut p = Patch::new(&m.graph, "p");
    p.shunt(y, strange);
    assert!(p.apply().unwrap_err().to_string().contains("another graph"));

    let mut p = Patch::new(&m.graph, "p");
    let node = NodeSpec {
        op: "Neg",
        inputs: vec![Some(y)],
        ..NodeSpec::default()
    };
    p.node_making(node, vec![m.graph.value("a")]);
    assert!(p.apply().unwrap_err().to_string().contains("made twice"));
}

#[test]
fn weights_that_are_inputs_too_go_with_what_reads_them() {
    // Before version 4 of the format every weight was an input as well.
    let weight = |name: &str| tensor(name, FLOAT, &[1], &f32s(&[1.0]));
    let inputs = &["x", "w", "u"];
    let graph =
        graph(inputs, "a = Add x w\ny = Add a u", &["y"]).all(5, [weight("w"), weight("u")]);
    let m = parse(Wire::new().int(1, 3).put(8, opset("", 9)).put(7, graph).0);
    let mut p = Patch::new(&m.graph, "p");
    let a = m.graph.value("a").unwrap();
    p.output(a);
    p.keep_outputs(&[a]);
    let g = p.apply().unwrap();
    let names: Vec<&str> = g.inputs().map(|i| g.name(i.value)).collect();
    assert_eq!(
        names,
        ["x"],
        "\"u\" is gone, and is no input that a caller must give"
    );
    let written = parse(m.with_graph(g).encode(Weights::Inline));
    assert_eq!(written.ir_version, 3);
}

#[test]
fn functions_are_inlined_with_their_attributes() {
    let m = parse(calling().0);
    let ops: Vec<&str> = m.graph.nodes().map(|(_, n)| n.op.as_str()).collect();
    assert_eq!(ops, ["LeakyRelu", "Neg", "LeakyRelu", "Neg"]);
    let leaky = m.graph.nodes().next().unwrap().1;
    assert_eq!(leaky.float("alpha"), Some(0.5));
    assert_eq!(m.graph.name(m.graph.outputs()[0].value), "y");
}

#[test]
fn a_function_may_return_its_input_and_the_same_value_twice() {
    let f = function("f", &["i"], "o = Neg i", &["i", "o", "o"]);
    let g = graph(
        &["x"],
        "a b c = local:f x\ns = Add a b\ny = Sub s c",
        &["y"],
    );
    let m = parse(header().put(8, opset("local", 1)).put(25, f).put(7, g).0);
    // (x - x) - (-x)
    assert_eq!(outputs(&m.graph), [("y".to_owned(), 2.0)]);
}

#[test]
fn inlined_names_are_new_even_when_a_file_tries_to_guess_them() {
    let f = function("f", &["i"], "h = Neg i\no = Neg h", &["o"]);
    let text = "#1/f/h = Relu x\nb = local:f x\ny = Add b #1/f/h";
    let g = graph(&["x"], text, &["y"]);
    let m = parse(header().put(8, opset("local", 1)).put(25, f).put(7, g).0);
    assert_eq!(outputs(&m.graph), [("y".to_owned(), 4.0)]);
}

#[test]
fn ten_thousand_nodes_are_patched_in_a_blink() {
    let mut text = String::from("v0 = Neg x\n");
    for n in 1..10_000 {
        text += &format!("v{n} = Add v{} x\n", n - 1);
    }
    let m = parse(model(&graph(&["x"], &text, &["v9999"])).0);
    let mut p = Patch::new(&m.graph, "p");
    for n in (0..10_000).step_by(10) {
        let v = m.graph.value(&format!("v{n}")).unwrap();
        p.intercept(v, |p, v| p.op("Neg", &[v], vec![]));
    }
    let start = std::time::Instant::now();
    let g = p.apply().unwrap();
    assert_eq!(g.node_count(), 11_000);
    // Work that grew with nodes times edits would take a hundred times as long.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}
