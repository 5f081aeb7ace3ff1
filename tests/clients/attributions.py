"""Python grpcio with generated stubs: attributions, their evidence, stopping early with the last partial answer, bulk, costs, errors.

usage: python attributions.py ADDRESS
"""
import sys

import grpc
import numpy

from captures import TYPES, Ledger
from checks import Checks
from introspect.v1 import attribution_pb2 as pb
from introspect.v1 import attribution_pb2_grpc, common_pb2

ADDRESS = sys.argv[1]
TEXT = "This movie was fantastic!"

check = Checks("grpcio")
channel = grpc.insecure_channel(ADDRESS)
service = attribution_pb2_grpc.AttributionServiceStub(channel)


def asked(model="sentiment", text=TEXT, **fields):
    return pb.AttributeRequest(model=model, input=common_pb2.Input(text=common_pb2.Text(text=text)), **fields)


class Answer:
    """The messages of one answer, put together and checked against the summary."""

    def __init__(self):
        self.ledger, self.pieces, self.progress = Ledger(), {}, []
        self.header = self.result = self.summary = None

    def take(self, message):
        kind = message.WhichOneof("item")
        assert self.summary is None, "nothing comes after the summary"
        if kind == "summary":
            self.ledger.check(message.summary)
            self.summary = message.summary
            return
        self.ledger.take(message)
        if kind == "tensor":
            self.pieces.setdefault(message.tensor.name, (message.tensor, bytearray()))[1].extend(message.tensor.data)
        elif kind == "progress":
            self.progress.append(message.progress)
        else:
            setattr(self, kind, getattr(message, kind))

    def tensor(self, name):
        tensor, data = self.pieces[name]
        return numpy.frombuffer(bytes(data), TYPES[tensor.dtype]).reshape(tuple(tensor.shape))

    @property
    def scores(self):
        return self.tensor("attributions")


def explained(request):
    answer = Answer()
    for message in service.Attribute(request):
        answer.take(message)
    assert answer.summary is not None, "a stream without a summary is incomplete"
    return answer


@check("integrated gradients are complete, and differences along the same path find the same")
def _():
    exact = explained(asked())
    change = exact.result.value - exact.result.baseline_value
    assert abs(exact.scores.sum() - change - exact.result.delta) < 1e-4 and exact.result.residual_ratio < 1e-3, exact.result
    text = TEXT.encode()
    best = exact.header.tokens[int(exact.scores.argmax())]
    assert text[best.start : best.end] == b"fantastic", best
    differences = explained(asked(method=pb.Method(finite_difference=pb.FiniteDifference(path_steps=20))))
    apart = numpy.abs(exact.scores - differences.scores).max() / numpy.abs(exact.scores).max()
    assert apart < 1e-3, apart
    return f"delta {exact.result.delta:.1e}, {apart:.1e} apart"


@check("a client stops long work and keeps the last partial answer")
def _():
    long = pb.Method(shapley_sampling=pb.ShapleySampling(permutations=4000))
    call = service.Attribute(asked(text=" ".join([TEXT] * 8), method=long))
    header = last = None
    for message in call:
        header = header or message.header
        if message.WhichOneof("item") == "progress" and message.progress.HasField("partial"):
            last = message.progress
            break
    call.cancel()
    partial = numpy.frombuffer(last.partial.data, TYPES[last.partial.dtype])
    assert len(partial) == len(header.tokens) and last.rows_done < last.rows_planned
    return f"{last.rows_done} of {last.rows_planned} rows"


@check("bulk answers in order, and goes on after what fails")
def _():
    ids = ["a", "b", "c"]
    requests = [asked(), asked(target=pb.Target(choice=pb.Choice(label="blue"))), asked(text="Awful.")]
    answers, failed = {}, []
    for message in service.AttributeStream(iter(pb.AttributeStreamRequest(id=i, request=r) for i, r in zip(ids, requests))):
        kind = message.WhichOneof("answer")
        if kind == "attribution":
            answers.setdefault(message.id, Answer()).take(message.attribution)
        elif kind == "failure":
            failed.append(message.id)
    assert list(answers) == ["a", "c"] and failed == ["b"], (list(answers), failed)
    alone = explained(requests[2]).scores
    numpy.testing.assert_allclose(answers["c"].scores, alone, rtol=1e-3, atol=1e-4)


@check("costs are told before, methods are compared after")
def _():
    cost = service.EstimateCost(pb.EstimateCostRequest(request=asked())).cost
    assert cost.gradient_rows == 50, cost
    methods = [pb.Method(saliency=pb.Saliency()), pb.Method(ablation=pb.Ablation())]
    found = list(service.Evaluate(pb.EvaluateRequest(request=asked(), methods=methods, skip_sensitivity=True)))
    kinds = [message.WhichOneof("item") for message in found]
    assert kinds == ["header", "evaluation", "evaluation", "comparison", "summary"], kinds
    assert all(m.evaluation.comprehensiveness > 0 for m in found[1:3]), found


@check("mistakes name their field")
def _():
    try:
        explained(asked(method=pb.Method(integrated_gradients=pb.IntegratedGradients(steps=5000))))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "integrated_gradients.steps" in error.details(), error
        return error.details()
    raise AssertionError("it was not refused")


check.end()
