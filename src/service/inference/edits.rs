//! The parameter `intervention` of a request: what is changed inside of the model while its rows run.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use super::rows;
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, RowGroup},
    methods::{input, intervene::Editor},
    service::wire::{
        self, inference as pb, inference::infer_parameter::ParameterChoice, introspect,
    },
};

/// Name of the parameter.
const PARAMETER: &str = "intervention";
const MESSAGE: &str = "introspect.v1.Intervention";

static INTERVENTION: LazyLock<MessageDescriptor> = LazyLock::new(|| {
    DescriptorPool::decode(wire::DESCRIPTORS)
        .ok()
        .and_then(|pool| pool.get_message_by_name(MESSAGE))
        .expect("the descriptors were made with this crate")
});

/// The intervention of a request, from its JSON.
pub(super) fn asked(
    request: &pb::ModelInferRequest,
) -> Result<Option<introspect::Intervention>, EngineError> {
    let Some(parameter) = request.parameters.get(PARAMETER) else {
        return Ok(None);
    };
    let invalid = |why: String| EngineError::invalid(format!("parameters.{PARAMETER}"), why);
    let Some(ParameterChoice::StringParam(json)) = &parameter.parameter_choice else {
        return Err(invalid(format!(
            "must be a string: the JSON of an {MESSAGE}"
        )));
    };
    let mut reader = serde_json::Deserializer::from_str(json);
    let read = DynamicMessage::deserialize(INTERVENTION.clone(), &mut reader);
    let read = read.and_then(|message| reader.end().map(|()| message));
    let message = read.map_err(|e| invalid(format!("is no JSON of an {MESSAGE}: {e}")))?;
    let intervention = message.transcode_to().map_err(EngineError::internal)?;
    Ok(Some(intervention))
}

/// Rows with the model that they run on: all of them as it is, or each group on what the intervention makes of it for its extents.
pub(super) async fn apart(
    editor: Option<&Editor>,
    handle: &ModelHandle,
    groups: Vec<RowGroup>,
    (lane, ctx): (Lane, &Ctx),
) -> Result<Vec<(ModelHandle, Vec<RowGroup>)>, EngineError> {
    let Some(editor) = editor else {
        return Ok(vec![(handle.clone(), groups)]);
    };
    let mut edited = Vec::with_capacity(groups.len());
    for group in groups {
        let first = rows::first(handle.info(), &group);
        let changed = editor.edited(handle, &first, (lane, ctx)).await;
        edited.push((changed.map_err(told)?, vec![group]));
    }
    Ok(edited)
}

/// Paths of fields from the request on.
pub(super) fn told(error: EngineError) -> EngineError {
    let of_edits = |field: &str| field.starts_with(PARAMETER);
    let of_rows = matches!(&error, EngineError::InvalidArgument { field, .. } if !of_edits(field));
    if of_rows {
        input::at_field(error, "inputs")
    } else {
        error.beneath("parameters")
    }
}
