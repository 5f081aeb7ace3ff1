"""Python grpcio with generated stubs: probes trained over a stream, listed, scored one by one and over a stream, refused, exported, deleted.

usage: python probes.py ADDRESS
"""
import sys

import grpc
import numpy

from checks import Checks
from introspect.v1 import common_pb2
from introspect.v1 import probe_pb2 as pb
from introspect.v1 import probe_pb2_grpc

ADDRESS = sys.argv[1]
MODEL = "sentiment"
LINES = [
    (f"a {word} {thing} number {number}", label)
    for number in range(10)
    for thing in ("film", "story", "song", "plot")
    for word, label in (("wonderful", "good"), ("terrible", "bad"))
]

check = Checks("grpcio")
channel = grpc.insecure_channel(ADDRESS)
service = probe_pb2_grpc.ProbeServiceStub(channel)


def text(words):
    return common_pb2.Input(text=common_pb2.Text(text=words))


def training(lines, **fields):
    yield pb.TrainRequest(header=pb.TrainHeader(model=MODEL, **fields))
    for words, label in lines:
        yield pb.TrainRequest(example=pb.Example(input=text(words), label=label))


def score(words, name="praise", **fields):
    return pb.ScoreRequest(model=MODEL, probes=[pb.ProbeReference(name=name)], input=text(words), **fields)


def refused(code, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, error
        return
    raise AssertionError(f"nothing was refused, {code} was expected")


@check("Train: a report for each layer, the result, one summary; a probe is stored")
def _():
    messages = list(service.Train(training(LINES, name="praise", seed=3)))
    kinds = [message.WhichOneof("item") for message in messages]
    assert kinds[-2:] == ["result", "summary"] and kinds.count("report") == 5, kinds
    assert messages[-1].summary.messages == len(messages) - 1
    result = messages[-2].result
    best = next(report for report in result.probe.reports if report.hook == result.probe.best)
    assert result.stored and best.classes.accuracy > 0.95, best
    return f"{best.hook}: {best.classes.accuracy:.2f}"


@check("ListProbes, GetProbe: what was trained")
def _():
    listed = service.ListProbes(pb.ListProbesRequest(model=MODEL))
    assert [probe.name for probe in listed.probes] == ["praise"] and not listed.broken
    probe = service.GetProbe(pb.GetProbeRequest(model=MODEL, name="praise")).probe
    assert list(probe.labels) == ["bad", "good"] and probe.train_examples == 64, probe


@check("Score: probabilities, tokens and the prediction of one run; a caller's own hidden states without any")
def _():
    answer = service.Score(score("a wonderful film", per_token=True, predict=True))
    (scores,) = answer.scores
    assert scores.input.label == "good" and len(scores.tokens) == len(answer.tokens)
    numpy.testing.assert_allclose(sum(scores.input.probabilities), 1, rtol=1e-4)
    assert answer.prediction.at[0].candidates[0].label == "positive"
    states = numpy.zeros((2, 128), "<f4")
    hidden = common_pb2.Tensor(dtype=common_pb2.D_TYPE_F32, shape=states.shape, data=states.tobytes())
    request = pb.ScoreRequest(model=MODEL, probes=[pb.ProbeReference(name="praise")], hidden=hidden)
    (of_nothing,) = service.Score(request).scores
    files = service.ExportProbe(pb.ExportProbeRequest(model=MODEL, name="praise", hooks=[scores.hook])).files
    assert b"weight" in files.tensors[:1024], "safetensors begins with its names"
    # Of zeros nothing is left but the bias: the last number of the only row, as names are sorted and `bias` comes first.
    length = int.from_bytes(files.tensors[:8], "little")
    bias = numpy.frombuffer(files.tensors[8 + length :], "<f4")
    assert numpy.isclose(bias, of_nothing.input.values[0], rtol=1e-5).any()


@check("ScoreStream: answers in order, a failure among them, a summary")
def _():
    texts = ["a wonderful song", "a terrible song", "a wonderful plot"]
    requests = [pb.ScoreStreamRequest(id=str(at), request=score(words)) for at, words in enumerate(texts)]
    requests.insert(1, pb.ScoreStreamRequest(id="none", request=score("a song", name="none")))
    *answers, last = service.ScoreStream(iter(requests))
    said = [(answer.id, answer.scores.scores[0].input.label if answer.HasField("scores") else "") for answer in answers]
    assert said == [("0", "good"), ("none", ""), ("1", "bad"), ("2", "good")], said
    assert answers[1].failure.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert (last.summary.answered, last.summary.failed) == (3, 1)


@check("errors: one class, a name that is no name, a name that is taken")
def _():
    invalid, taken = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
    refused(invalid, lambda: list(service.Train(training([("a", "same"), ("b", "same")]))))
    refused(invalid, lambda: list(service.Train(training(LINES, name="../up"))))
    refused(taken, lambda: list(service.Train(training(LINES, name="praise"))))


@check("DeleteProbe: it is gone")
def _():
    service.DeleteProbe(pb.DeleteProbeRequest(model=MODEL, name="praise"))
    refused(grpc.StatusCode.NOT_FOUND, lambda: service.Score(score("a song")))
    assert not service.ListProbes(pb.ListProbesRequest(model=MODEL)).probes


check.end()
