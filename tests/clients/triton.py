"""tritonclient[grpc] as it comes from PyPI, unchanged, against the Open Inference Protocol.

usage: python triton.py ADDRESS
"""
import json
import queue
import sys

import numpy
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from checks import Checks

check = Checks("tritonclient")
client = triton.InferenceServerClient(sys.argv[1])

IDS = numpy.array([[2, 1000, 1001, 1002, 3], [2, 1010, 1011, 1012, 3]], numpy.int64)
GOOD, BAD = "A delight from beginning to end.", "Dull, thin and much too long."


def tensors(ids=IDS):
    given = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
    inputs = []
    for name, value in given.items():
        inputs.append(triton.InferInput(name, value.shape, "INT64"))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def texts(*said):
    text = triton.InferInput("text", [len(said)], "BYTES")
    text.set_data_from_numpy(numpy.array([s.encode() for s in said], object))
    return [text]


def outputs(*names, **options):
    return [triton.InferRequestedOutput(name, **options) for name in names]


@check("server and model are live and ready")
def _():
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("sentiment")
    assert not client.is_model_ready("nobody")


@check("get_server_metadata")
def _():
    metadata = client.get_server_metadata()
    assert metadata.name == "introspectd" and metadata.version
    return ", ".join(metadata.extensions)


@check("get_model_metadata")
def _():
    metadata = client.get_model_metadata("sentiment")
    assert {i.name: (i.datatype, list(i.shape)) for i in metadata.inputs}["input_ids"] == ("INT64", [-1, -1])
    assert [(o.name, o.datatype) for o in metadata.outputs] == [("logits", "FP32")]


@check("get_model_repository_index")
def _():
    index = {m.name: m.state for m in client.get_model_repository_index().models}
    assert index == {"bert": "READY", "gpt2": "READY", "sentiment": "READY"}, index


@check("infer with tensors")
def _():
    answer = client.infer("sentiment", tensors(), request_id="mine")
    assert answer.get_response().id == "mine"
    assert answer.as_numpy("logits").shape == (2, 2)
    alone = client.infer("sentiment", tensors(IDS[1:])).as_numpy("logits")
    numpy.testing.assert_allclose(answer.as_numpy("logits")[1:], alone, atol=1e-5)


@check("infer with text in BYTES, tokenised by the daemon")
def _():
    logits = client.infer("sentiment", texts(GOOD, BAD)).as_numpy("logits")
    assert logits.argmax(axis=1).tolist() == [1, 0], logits


@check("hook points as requested outputs")
def _():
    asked = outputs("attentions.0", "blocks.3.hook_resid_post", "logits")
    answer = client.infer("sentiment", tensors(), outputs=asked)
    pattern = answer.as_numpy("attentions.0")
    assert pattern.shape == (2, 4, 5, 5)
    numpy.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-5)
    assert answer.as_numpy("blocks.3.hook_resid_post").shape == (2, 5, 128)
    plain = client.infer("sentiment", tensors()).as_numpy("logits")
    numpy.testing.assert_allclose(answer.as_numpy("logits"), plain, rtol=1e-4, atol=1e-5)


@check("an intervention as a parameter")
def _():
    silent = {"edits": [{"hook": "hook_mlp_out", "layers": [3], "zero": {}}]}
    asked = outputs("mlp_out.3", "logits")
    answer = client.infer("sentiment", tensors(), outputs=asked, parameters={"intervention": json.dumps(silent)})
    assert not answer.as_numpy("mlp_out.3").any()
    plain = client.infer("sentiment", tensors()).as_numpy("logits")
    assert numpy.abs(answer.as_numpy("logits") - plain).max() > 1e-3


@check("class_count")
def _():
    answer = client.infer("sentiment", texts(GOOD), outputs=outputs("logits", class_count=2))
    said = [entry.decode().split(":") for entry in answer.as_numpy("logits").reshape(-1)]
    assert [label for _, _, label in said] == ["positive", "negative"], said
    assert float(said[0][0]) > float(said[1][0])


@check("async_infer")
def _():
    answers = queue.Queue()
    for _ in range(16):
        client.async_infer("sentiment", texts(GOOD), callback=lambda result, error: answers.put((result, error)))
    for _ in range(16):
        result, error = answers.get(timeout=10)
        assert error is None and result.as_numpy("logits").argmax() == 1


@check("stream_infer answers in order")
def _():
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for at in range(16):
        client.async_stream_infer("sentiment", texts(GOOD if at % 2 else BAD), request_id=str(at))
    for at in range(16):
        result, error = answers.get(timeout=10)
        assert error is None and result.get_response().id == str(at)
        assert result.as_numpy("logits").argmax() == at % 2
    client.stop_stream()


@check("an error of the daemon arrives as an InferenceServerException")
def _():
    try:
        client.infer("sentiment", tensors(), outputs=outputs("no_such_point"))
    except InferenceServerException as error:
        assert error.status() == "StatusCode.INVALID_ARGUMENT", error
        return error.message()
    raise AssertionError("it succeeded")


@check("get_inference_statistics counts")
def _():
    before = client.get_inference_statistics("sentiment").model_stats[0]
    client.infer("sentiment", tensors())
    after = client.get_inference_statistics("sentiment").model_stats[0]
    assert after.inference_count == before.inference_count + 2
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns


@check("unload_model and load_model")
def _():
    client.unload_model("gpt2")
    assert not client.is_model_ready("gpt2")
    client.load_model("gpt2")
    assert client.is_model_ready("gpt2")
    assert client.is_model_ready("sentiment"), "the others serve on"


client.close()
check.end()
