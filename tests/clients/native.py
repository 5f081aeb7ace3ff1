"""Python grpcio with generated stubs: captures, deadlines, cancellation, health, reflection, details of errors, compression.

usage: python native.py ADDRESS METRICS_URL
"""
import sys
import threading
import time
import urllib.request

import grpc
import numpy
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from captures import Ledger, Reader, request, tokens, whole
from checks import Checks, metric
from introspect.v1 import capture_pb2, capture_pb2_grpc, common_pb2, model_pb2, model_pb2_grpc

ADDRESS, METRICS = sys.argv[1:]
TEXT = "The plot is thin, but the acting is a delight."
BULK = "introspect.v1.CaptureService/CaptureStream"

check = Checks("grpcio")
channel = grpc.insecure_channel(ADDRESS, options=[("grpc.max_receive_message_length", 64 << 20)])
capture = capture_pb2_grpc.CaptureServiceStub(channel)
models = model_pb2_grpc.ModelServiceStub(channel)
health = health_pb2_grpc.HealthStub(channel)


def page():
    with urllib.request.urlopen(METRICS, timeout=5) as answer:
        return answer.read().decode()


def eventually(what, holds, seconds=5):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def error_of(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeded")


def detail(error, kind):
    """A google.rpc detail of an error, as grpcio-status reads it."""
    status = rpc_status.from_call(error)
    assert status is not None, "the error carries no google.rpc.Status"
    assert status.code == error.code().value[0] and status.message == error.details()
    for any_ in status.details:
        found = kind()
        if any_.Unpack(found):
            return found
    raise AssertionError(f"no {kind.DESCRIPTOR.name} in {status}")


def bulk(id_, one):
    return capture_pb2.CaptureStreamRequest(id=id_, request=one)


class Slowly:
    """Requests of a stream that stays open until `done` is set."""

    def __init__(self, requests):
        self.requests, self.done = list(requests), threading.Event()

    def __iter__(self):
        yield from self.requests
        self.done.wait(30)


@check("ListModels tells every model of the repository")
def _():
    listed = models.ListModels(model_pb2.ListModelsRequest())
    states = {m.name: m.state for m in listed.models}
    assert states == {name: model_pb2.MODEL_STATE_READY for name in ("bert", "gpt2", "sentiment")}, states


@check("GetModel tells anatomy, hook points and a certificate that holds")
def _():
    model = models.GetModel(model_pb2.GetModelRequest(model="sentiment")).model
    assert (model.dims.layers, model.dims.heads, model.dims.d_model) == (4, 4, 128), model.dims
    assert model.certificate.passed and len(model.certificate.checks) > 4
    assert list(model.labels) == ["negative", "positive"]
    return f"{len(model.hooks)} hook points, {len(model.certificate.checks)} checks"


@check("Capture comes in pieces, is put together, and its CRC-32C holds")
def _():
    answer = whole(capture.Capture(request("sentiment", TEXT, "attentions.*", "hidden_states.*")))
    n = len(answer.header.tokens)
    patterns = [answer.tensors[f"blocks.{layer}.attn.hook_pattern"] for layer in range(4)]
    for pattern in patterns:
        assert pattern.shape == (4, n, n)
        numpy.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-5)
    assert list(answer.tensors) == list(answer.header.tensors), "in the announced order"
    best, other = answer.prediction.at[0].candidates
    assert {best.label, other.label} == {"negative", "positive"} and best.logit >= other.logit
    text = TEXT.encode()
    words = [text[t.start : t.end].decode().lower() for t in answer.header.tokens if not t.special]
    assert words[:2] == ["the", "plot"], words
    return f"{answer.summary.bytes} bytes in {answer.summary.messages} messages"


@check("a long input fills its pieces, and no piece is above 256 KiB")
def _():
    answer = whole(capture.Capture(tokens("sentiment", [2] + [1000 + i for i in range(126)] + [3], "pattern")))
    pattern = answer.tensors["blocks.3.attn.hook_pattern"]
    assert pattern.shape == (4, 128, 128)
    numpy.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-5)


@check("F16 and sparse attention are the dense answer, rounded and thinned")
def _():
    dense = whole(capture.Capture(request("sentiment", TEXT, "attentions.1"))).tensors["blocks.1.attn.hook_pattern"]
    half = whole(capture.Capture(request("sentiment", TEXT, "attentions.1", dtype=common_pb2.D_TYPE_F16)))
    numpy.testing.assert_array_equal(half.tensors["blocks.1.attn.hook_pattern"], dense.astype("f2"))
    thin = common_pb2.SparseAttention(top_k=3, floor=0)
    sparse = whole(capture.Capture(request("sentiment", TEXT, "attentions.1", sparse_attention=thin)))
    (piece,) = sparse.sparse["blocks.1.attn.hook_pattern"]
    counts = numpy.frombuffer(piece.counts, "<u4")
    keys = numpy.frombuffer(piece.indices, "<u4").reshape(-1, 3)
    values = numpy.frombuffer(piece.values, "<f4").reshape(-1, 3)
    rows = dense.reshape(-1, dense.shape[-1])
    assert (counts == 3).all() and len(counts) == len(rows)
    numpy.testing.assert_allclose(values, numpy.take_along_axis(rows, keys, axis=1), atol=5e-5)
    numpy.testing.assert_allclose(values, -numpy.sort(-rows, axis=1)[:, :3], atol=5e-5)


@check("a row of a bulk stream is what it is alone")
def _():
    ids = [[2] + [1000 + 7 * i + j for j in range(3 + i)] + [3] for i in range(40)]
    asked = [bulk(f"row-{i}", tokens("sentiment", row, "resid_post", layers=[2])) for i, row in enumerate(ids)]
    readers, answers, order, ledger, summary = {}, {}, [], Ledger(), None
    for message in capture.CaptureStream(iter(asked)):
        assert summary is None, "nothing comes after the summary"
        if message.WhichOneof("answer") == "summary":
            summary = message.summary
            continue
        assert message.WhichOneof("answer") == "capture", message
        if message.capture.WhichOneof("item") == "summary":
            ledger.messages += 1
        else:
            ledger.take(message.capture)
        answer = readers.setdefault(message.id, Reader()).take(message.capture)
        if answer:
            answers[message.id] = answer
            order.append(message.id)
    ledger.check(summary)
    assert order == [a.id for a in asked] and summary.answered == 40 and summary.failed == 0
    for i in (0, 17, 39):
        alone = whole(capture.Capture(asked[i].request)).tensors["blocks.2.hook_resid_post"]
        numpy.testing.assert_allclose(answers[f"row-{i}"].tensors["blocks.2.hook_resid_post"], alone, atol=1e-4)


@check("one bad input of a bulk stream fails alone, with its field")
def _():
    asked = [
        bulk("good", request("sentiment", TEXT, "attentions.0")),
        bulk("bad", request("sentiment", TEXT, "attentions.99")),
        bulk("also good", request("sentiment", TEXT, "attentions.0")),
    ]
    failures, summary = {}, None
    for message in capture.CaptureStream(iter(asked)):
        if message.WhichOneof("answer") == "failure":
            failures[message.id] = message.failure
        elif message.WhichOneof("answer") == "summary":
            summary = message.summary
    assert list(failures) == ["bad"] and failures["bad"].field, failures
    assert (summary.answered, summary.failed) == (2, 1)


@check("an error carries google.rpc details: a bad field")
def _():
    error = error_of(lambda: whole(capture.Capture(request("sentiment", TEXT, "no_such_point"))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    info = detail(error, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("introspectd", "BAD_FIELD")
    field = detail(error, error_details_pb2.BadRequest).field_violations[0].field
    assert field.startswith("selection.hooks"), field
    return field


@check("an error carries google.rpc details: a model that is not there")
def _():
    error = error_of(lambda: whole(capture.Capture(request("nobody", TEXT, "pattern"))))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    assert detail(error, error_details_pb2.ErrorInfo).reason == "NOT_FOUND"


@check("a deadline ends a stream that stays open, at the daemon too")
def _():
    before = metric(page(), "introspectd_requests_total", method=BULK, code="DEADLINE_EXCEEDED")
    asked = Slowly([bulk("a", request("sentiment", TEXT, "pattern"))])
    begun = time.monotonic()
    error = error_of(lambda: list(capture.CaptureStream(iter(asked), timeout=0.5)))
    took = time.monotonic() - begun
    asked.done.set()
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    assert 0.4 < took < 1.5, took
    ended = lambda: metric(page(), "introspectd_requests_total", method=BULK, code="DEADLINE_EXCEEDED") == before + 1
    eventually("the daemon counts a call that ended by its deadline", ended)
    return f"after {took:.2f} s of 0.50"


@check("a cancelled stream is over at the daemon")
def _():
    before = metric(page(), "introspectd_requests_total", method=BULK, code="CANCELLED")
    many = (bulk(str(i), request("sentiment", TEXT, "*")) for i in range(100_000))
    call = capture.CaptureStream(many)
    for _ in range(20):
        next(call)
    call.cancel()
    ended = lambda: metric(page(), "introspectd_requests_total", method=BULK, code="CANCELLED") == before + 1
    eventually("the daemon counts a call whose caller left", ended)
    idle = lambda: metric(page(), "introspectd_inflight_requests", method=BULK) == 0
    eventually("nothing of it is in flight", idle)
    whole(capture.Capture(request("sentiment", TEXT, "pattern"), timeout=5))


@check("gzip both ways gives the same answer")
def _():
    plain = whole(capture.Capture(request("sentiment", TEXT, "pattern")))
    zipped = whole(capture.Capture(request("sentiment", TEXT, "pattern"), compression=grpc.Compression.Gzip))
    for name, tensor in plain.tensors.items():
        numpy.testing.assert_array_equal(zipped.tensors[name], tensor)


@check("Tokenize gives bytes of the text")
def _():
    text = "Größe zählt 🎬 here"
    answer = models.Tokenize(model_pb2.TokenizeRequest(model="sentiment", texts=[common_pb2.Text(text=text)]))
    said = [text.encode()[t.start : t.end].decode() for t in answer.encodings[0].tokens if not t.special]
    assert "here" in said, said


@check("health of each service, and of one that is not there")
def _():
    for service in ("", "introspect.v1.ModelService", "introspect.v1.CaptureService", "inference.GRPCInferenceService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
    error = error_of(lambda: health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


@check("a watch of the health begins with what is")
def _():
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


@check("the reflection database (v1alpha) finds services, and messages by name")
def _():
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName("introspect.v1.CaptureService")
    assert {m.name for m in service.methods} == {"Capture", "CaptureStream"}
    assert "axes" in pool.FindMessageTypeByName("introspect.v1.Tensor").fields_by_name
    assert pool.FindServiceByName("grpc.health.v1.Health")
    pool.FindMessageTypeByName("google.rpc.ErrorInfo")


check.end()
