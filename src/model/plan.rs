//! What a burst of operations on one model comes down to.
//!
//! Operations take effect in the order of acceptance, but those that a later one makes pointless are not carried out: what came before an
//! unload is superseded by it, several unloads are one, several loads are one.

/// What can be asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Be loaded; nothing to do when it is.
    Load,
    /// Be loaded afresh.
    Reload,
    /// Be gone.
    Unload,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First unload.
    pub unload: bool,
    /// Then load.
    pub load: Option<Fresh>,
}

/// Whether a loaded model will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// A loaded one will do.
    IfAbsent,
    /// It must be loaded now.
    Always,
}

/// The plan for operations in the order of their acceptance, and for each of them whether the plan carries it out (or a later one
/// superseded it).
pub fn plan(ops: &[Op]) -> (Plan, Vec<bool>) {
    let last_unload = ops.iter().rposition(|op| *op == Op::Unload);
    let after = last_unload.map_or(0, |at| at + 1);
    let load = if ops[after..].contains(&Op::Reload) {
        Some(Fresh::Always)
    } else {
        ops[after..].first().map(|_| Fresh::IfAbsent)
    };
    let carried = ops
        .iter()
        .enumerate()
        .map(|(at, op)| at >= after || *op == Op::Unload)
        .collect();
    let plan = Plan {
        unload: last_unload.is_some(),
        load,
    };
    (plan, carried)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![Just(Op::Load), Just(Op::Reload), Just(Op::Unload)]
    }

    #[test]
    fn a_load_after_an_unload_is_a_new_one() {
        let (made, carried) = plan(&[Op::Reload, Op::Unload, Op::Load]);
        assert_eq!(
            made,
            Plan {
                unload: true,
                load: Some(Fresh::IfAbsent)
            }
        );
        assert_eq!(carried, [false, true, true]);
    }

    #[test]
    fn many_reloads_are_one() {
        let (made, carried) = plan(&[Op::Reload, Op::Load, Op::Reload]);
        assert_eq!(
            made,
            Plan {
                unload: false,
                load: Some(Fresh::Always)
            }
        );
        assert_eq!(carried, [true; 3]);
    }

    proptest! {
        /// The plan ends where carrying out every operation one after the other would.
        #[test]
        fn the_last_accepted_operation_wins(loaded in any::<bool>(), ops in prop::collection::vec(op(), 1..20)) {
            let one_by_one = ops.iter().fold(loaded, |_, op| *op != Op::Unload);
            let (made, carried) = plan(&ops);
            let planned = made.load.is_some() || (loaded && !made.unload);
            prop_assert_eq!(planned, one_by_one);
            prop_assert_eq!(carried.last(), Some(&true), "the last operation is never superseded");
        }
    }
}
