"""Kills the worker of a model by SIGSEGV in the middle of captures: clear errors on what was open, the other models serve on, and the
model is back within a second plus the time of a load.

usage: python death.py ADDRESS DAEMON_PID
"""
import os
import pathlib
import signal
import sys
import threading
import time

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from captures import tokens, whole
from checks import Checks
from introspect.v1 import capture_pb2_grpc, model_pb2, model_pb2_grpc

ADDRESS, DAEMON = sys.argv[1], int(sys.argv[2])
VICTIM = "sentiment"
LONG = [2] + [1000 + i for i in range(126)] + [3]

check = Checks("worker death")
channel = grpc.insecure_channel(ADDRESS)
capture = capture_pb2_grpc.CaptureServiceStub(channel)
models = model_pb2_grpc.ModelServiceStub(channel)


def worker_of(model):
    """The child of the daemon that has the model's file mapped."""
    for process in pathlib.Path("/proc").iterdir():
        try:
            if not process.name.isdigit():
                continue
            parent = int((process / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            if parent == DAEMON and f"/{model}/model.onnx" in (process / "maps").read_text():
                return int(process.name)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"no worker holds {model}")


def reason(error):
    info = error_details_pb2.ErrorInfo()
    for any_ in rpc_status.from_call(error).details:
        if any_.Unpack(info):
            return info.reason
    raise AssertionError(f"no ErrorInfo: {error}")


def load_seconds():
    model = models.GetModel(model_pb2.GetModelRequest(model=VICTIM)).model
    return sum(stage.seconds for stage in model.load_stages)


class Callers:
    """Threads that capture everything again and again, and keep what went wrong."""

    def __init__(self, n):
        self.errors, self.answered, self.over = [], 0, threading.Event()
        self.threads = [threading.Thread(target=self.call) for _ in range(n)]
        for thread in self.threads:
            thread.start()

    def call(self):
        while not self.over.is_set():
            try:
                whole(capture.Capture(tokens(VICTIM, LONG, "*"), timeout=10))
                self.answered += 1
            except grpc.RpcError as error:
                self.errors.append((time.monotonic(), error))
                time.sleep(0.01)

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


@check("captures that were open end with a clear error, others serve on, the model is back in time")
def _():
    load = load_seconds()
    callers = Callers(4)
    try:
        until = time.monotonic() + 20
        while callers.answered < 8:
            assert time.monotonic() < until and not callers.errors, callers.errors
            time.sleep(0.01)
        os.kill(worker_of(VICTIM), signal.SIGSEGV)
        killed = time.monotonic()
        for other in ("bert", "gpt2"):
            whole(capture.Capture(tokens(other, [2, 11, 12, 3], "pattern"), timeout=5))
        others = time.monotonic() - killed
        back = None
        while back is None:
            try:
                whole(capture.Capture(tokens(VICTIM, [2, 1000, 3], "pattern"), timeout=5))
                back = time.monotonic() - killed
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE), error
                assert time.monotonic() < killed + 30, "it never came back"
                time.sleep(0.01)
    finally:
        callers.stop()
    reasons = {reason(error) for _, error in callers.errors}
    assert reasons <= {"WORKER_DIED", "NOT_SERVING"}, reasons
    died = [error for _, error in callers.errors if reason(error) == "WORKER_DIED"]
    assert died, "no capture was open when the worker died"
    for error in died:
        assert error.code() == grpc.StatusCode.INTERNAL and "SIGSEGV" in error.details(), error
    # The callers and the restart share the cores, so that the load may take longer than it did alone.
    assert back <= 1 + max(load, load_seconds()), f"back after {back:.2f} s, a load takes {load:.2f} s"
    return f"{len(died)} open captures: {died[0].details()}; others answered within {others:.2f} s, back after {back:.2f} s, load {load:.2f} s"


check.end()
