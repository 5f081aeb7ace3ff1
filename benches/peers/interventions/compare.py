"""Sweeps over every head: ablation beside PyTorch with hooks, attribution patching beside activation patching, rows a second beside the bare
runtime, and what has to be built for them; prints a table. Started by `run`."""
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
TRIAL_ROWS, TRIAL_LAYERS = 32, 2  # to choose among batches
AGREE = 1e-3  # of the largest effect: what is compared must be the same thing
ALL = ["sweep", "estimate", "engine", "variants"]
BUILDS = "introspectd_variant_builds_total"


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
        self.request = pb.SweepRequest(model=peer.name, hooks=[HOOK])
        self.request.input.tokens.ids.extend(ids[0].tolist())
        self.request.target.choice.index = peers.TARGET

    def sweep(self, by=(pb.SWEEP_AXIS_HEAD,), source=None, **fields):
        """Every part set to zero by itself, or patched from the source."""
        request = pb.SweepRequest(by=by, **fields)
        request.MergeFrom(self.request)
        if source is None:
            request.zero.SetInParent()
        else:
            request.patch.tokens.ids.extend(source[0].tolist())
        started = time.perf_counter()
        return Answer(self.stub.Sweep(request), started)


def grid(answer, what="effects"):
    """`[layer, head]`."""
    hooks = answer.header.hooks
    return np.stack([answer.tensors[f"{what}:{hook}"].astype(np.float64) for hook in hooks])


class Theirs:
    """PyTorch, with hooks in front of the projection that follows the heads: they leave the fast attention as it is."""

    def __init__(self, peer, ids):
        self.peer, self.ids = peer, ids
        config = peer.model.config
        self.layers = [layer.attention.output.dense for layer in peer.model.base_model.encoder.layer]
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def changed(self, layer, heads, new):
        """The number with each of these heads of the layer as it is in `new`, `[token, width of all heads]`, one row for each head."""

        def hook(_module, given):
            z = given[0].clone()
            for row, head in enumerate(heads):
                own = slice(head * self.width, (head + 1) * self.width)
                z[row, :, own] = new[:, own]
            return (z, *given[1:])

        handle = self.layers[layer].register_forward_pre_hook(hook)
        try:
            return self.peer.of_ids(self.ids.expand(len(heads), -1))
        finally:
            handle.remove()

    @torch.inference_mode()
    def effects(self, new, together):
        """`[layer, head]`, of as many layers as `new` has; so many heads of a layer in one batch."""
        plain = self.peer.of_ids(self.ids)
        starts = range(0, self.heads, together)
        groups = [list(range(start, min(start + together, self.heads))) for start in starts]
        found = [torch.cat([self.changed(layer, group, new[layer]) for group in groups]) - plain for layer in range(len(new))]
        return torch.stack(found).double().numpy()

    def zero(self, together=1, layers=None):
        zero = torch.zeros(self.ids.shape[1], self.heads * self.width)
        return self.effects([zero] * (layers or len(self.layers)), together)

    def seen(self, ids, differentiable=False):
        """The number, and what stands in front of each projection, `[1, token, width of all heads]`."""
        seen = []

        def hook(_module, given):
            z = given[0].requires_grad_() if differentiable and not seen else given[0]
            seen.append(z)
            return (z, *given[1:])

        handles = [layer.register_forward_pre_hook(hook) for layer in self.layers]
        try:
            return self.peer.of_ids(ids), seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def patched(self, source, together):
        """Activation patching."""
        _, seen = self.seen(source)
        return self.effects([z[0] for z in seen], together)

    def estimated(self, source):
        """Attribution patching."""
        with torch.no_grad():
            _, new = self.seen(source)
        value, old = self.seen(self.ids, differentiable=True)
        gradients = torch.autograd.grad(value.sum(), old)
        terms = [((n - x.detach()) * g)[0].double() for n, x, g in zip(new, old, gradients)]
        return torch.stack([t.reshape(-1, self.heads, self.width).sum((0, 2)) for t in terms]).numpy()

    def fastest(self):
        """How many heads of a layer together are fastest."""
        sizes = [size for size in range(1, self.heads + 1) if self.heads % size == 0]
        took = {size: timed(lambda: self.zero(size, TRIAL_LAYERS))[0] for size in sizes}
        best = min(took, key=took.get)
        note(f"heads of a layer in one batch, chosen: {best}; seconds of {TRIAL_LAYERS} layers by size: " + ", ".join(f"{s}: {t:.2f}" for s, t in took.items()))
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

    def fastest(self):
        rows = TRIAL_ROWS
        self.run(rows, max(SIZES))
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


HEAD = ["what", "runs", "ours", "other", "ratio", "target", ""]
WIDTHS = [70, 5, 11, 11, 8, 8, 6]


def line(cells):
    print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, WIDTHS))), flush=True)


def row(what, runs, ours, other, ratio, target=None):
    said = "" if target is None else ("met" if ratio >= target else "missed")
    line([what, str(runs), ours, other, f"{ratio:.2f}", "" if target is None else f">= {target:g}", said])


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


def sweep(options, daemon, peer, shape):
    """Zero ablation of every head."""
    ids, _ = peer.ids(options.tokens)
    ours, theirs = Ours(daemon, peer, ids), Theirs(peer, ids)
    first, _ = timed(ours.sweep)
    theirs.zero(layers=TRIAL_LAYERS)
    best = theirs.fastest()
    sides = [ours.sweep, theirs.zero, lambda: theirs.zero(best)]
    (mine, single, batched), (answer, found, together) = in_turn(options.runs, *sides)
    worst = max(difference(grid(answer), found), difference(grid(answer), together))
    row(f"ablation of {shape}, {options.tokens} tokens, by hooks, a head at a time", options.runs, seconds(mine), seconds(single), single / mine, 1.5)
    row(f"the same, by hooks, {best} heads of a layer together", options.runs, seconds(mine), seconds(batched), batched / mine)
    note(f"largest relative difference of the effects {worst:.1e}; first call {first:.1f} s")
    where(answer)


def estimate(options, daemon, peer, shape):
    """Attribution patching beside activation patching, both ours."""
    ids, _ = peer.ids(options.tokens)
    source, _ = peer.ids(options.tokens, seed=1)
    ours, theirs = Ours(daemon, peer, ids), Theirs(peer, ids)

    def estimated():
        return ours.sweep(source=source, method=pb.SWEEP_METHOD_ESTIMATE)

    def run():
        return ours.sweep(source=source, method=pb.SWEEP_METHOD_RUN)

    first, _ = timed(estimated)
    run(), theirs.estimated(source)
    sides = [estimated, run, lambda: theirs.estimated(source)]
    (mine, whole, other), (answer, ran, found) = in_turn(options.runs, *sides)
    worst = max(difference(grid(answer, "estimates"), found), difference(grid(ran), theirs.patched(source, theirs.heads)))
    row(f"patching of {shape}, {options.tokens} tokens: estimates, by runs of our own", options.runs, seconds(mine), seconds(whole), whole / mine, 20)
    row("the same, the first call, that builds its variants, by later runs", 1, seconds(first), seconds(whole), whole / first)
    row("the same estimates, by PyTorch", options.runs, seconds(mine), seconds(other), other / mine)
    note(f"largest relative difference to PyTorch, of estimates and of effects: {worst:.1e}")
    where(answer)
    where(ran)
    both = ours.sweep(source=source, method=pb.SWEEP_METHOD_BOTH).result
    note(f"correlation of estimates and effects over {both.compared} heads: {both.correlation:.3f}")


def engine(options, daemon, peer, shape):
    """Rows a second of the ablation, beside plain runs of the same row."""
    ids, _ = peer.ids(options.tokens)
    ours, bare = Ours(daemon, peer, ids), Bare(peer, ids, options.threads)
    rows = ours.sweep().header.rows
    best = bare.fastest()
    (mine, other), (answer, _) = in_turn(options.runs, ours.sweep, lambda: bare.run(rows, best))
    what = f"rows/s in the ablation of {shape}, by plain rows of the bare runtime"
    row(what, options.runs, f"{rows / mine:.1f}", f"{rows / other:.1f}", other / mine, 0.9)
    where(answer)


def variants(options, daemon, peer, shape):
    """What sweeps of the same hook point have to build."""
    ids, _ = peer.ids(options.tokens)
    ours = Ours(daemon, peer, ids)
    loaded = daemon.counter(BUILDS)
    ours.sweep()
    first = daemon.counter(BUILDS)
    others = [
        ("a layer", dict(layers=[5])),
        ("positions of another", dict(layers=[0], by=[pb.SWEEP_AXIS_POSITION])),
        ("each layer as a whole", dict(by=[])),
    ]
    said = []
    for what, fields in others:
        before = daemon.counter(BUILDS)
        ours.sweep(**fields)
        said.append(f"{what} {daemon.counter(BUILDS) - before}")
    print(f"variants built by the ablation of {shape}: {first - loaded}; then by ablations of others: {', '.join(said)} (target: 0)", flush=True)


def main():
    options = arguments()
    wanted = options.only or ALL
    torch.set_num_threads(options.threads)
    peer = peers.base(options.work.parent / "attribution")
    config = peer.model.config
    shape = f"{config.num_hidden_layers} x {config.num_attention_heads} heads"
    print(f"{options.threads} threads each; PyTorch {torch.__version__}, ONNX Runtime {ort.__version__}; ours over gRPC, all that the client waits for")
    line(HEAD)
    for what, measure in [("sweep", sweep), ("estimate", estimate), ("engine", engine), ("variants", variants)]:
        if what in wanted:
            # A daemon of its own, so that a first call is one.
            with Daemon(options.binary, options.work, {peer.name: peer.folder}, options.threads) as daemon:
                measure(options, daemon, peer, shape)


if __name__ == "__main__":
    main()
