"""The daemon as an operator starts it, a client of its AttributionService, and its metrics."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import grpc
import numpy as np

from introspect.v1 import attribution_pb2 as pb
from introspect.v1 import attribution_pb2_grpc, common_pb2

LOAD_LIMIT = 300  # seconds
FILES = ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json"]
TYPES = {common_pb2.D_TYPE_F32: np.dtype("<f4"), common_pb2.D_TYPE_F64: np.dtype("<f8")}


class Answer:
    """What a call brought, and how long it took for the client."""

    def __init__(self, messages, started):
        pieces = {}
        for message in messages:
            kind = message.WhichOneof("item")
            if kind == "tensor":
                tensor = message.tensor
                pieces.setdefault(tensor.name, (tensor, bytearray()))[1].extend(tensor.data)
            elif kind in ("header", "result", "summary"):
                setattr(self, kind, getattr(message, kind))
        self.seconds = time.perf_counter() - started
        self.tensors = {
            name: np.frombuffer(bytes(data), TYPES[t.dtype]).reshape(tuple(t.shape)) for name, (t, data) in pieces.items()
        }

    @property
    def scores(self):
        return self.tensors["attributions"].astype(np.float64)

    @property
    def rows(self):
        return self.result.cost.forward_rows + self.result.cost.gradient_rows


class Daemon:
    """Over these folders, on so many threads; gone when left."""

    def __init__(self, binary, work, folders, threads):
        self.repository = tempfile.TemporaryDirectory(dir=work)
        for name, folder in folders.items():
            into = pathlib.Path(self.repository.name) / name
            into.mkdir()
            for file in FILES:
                if (pathlib.Path(folder) / file).is_file():
                    shutil.copyfile(pathlib.Path(folder) / file, into / file)
        command = [binary, "serve", "--models", self.repository.name, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
        command += ["--threads", str(threads), "--log-format", "json"]
        self.log = open(pathlib.Path(work) / "daemon.log", "w+")
        self.process = subprocess.Popen(command, stderr=self.log)

    def __enter__(self):
        try:
            self.address, self.admin = self.ready()
        except BaseException:
            self.__exit__()
            raise
        self.channel = grpc.insecure_channel(self.address)
        self.stub = attribution_pb2_grpc.AttributionServiceStub(self.channel)
        return self

    def ready(self):
        until = time.monotonic() + LOAD_LIMIT
        while time.monotonic() < until and self.process.poll() is None:
            lines = pathlib.Path(self.log.name).read_text().splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("}\n")]
            if any(entry.get("message") == "ready" for entry in entries):
                return next((entry["grpc"], entry["admin"]) for entry in entries if "grpc" in entry)
            time.sleep(0.1)
        raise SystemExit(f"the daemon did not become ready:\n{pathlib.Path(self.log.name).read_text()}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.log.close()
        self.repository.cleanup()

    def workers(self):
        """Ids of the processes that it started."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                stat = pathlib.Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            # the name, in brackets, may hold blanks
            if entry.isdigit() and int(stat.rsplit(") ", 1)[1].split()[1]) == self.process.pid:
                found.append(int(entry))
        return found

    def worker_peak(self):
        """Greatest resident memory of its only worker so far, bytes."""
        (worker,) = self.workers()
        lines = pathlib.Path(f"/proc/{worker}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def counter(self, name):
        """The sum over the labels of a counter."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics") as page:
            lines = page.read().decode().splitlines()
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))))

    def attribute(self, model, ids=None, baseline=None, text=None, target=None, **method):
        """`method` is one field of `Method`. `ids` and `baseline` are rows of one."""
        request = pb.AttributeRequest(model=model, method=pb.Method(**method))
        if text is None:
            request.input.tokens.ids.extend(ids[0].tolist())
            request.baseline.tokens.ids.extend(baseline[0].tolist())
        else:
            request.input.text.text = text
        if target is not None:
            request.target.choice.index = target
        started = time.perf_counter()
        return Answer(self.stub.Attribute(request), started)
