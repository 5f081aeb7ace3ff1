//! Rows that begin inside of a model: what stands at hook points comes with them.
//!
//! What lies behind a hook point often reads one position at a time, so that a row need be no longer than what is asked: a chunk of positions,
//! or a single one. Such short rows are made where nothing forbids it: the length is free, every input can be filled in for another length,
//! nothing behind is edited by position, and rows of a run do not change each other. Whoever makes them holds the answer against a whole row.

use crate::{
    engine::{EngineError, NamedTensor, PickSpec, RowGroup},
    ipc::info::InputRole,
    methods::{
        input,
        subject::{Show, Subject},
    },
};

/// How rows are made for a row of so many positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::methods) struct Rows {
    /// Rows may be shorter than the row.
    pub(in crate::methods) short: bool,
    /// Rows may not share a group.
    pub(in crate::methods) alone: bool,
}

impl Rows {
    /// For a hook point whose positions the model fixes or not.
    pub(in crate::methods) fn of(
        subject: &Subject,
        positions: usize,
        fixed: Option<usize>,
    ) -> Self {
        let info = subject.info();
        let fills = |role| {
            matches!(
                role,
                InputRole::TokenIds
                    | InputRole::AttentionMask
                    | InputRole::TypeIds
                    | InputRole::PositionIds
                    | InputRole::Past
            )
        };
        let all = info.inputs.iter();
        Self {
            short: fixed.is_none()
                && info.fixed_length.is_none()
                && !info.rows_interact
                && !subject.handle.is_edited()
                && subject.tokens.len() == positions
                && subject.ids_input().is_some()
                && all.clone().all(|i| fills(i.role) && i.is_batched()),
            alone: info.rows_interact || !all.clone().all(|i| i.is_batched()),
        }
    }

    /// A group of rows of so many positions, with what stands at hook points and what is wanted.
    pub(in crate::methods) fn group(
        self,
        subject: &Subject,
        (rows, length): (usize, usize),
        states: Vec<NamedTensor>,
        picks: Vec<PickSpec>,
    ) -> Result<RowGroup, EngineError> {
        if !self.short {
            let group = subject.group(&Show::default(), rows, states)?;
            return Ok(RowGroup { picks, ..group });
        }
        let ids: Vec<u32> = subject.tokens.iter().take(length).map(|t| t.id).collect();
        let input = subject
            .ids_input()
            .ok_or_else(|| EngineError::internal("a short row of a model without tokens"))?;
        let mut inputs = states;
        inputs.push(input::rows_of_ids(input, rows, &ids.repeat(rows))?);
        Ok(RowGroup {
            inputs,
            rows,
            length: Some(length),
            picks,
        })
    }
}
