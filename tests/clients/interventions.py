"""Python grpcio with generated stubs: interventions, sweeps, circuits, and what heads, neurons and layers say, put together and checked.

usage: python interventions.py ADDRESS
"""
import sys

import grpc
import numpy

from captures import TYPES, Ledger
from checks import Checks
from introspect.v1 import analysis_pb2_grpc, attribution_pb2, capture_pb2, capture_pb2_grpc, common_pb2
from introspect.v1 import heads_pb2, intervene_pb2, intervene_pb2_grpc, intervention_pb2, lens_pb2, neurons_pb2

ADDRESS = sys.argv[1]
TEXT = "This movie was fantastic!"

check = Checks("grpcio")
channel = grpc.insecure_channel(ADDRESS)
service = intervene_pb2_grpc.InterventionServiceStub(channel)
analysis = analysis_pb2_grpc.AnalysisServiceStub(channel)
ALL = {**TYPES, common_pb2.D_TYPE_U32: numpy.dtype("<u4")}


def text(words):
    return common_pb2.Input(text=common_pb2.Text(text=words))


def ids(*given):
    return common_pb2.Input(tokens=common_pb2.TokenIds(ids=given))


def edits(*given):
    return intervention_pb2.Intervention(edits=given)


def without(layer, head):
    return intervention_pb2.Edit(hook="attn.hook_z", layers=[layer], heads=[head], zero=intervention_pb2.Zero())


class Answer:
    """The messages of one answer: one of each kind, all of those that repeat, tensors put together, the summary checked."""

    def __init__(self, messages):
        ledger, self.pieces, self.all, self.summary = Ledger(), {}, {}, None
        for message in messages:
            kind = message.WhichOneof("item")
            assert self.summary is None, "nothing comes after the summary"
            if kind == "summary":
                self.summary = message.summary
                ledger.check(message.summary)
                continue
            ledger.take(message)
            if kind == "tensor":
                self.pieces.setdefault(message.tensor.name, (message.tensor, bytearray()))[1].extend(message.tensor.data)
            else:
                self.all.setdefault(kind, []).append(getattr(message, kind))
        assert self.summary is not None, "a stream without a summary is incomplete"

    def one(self, kind):
        (found,) = self.all[kind]
        return found

    def tensor(self, name):
        tensor, data = self.pieces[name]
        return numpy.frombuffer(bytes(data), ALL[tensor.dtype]).reshape(tuple(tensor.shape))


def intervene(words, intervention, model="sentiment"):
    request = intervene_pb2.InterveneRequest(model=model, input=text(words), intervention=intervention)
    messages = list(service.Intervene(request))
    kinds = [message.WhichOneof("item") for message in messages]
    assert kinds[0] == "header" and kinds[-1] == "summary" and messages[-1].summary.messages == len(messages) - 1, kinds
    (effect,) = [message.effect for message in messages if message.WhichOneof("item") == "effect"]
    return effect.at[0]


def sweep(**fields):
    target = fields.pop("target", None)
    return Answer(service.Sweep(intervene_pb2.SweepRequest(target=target, **fields)))


def refused(code, field, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code and field in error.details(), error
        return
    raise AssertionError(f"nothing was refused, {code} was expected")


@check("Intervene: an edit that changes nothing changes nothing; one that does is what a sweep finds for it")
def _():
    null = intervene(TEXT, edits(intervention_pb2.Edit(hook="hook_resid_post", layers=[1], scale=1.0)))
    assert null.kl == 0 and not null.flipped and all(c.logit_before == c.logit_after for c in null.changes), null
    found = sweep(
        model="sentiment",
        input=text(TEXT),
        hooks=["attn.hook_z"],
        by=[intervene_pb2.SWEEP_AXIS_HEAD],
        zero=intervention_pb2.Zero(),
        target=attribution_pb2.Target(choice=attribution_pb2.Choice(label="positive")),
    )
    header = found.one("header")
    worst = (0.0, None)
    for layer, hook in enumerate(header.hooks):
        for head, effect in enumerate(found.tensor(f"effects:{hook}")):
            worst = max(worst, (abs(effect), (layer, head)))
    effect, (layer, head) = worst
    alone = intervene(TEXT, edits(without(layer, head)))
    (change,) = [c for c in alone.changes if c.label == "positive"]
    assert abs(abs(change.logit_after - change.logit_before) - effect) < 1e-4, (change, worst)
    return f"head {layer}.{head} moves the logit by {effect:.2f}"


@check("Intervene: an intervention rides on a capture")
def _():
    captures = capture_pb2_grpc.CaptureServiceStub(channel)
    request = capture_pb2.CaptureRequest(
        model="sentiment",
        input=text(TEXT),
        selection=common_pb2.Selection(hooks=["blocks.1.attn.hook_z"]),
        intervention=edits(without(1, 0)),
    )
    z = Answer(captures.Capture(request)).tensor("blocks.1.attn.hook_z")
    assert z.shape[-2] > 1 and not z[..., 0, :].any() and z[..., 1:, :].all(), z


@check("Sweep: activation patching of a whole layer gives the source's number, estimates come with their correlation")
def _():
    patching = dict(model="gpt2", input=ids(5, 9, 17, 30), patch=ids(5, 12, 17, 30), hooks=["hook_resid_pre"])
    found = sweep(**patching)
    for hook in found.one("header").hooks:
        numpy.testing.assert_allclose(found.tensor(f"normalized:{hook}"), 1, atol=1e-3)
    both = sweep(by=[intervene_pb2.SWEEP_AXIS_POSITION], method=intervene_pb2.SWEEP_METHOD_BOTH, **patching)
    result = both.one("result")
    assert result.compared == sum(both.tensor(f"effects:{h}").size for h in both.one("header").hooks), result
    return f"r {result.correlation:.3f} of {result.compared}"


@check("FindCircuit: all edges restore the source's number")
def _():
    request = intervene_pb2.FindCircuitRequest(model="gpt2", input=ids(5, 9, 17, 30), source=ids(5, 12, 17, 30), edges=100_000)
    found = Answer(service.FindCircuit(request))
    circuit, nodes = found.one("circuit"), found.one("header").nodes
    assert found.tensor("scores").shape == (len(nodes), len(nodes)) and circuit.scored >= len(circuit.edges) > 0
    assert abs(circuit.faithfulness - 1) < 1e-3, circuit.faithfulness
    return f"{circuit.scored} edges"


@check("Heads: measures are those of the captured attention")
def _():
    request = heads_pb2.HeadsRequest(model="sentiment", inputs=[text(TEXT)], measures=[heads_pb2.HEAD_MEASURE_SELF])
    found = Answer(analysis.Heads(request))
    captures = capture_pb2_grpc.CaptureServiceStub(channel)
    selection = common_pb2.Selection(hooks=["attn.hook_pattern"])
    shown = Answer(captures.Capture(capture_pb2.CaptureRequest(model="sentiment", input=text(TEXT), selection=selection)))
    patterns = [shown.tensor(name) for name in shown.pieces if name.endswith("hook_pattern")]
    ours = [numpy.trace(pattern, axis1=-2, axis2=-1) / pattern.shape[-1] for pattern in patterns]
    (name,) = found.pieces
    numpy.testing.assert_allclose(found.tensor(name), ours, atol=1e-5)
    assert found.one("ranking").heads[0].score == found.tensor(name).max()


@check("Neurons: the strongest of two texts, with the places where they are")
def _():
    def asked():
        yield neurons_pb2.NeuronsRequest(header=neurons_pb2.NeuronsHeader(model="sentiment", by=neurons_pb2.NEURON_RANKING_MAX, top_k=3, examples=1))
        for name, words in (("a", TEXT), ("b", "A dull story.")):
            yield neurons_pb2.NeuronsRequest(text=neurons_pb2.NeuronsText(id=name, input=text(words)))

    messages = list(analysis.Neurons(asked()))
    neurons = [message.neuron for message in messages if message.WhichOneof("item") == "neuron"]
    assert len(neurons) == 3 and messages[-1].WhichOneof("item") == "summary"
    for neuron in neurons:
        (example,) = neuron.examples
        assert example.id in "ab" and example.activation == neuron.max, neuron
    assert [n.max for n in neurons] == sorted((n.max for n in neurons), reverse=True)


@check("Lens: the last state reads as the model's own answer, and contributions sum to the logit")
def _():
    parts = [lens_pb2.LENS_PART_LENS, lens_pb2.LENS_PART_ATTRIBUTION]
    found = Answer(analysis.Lens(lens_pb2.LensRequest(model="gpt2", input=ids(5, 9, 17, 30), parts=parts)))
    direct = found.one("attribution")
    numpy.testing.assert_allclose(found.tensor("contributions").sum() + direct.bias, direct.value, atol=1e-3)
    captures = capture_pb2_grpc.CaptureServiceStub(channel)
    shown = list(captures.Capture(capture_pb2.CaptureRequest(model="gpt2", input=ids(5, 9, 17, 30))))
    (prediction,) = [m.prediction for m in shown if m.WhichOneof("item") == "prediction"]
    best = prediction.at[-1].candidates[0]
    assert found.tensor("top_index")[-1, -1, 0] == best.index
    numpy.testing.assert_allclose(found.tensor("top_logit")[-1, -1, 0], best.logit, atol=1e-3)


@check("what cannot be changed is refused with its field, and the daemon goes on")
def _():
    bad, missing = grpc.StatusCode.INVALID_ARGUMENT, intervention_pb2.Edit(hook="no.such.hook", zero=intervention_pb2.Zero())
    refused(bad, "intervention.edits[0].hook", lambda: intervene(TEXT, edits(missing)))
    refused(bad, "intervention.edits[0].heads", lambda: intervene(TEXT, edits(without(0, 99))))
    longer = dict(model="gpt2", input=ids(5, 9, 17), patch=ids(5, 9, 17, 30), hooks=["hook_resid_pre"])
    refused(bad, "patch", lambda: sweep(**longer))
    assert intervene(TEXT, edits(without(0, 0))).kl > 0


check.end()
