#!/usr/bin/env bash
# grpcurl, which knows nothing of our protos but what reflection (v1alpha) tells it.
#
# usage: grpcurl.sh GRPCURL ADDRESS
set -uo pipefail
grpcurl=$1
address=$2
failed=0

# check NAME PATTERN ARGS...: what grpcurl says, both outputs together and blanks made single, must match the extended pattern.
check() {
    local name=$1 pattern=$2 said
    shift 2
    said=$("$grpcurl" -plaintext -max-time 10 "$@" 2>&1 | tr -s '[:space:]' ' ')
    if grep -Eq -- "$pattern" <<<"$said"; then
        printf 'ok      grpcurl: %s\n' "$name"
    else
        printf 'FAILED  grpcurl: %s\n%s\nwas looked for in\n%s\n' "$name" "$pattern" "$said"
        failed=1
    fi
}

text='"input": {"text": {"text": "A delight from beginning to end."}}'

check "list" \
    'grpc.health.v1.Health.* inference.GRPCInferenceService introspect.v1.AnalysisService introspect.v1.AttributionService introspect.v1.CaptureService introspect.v1.InterventionService introspect.v1.ModelService introspect.v1.ProbeService' \
    "$address" list
check "describe a service" 'rpc Capture ?\( \.introspect\.v1\.CaptureRequest \) returns \( stream ' \
    "$address" describe introspect.v1.CaptureService
check "describe a message" 'message Selection .* repeated string hooks = 1;' "$address" describe introspect.v1.Selection
check "health" '"status": "SERVING"' "$address" grpc.health.v1.Health/Check
check "ListModels" '"name": "sentiment", "state": "MODEL_STATE_READY"' "$address" introspect.v1.ModelService/ListModels
check "Capture" '"header": .*"name": "blocks.0.attn.hook_pattern".*"label": "positive".*"summary": .*"crc32c"' \
    -d "{\"model\": \"sentiment\", $text, \"selection\": {\"hooks\": [\"attentions.0\"]}}" \
    "$address" introspect.v1.CaptureService/Capture
check "Attribute" '"header": .*"label": "positive".*"result": .*"method": "integrated_gradients".*"delta".*"name": "attributions".*"crc32c"' \
    -d "{\"model\": \"sentiment\", $text}" \
    "$address" introspect.v1.AttributionService/Attribute
check "Intervene" '"original": .*"modified": .*"effect": .*"kl": .*"summary"' \
    -d "{\"model\": \"sentiment\", $text, \"intervention\": {\"edits\": [{\"hook\": \"attn.hook_z\", \"layers\": [3], \"heads\": [1], \"zero\": {}}]}}" \
    "$address" introspect.v1.InterventionService/Intervene
check "ModelInfer" '"outputs": \[ \{ "name": "logits", "datatype": "FP32"' \
    -d '{"model_name": "sentiment", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": ["Z29vZA=="]}}]}' \
    "$address" inference.GRPCInferenceService/ModelInfer
check "an error with its details" 'Code: InvalidArgument.*selection\.hooks.*google\.rpc\.(ErrorInfo|BadRequest)' \
    -d "{\"model\": \"sentiment\", $text, \"selection\": {\"hooks\": [\"no_such_point\"]}}" \
    "$address" introspect.v1.CaptureService/Capture
exit "$failed"
