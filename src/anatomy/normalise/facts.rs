//! What can be said of values without running the model: element type, number of axes, extent of the last one.
//!
//! Rules need them to choose between the forms that an operator accepts. One pass in topological order; what the file
//! declares counts first, an operator that is not listed gives nothing, and nothing is ever guessed.

use crate::{
    onnx::{Dim, Graph, Node, TypeFact, ValueId, dtype_of},
    tensor::DType,
};

/// What is known of one value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fact {
    pub(super) dtype: Option<DType>,
    pub(super) rank: Option<usize>,
    /// Extent of the last axis. Of a list: its length, which is the rank of what it is the shape of.
    pub(super) last: Option<i64>,
}

impl Fact {
    fn new(dtype: Option<DType>, rank: usize, last: Option<i64>) -> Self {
        Self {
            dtype,
            rank: Some(rank),
            last,
        }
    }

    fn of_type(dtype: DType) -> Self {
        Self {
            dtype: Some(dtype),
            ..Self::default()
        }
    }

    /// These facts, and where they say nothing, those.
    fn or(self, other: Self) -> Self {
        Self {
            dtype: self.dtype.or(other.dtype),
            rank: self.rank.or(other.rank),
            last: self.last.or(other.last),
        }
    }
}

/// Facts by value.
pub(super) struct Facts(Vec<Fact>);

impl Facts {
    pub(super) fn of(graph: &Graph) -> Self {
        let mut facts = Self(vec![Fact::default(); graph.values().count()]);
        for value in graph.values() {
            let declared = graph.declared(value).map(declared);
            let weight = graph.initializer(value).map(|w| {
                let last = w.dims().last().map(|d| *d as i64);
                Fact::new(w.dtype(), w.dims().len(), last)
            });
            facts.0[value.index()] = weight.or(declared).unwrap_or_default();
        }
        for port in graph.inputs().chain(graph.outputs()) {
            if let Some(fact) = &port.fact {
                facts.learn(port.value, declared(fact));
            }
        }
        for (_, node) in graph.nodes() {
            for (slot, value) in node.outputs.iter().enumerate() {
                if let Some(value) = value {
                    facts.learn(*value, facts.made(graph, node, slot));
                }
            }
        }
        facts
    }

    pub(super) fn get(&self, value: ValueId) -> Fact {
        self.0[value.index()]
    }

    fn learn(&mut self, value: ValueId, fact: Fact) {
        let known = &mut self.0[value.index()];
        *known = known.or(fact);
    }

    fn input(&self, node: &Node, slot: usize) -> Fact {
        node.input(slot).map_or_else(Fact::default, |v| self.get(v))
    }

    /// What the operator says of its output `slot`.
    fn made(&self, graph: &Graph, node: &Node, slot: usize) -> Fact {
        let first = self.input(node, 0);
        match node.domain.as_str() {
            "" => self.standard(graph, node, slot),
            super::RUNTIME_DOMAIN => match node.op.as_str() {
                "Gelu" | "BiasGelu" | "FastGelu" | "QuickGelu" | "BiasAdd" | "RotaryEmbedding" => {
                    first
                }
                "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => first.or(Fact {
                    rank: None,
                    ..self.input(node, 2)
                }),
                "EmbedLayerNormalization" if slot == 1 => Fact::new(Some(DType::I32), 1, None),
                "EmbedLayerNormalization" => {
                    let words = self.input(node, 2);
                    Fact::new(words.dtype, 3, words.last)
                }
                "Attention" | "MultiHeadAttention" | "GroupQueryAttention" => {
                    let rank = match (slot, node.op.as_str()) {
                        (0, _) => 3,
                        (_, "Attention") => 5,
                        _ => 4,
                    };
                    Fact::new(first.dtype, rank, None)
                }
                "FusedMatMul" | "TransposeMatMul" => {
                    let rank = highest(&[first.rank, self.input(node, 1).rank]);
                    Fact {
                        rank,
                        last: None,
                        ..first
                    }
                }
                "FusedGemm" => Fact::new(first.dtype, 2, None),
                "MatMulNBits" => Fact {
                    last: node.int("N"),
                    ..first
                },
                "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => Fact {
                    dtype: self.input(node, 2).dtype,
                    last: None,
                    ..first
                },
                "DequantizeLinear" => Fact {
                    dtype: self.input(node, 1).dtype,
                    ..first
                },
                _ => Fact::default(),
            },
            _ => Fact::default(),
        }
    }

    fn standard(&self, graph: &Graph, node: &Node, slot: usize) -> Fact {
        let first = self.input(node, 0);
        let second = self.input(node, 1);
        match node.op.as_str() {
            "Identity" | "Dropout" if slot == 0 => first,
            "Neg" | "Sqrt" | "Reciprocal" | "Tanh" | "Erf" | "Gelu" | "Relu" | "Sigmoid"
            | "Softmax" | "LogSoftmax" | "Exp" | "Log" | "Clip" | "Abs" | "Floor" | "Ceil"
            | "Sin" | "Cos" | "LeakyRelu" | "Elu" | "Softplus" | "HardSwish" | "CumSum"
            | "Trilu" | "RotaryEmbedding" => first,
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization"
                if slot == 0 =>
            {
                first
            }
            "Cast" => Fact {
                dtype: node
                    .int("to")
                    .and_then(|n| dtype_of(i32::try_from(n).ok()?)),
                ..first
            },
            "CastLike" => Fact {
                dtype: second.dtype,
                ..first
            },
            "DequantizeLinear" => Fact {
                dtype: second.dtype,
                ..first
            },
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Mod" => {
                self.broadcast(node, 0, first.dtype)
            }
            "And" | "Or" | "Xor" | "Equal" | "Greater" | "Less" | "GreaterOrEqual"
            | "LessOrEqual" => self.broadcast(node, 0, Some(DType::Bool)),
            "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" => self.broadcast(node, 0, first.dtype),
            "Not" | "IsNaN" | "IsInf" => Fact {
                dtype: Some(DType::Bool),
                ..first
            },
            "Where" => self.broadcast(node, 0, second.dtype.or(self.input(node, 2).dtype)),
            "Shape" if !node.has("start") && !node.has("end") => {
                Fact::new(Some(DType::I64), 1, first.rank.map(|r| r as i64))
            }
            "Shape" => Fact::new(Some(DType::I64), 1, None),
            "Size" => Fact::new(Some(DType::I64), 0, None),
            "Range" => Fact::new(first.dtype, 1, None),
            "Constant" => node
                .output(slot)
                .and_then(|v| graph.constant(v))
                .map_or_else(Fact::default, |t| {
                    Fact::new(
                        Some(t.dtype()),
                        t.shape().len(),
                        t.shape().last().map(|d| *d as i64),
                    )
                }),
            "ConstantOfShape" => Fact {
                dtype: Some(node.tensor("value").map_or(DType::F32, |t| t.dtype())),
                rank: as_rank(first.last),
                last: None,
            },
            "MatMul" => Fact {
                dtype: first.dtype.or(second.dtype),
                rank: highest(&[first.rank, second.rank]),
                last: second.last.filter(|_| second.rank.is_some_and(|r| r > 1)),
            },
            "Gemm" => Fact::new(first.dtype.or(second.dtype), 2, None),
            "Flatten" => Fact::new(first.dtype, 2, None),
            "Transpose" => {
                let perm = node.ints("perm");
                let stays = perm.is_some_and(|p| p.last() == Some(&(p.len() as i64 - 1)));
                Fact {
                    rank: perm.map(<[i64]>::len).or(first.rank),
                    last: first.last.filter(|_| stays),
                    ..first
                }
            }
            "Reshape" => Fact {
                rank: as_rank(second.last),
                last: node
                    .input(1)
                    .and_then(|v| graph.constant_ints(v))
                    .and_then(|s| s.last().copied())
                    .filter(|d| *d > 0),
                ..first
            },
            "Expand" => Fact {
                rank: highest(&[first.rank, as_rank(second.last)]),
                last: first.last.filter(|d| *d > 1),
                ..first
            },
            "Unsqueeze" => {
                let added = self.axes(graph, node).map(|a| a.len());
                let rank = first.rank.zip(added).map(|(r, n)| r + n);
                // Only of a scalar is it plain what the last axis becomes.
                Fact {
                    rank,
                    last: (rank == Some(1)).then_some(1),
                    ..first
                }
            }
            "Squeeze" => {
                let gone = self.axes(graph, node).map(|a| a.len());
                let rank = first.rank.zip(gone).and_then(|(r, n)| r.checked_sub(n));
                Fact {
                    rank,
                    last: None,
                    ..first
                }
            }
            "Gather" => {
                let rank = first
                    .rank
                    .zip(second.rank)
                    .map(|(d, i)| (d + i).saturating_sub(1));
                let rows = node.int("axis").unwrap_or(0) == 0 && first.rank.is_some_and(|r| r > 1);
                let last = if rows {
                    first.last
                } else {
                    second.last.filter(|_| rank == Some(1))
                };
                Fact {
                    rank,
                    last,
                    ..first
                }
            }
            "Concat" => self.concat(node),
            "Slice" | "Split" | "Pad" | "Tile" | "GatherElements" | "ScatterElements"
            | "ScatterND" | "Conv" => Fact {
                last: None,
                ..first
            },
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL2" => {
                let keeps = node.int("keepdims").unwrap_or(1) == 1;
                let gone = self.axes(graph, node).map(|a| a.len());
                let reduced = first.rank.zip(gone).and_then(|(r, n)| r.checked_sub(n));
                Fact {
                    rank: if keeps { first.rank } else { reduced },
                    last: None,
                    ..first
                }
            }
            "ArgMax" | "ArgMin" => Fact::of_type(DType::I64),
            "Attention" if slot == 0 => Fact {
                last: None,
                ..first
            },
            "Attention" => Fact::new(first.dtype, 4, None),
            _ => Fact::default(),
        }
    }

    /// Axes of a node that has them as an attribute or as a constant second input.
    fn axes(&self, graph: &Graph, node: &Node) -> Option<Vec<i64>> {
        match node.ints("axes") {
            Some(axes) => Some(axes.to_vec()),
            None => graph.constant_ints(node.input(1)?),
        }
    }

    /// What broadcasting makes of a node's inputs.
    fn broadcast(&self, node: &Node, from: usize, dtype: Option<DType>) -> Fact {
        let inputs: Vec<Fact> = (from..node.inputs.len())
            .map(|s| self.input(node, s))
            .collect();
        let ranks: Vec<_> = inputs.iter().map(|f| f.rank).collect();
        let fallback = inputs.iter().find_map(|f| f.dtype);
        Fact {
            dtype: dtype.or(fallback),
            rank: highest(&ranks),
            // An extent above one settles it, whatever the others are.
            last: inputs.iter().find_map(|f| f.last.filter(|d| *d > 1)),
        }
    }

    fn concat(&self, node: &Node) -> Fact {
        let inputs: Vec<Fact> = (0..node.inputs.len())
            .map(|s| self.input(node, s))
            .collect();
        let any = inputs.iter().fold(Fact::default(), |a, b| a.or(*b));
        let axis = node.int("axis").unwrap_or(0);
        let on_last = axis == -1 || any.rank.is_some_and(|r| axis + 1 == r as i64);
        let total = || inputs.iter().map(|f| f.last).sum::<Option<i64>>();
        let last = match any.rank {
            _ if on_last => total(),
            Some(_) => any.last,
            None => None,
        };
        Fact { last, ..any }
    }
}

fn declared(fact: &TypeFact) -> Fact {
    let last = fact.dims.as_ref().and_then(|d| match d.last() {
        Some(Dim::Fixed(n)) => Some(*n),
        _ => None,
    });
    Fact {
        dtype: fact.dtype,
        rank: fact.dims.as_ref().map(Vec::len),
        last,
    }
}

fn as_rank(length: Option<i64>) -> Option<usize> {
    usize::try_from(length?).ok()
}

/// The highest rank, if all are known.
fn highest(ranks: &[Option<usize>]) -> Option<usize> {
    ranks
        .iter()
        .copied()
        .collect::<Option<Vec<_>>>()?
        .into_iter()
        .max()
}
