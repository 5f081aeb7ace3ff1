"""What every Python client here needs of CaptureService: requests, and answers put together and checked against their summary."""
import dataclasses

import google_crc32c
import numpy

from introspect.v1 import capture_pb2, common_pb2

TYPES = {
    common_pb2.D_TYPE_F32: numpy.dtype("<f4"),
    common_pb2.D_TYPE_F16: numpy.dtype("<f2"),
    common_pb2.D_TYPE_I64: numpy.dtype("<i8"),
}


def request(model, text, *hooks, **selection):
    return capture_pb2.CaptureRequest(
        model=model,
        input=common_pb2.Input(text=common_pb2.Text(text=text)),
        selection=common_pb2.Selection(hooks=hooks, **selection),
    )


def tokens(model, ids, *hooks, **selection):
    return capture_pb2.CaptureRequest(
        model=model,
        input=common_pb2.Input(tokens=common_pb2.TokenIds(ids=ids)),
        selection=common_pb2.Selection(hooks=hooks, **selection),
    )


@dataclasses.dataclass
class Answer:
    header: object = None
    tensors: dict = dataclasses.field(default_factory=dict)
    sparse: dict = dataclasses.field(default_factory=dict)
    prediction: object = None
    summary: object = None


class Ledger:
    """Counts and signs messages as the daemon does."""

    def __init__(self):
        self.messages, self.bytes, self.crc = 0, 0, 0

    def take(self, message):
        self.messages += 1
        kind = message.WhichOneof("item")
        parts = []
        if kind == "tensor":
            parts = [message.tensor.data]
        elif kind == "sparse":
            parts = [message.sparse.counts, message.sparse.indices, message.sparse.values]
        for part in parts:
            self.bytes += len(part)
            self.crc = google_crc32c.extend(self.crc, part)

    def check(self, summary):
        assert (summary.messages, summary.bytes, summary.crc32c) == (self.messages, self.bytes, self.crc), (summary, self.__dict__)


class Reader:
    """Puts the messages of one answer together."""

    def __init__(self):
        self.answer, self.ledger, self.pieces = Answer(), Ledger(), {}

    def take(self, message):
        """The answer, with its last message."""
        kind = message.WhichOneof("item")
        assert (kind == "header") == (self.ledger.messages == 0), "the header comes first, and once"
        if kind == "summary":
            self.ledger.check(message.summary)
            self.answer.summary = message.summary
            for name, (tensor, data) in self.pieces.items():
                self.answer.tensors[name] = numpy.frombuffer(bytes(data), TYPES[tensor.dtype]).reshape(tuple(tensor.shape))
            return self.answer
        self.ledger.take(message)
        if kind == "header":
            self.answer.header = message.header
        elif kind == "tensor":
            tensor = message.tensor
            assert len(tensor.data) <= 256 << 10
            _, data = self.pieces.setdefault(tensor.name, (tensor, bytearray()))
            assert tensor.offset == len(data), "pieces follow each other"
            data += tensor.data
        elif kind == "sparse":
            self.answer.sparse.setdefault(message.sparse.name, []).append(message.sparse)
        else:
            self.answer.prediction = message.prediction
        return None


def whole(stream):
    """Reads an answer to its end."""
    reader, answer = Reader(), None
    for message in stream:
        assert answer is None, "nothing comes after the summary"
        answer = reader.take(message)
    assert answer is not None, "a stream without a summary is incomplete"
    return answer
