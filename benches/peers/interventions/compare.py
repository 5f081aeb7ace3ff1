"""Ablation of every head by the daemon and by PyTorch with hooks, and rows a second beside the bare runtime; prints a table. Started by `run`."""
import argparse
import os
import pathlib
import statistics
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import onnxruntime as ort
import torch

import peers
from daemon import Answer, Daemon
from introspect.v1 import intervene_pb2 as pb
from introspect.v1 import intervene_pb2_grpc

HOOK = "attn.hook_z"
SIZES = [1, 2, 4, 8, 16, 32]  # of the bare runtime's batches
AGREE = 1e-3  # of the largest effect: what is compared must be the same thing
ALL = ["sweep", "engine"]


def arguments():
    parser = argparse.ArgumentParser(prog="run", description=__doc__)
    parser.add_argument("--binary", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", required=True, type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side; all cores")
    parser.add_argument("--runs", type=int, default=5, help="of either side; 5")
    parser.add_argument("--tokens", type=int, default=64, help="of the row; 64")
    parser.add_argument("--only", choices=ALL, action="append", help="what to measure; everything")
    return parser.parse_args()


class Ours:
    """`InterventionService.Sweep` over a loaded model."""

    def __init__(self, daemon, peer, ids):
        self.stub = intervene_pb2_grpc.InterventionServiceStub(daemon.channel)
        self.request = pb.SweepRequest(model=peer.name, hooks=[HOOK], by=[pb.SWEEP_AXIS_HEAD])
        self.request.input.tokens.ids.extend(ids[0].tolist())
        self.request.target.choice.index = peers.TARGET

    def zero(self):
        """Every head set to zero by itself."""
        request = pb.SweepRequest()
        request.CopyFrom(self.request)
        request.zero.SetInParent()
        started = time.perf_counter()
        return Answer(self.stub.Sweep(request), started)


def effects(answer):
    """`[layer, head]`."""
    hooks = answer.header.hooks
    return np.stack([answer.tensors[f"effects:{hook}"].astype(np.float64) for hook in hooks])


class Theirs:
    """PyTorch, with hooks in front of the projection that follows the heads: they leave the fast attention as it is."""

    def __init__(self, peer, ids):
        self.peer, self.ids = peer, ids
        config = peer.model.config
        self.layers = [layer.attention.output.dense for layer in peer.model.base_model.encoder.layer]
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def zeroed(self, layer, heads):
        """The number with each of these heads of the layer set to zero, one row for each head."""

        def without(_module, given):
            z = given[0].clone()
            for row, head in enumerate(heads):
                z[row, :, head * self.width : (head + 1) * self.width] = 0
            return (z, *given[1:])

        handle = self.layers[layer].register_forward_pre_hook(without)
        try:
            return self.peer.of_ids(self.ids.expand(len(heads), -1))
        finally:
            handle.remove()

    @torch.inference_mode()
    def zero(self, together=1):
        """`[layer, head]`; so many heads of a layer in one batch."""
        plain = self.peer.of_ids(self.ids)
        starts = range(0, self.heads, together)
        groups = [list(range(start, min(start + together, self.heads))) for start in starts]
        found = [torch.cat([self.zeroed(layer, group) for group in groups]) - plain for layer in range(len(self.layers))]
        return torch.stack(found).double().numpy()

    def fastest(self):
        """How many heads of a layer together are fastest, and what that took."""
        sizes = [size for size in range(1, self.heads + 1) if self.heads % size == 0]
        took = {size: timed(lambda: self.zero(size))[0] for size in sizes}
        best = min(took, key=took.get)
        note(f"heads of a layer in one batch, chosen: {best}; seconds by size: " + ", ".join(f"{s}: {t:.2f}" for s, t in took.items()))
        return best


class Bare:
    """The same file in the bare runtime."""

    def __init__(self, peer, ids, threads):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = ort.InferenceSession(str(peer.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.ids = ids.numpy()

    def run(self, rows, size):
        """So many rows, in batches of this size; seconds."""
        started = time.perf_counter()
        for done in range(0, rows, size):
            batch = np.repeat(self.ids, min(size, rows - done), axis=0)
            given = {"input_ids": batch, "attention_mask": np.ones_like(batch), "token_type_ids": np.zeros_like(batch)}
            self.session.run(["logits"], given)
        return time.perf_counter() - started

    def fastest(self, rows):
        self.run(max(SIZES), max(SIZES))
        took = {size: self.run(rows, size) for size in SIZES}
        best = min(took, key=took.get)
        note(f"the runtime's batch, chosen: {best}; rows/s by size: " + ", ".join(f"{s}: {rows / t:.1f}" for s, t in took.items()))
        return best


def timed(f):
    started = time.perf_counter()
    value = f()
    return time.perf_counter() - started, value


def in_turn(runs, *sides):
    """Medians of each, and their last answers. Who begins changes from run to run."""
    times, answers = [[] for _ in sides], [None for _ in sides]
    for run in range(runs):
        for side in sorted(range(len(sides)), key=lambda side: (side + run) % len(sides)):
            elapsed, answers[side] = timed(sides[side])
            times[side].append(elapsed)
    return [statistics.median(t) for t in times], answers


def difference(ours, theirs):
    """Of the largest effect."""
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if worst > AGREE:
        raise SystemExit(f"the two sides do not compute the same: {worst:.1e} of the largest effect apart")
    return worst


HEAD = ["what", "runs", "ours", "other", "ratio"]
WIDTHS = [66, 5, 11, 11, 8]


def line(*cells):
    print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, WIDTHS))), flush=True)


def note(text):
    print(f"    {text}", flush=True)


def seconds(value):
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def where(answer):
    t = answer.summary.timings
    note(
        f"ours, last run: queue {t.queue_seconds:.3f}, build {t.build_seconds:.3f}, run {t.run_seconds:.3f}, reduce {t.reduce_seconds:.3f}, "
        f"encode {t.encode_seconds:.3f} of {t.total_seconds:.3f} s; {answer.header.rows} rows"
    )


def sweep(options, ours, theirs, shape):
    """Zero ablation of every head."""
    first, _ = timed(ours.zero)
    theirs.zero()
    best = theirs.fastest()
    sides = [ours.zero, theirs.zero, lambda: theirs.zero(best)]
    (mine, single, batched), (answer, found, together) = in_turn(options.runs, *sides)
    worst = max(difference(effects(answer), found), difference(effects(answer), together))
    what = f"ablation of {shape}, {options.tokens} tokens"
    line(f"{what}, by hooks, a head at a time", str(options.runs), seconds(mine), seconds(single), f"{single / mine:.2f}")
    line(f"the same, by hooks, {best} heads of a layer together", str(options.runs), seconds(mine), seconds(batched), f"{batched / mine:.2f}")
    note(f"largest relative difference of the effects {worst:.1e}; first call {first:.1f} s")
    where(answer)


def engine(options, ours, bare, shape):
    """Rows a second of the same sweep, beside plain runs of the same row."""
    ours.zero()
    rows = ours.zero().header.rows
    best = bare.fastest(rows)
    (mine, other), _ = in_turn(options.runs, ours.zero, lambda: bare.run(rows, best))
    what = f"rows/s in the ablation of {shape}, by plain rows of the bare runtime"
    line(what, str(options.runs), f"{rows / mine:.1f}", f"{rows / other:.1f}", f"{other / mine:.2f}")


def main():
    options = arguments()
    wanted = options.only or ALL
    torch.set_num_threads(options.threads)
    peer = peers.base(options.work.parent / "attribution")
    ids, _ = peer.ids(options.tokens)
    config = peer.model.config
    shape = f"{config.num_hidden_layers} x {config.num_attention_heads} heads"
    print(f"{options.threads} threads each; PyTorch {torch.__version__}, ONNX Runtime {ort.__version__}; ours over gRPC, all that the client waits for")
    line(*HEAD)
    with Daemon(options.binary, options.work, {peer.name: peer.folder}, options.threads) as daemon:
        ours = Ours(daemon, peer, ids)
        if "sweep" in wanted:
            sweep(options, ours, Theirs(peer, ids), shape)
        if "engine" in wanted:
            engine(options, ours, Bare(peer, ids, options.threads), shape)


if __name__ == "__main__":
    main()
