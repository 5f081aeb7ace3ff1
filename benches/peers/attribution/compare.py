"""Attribution by the daemon and by Captum, run by run in turn; prints a table. Started by `run`."""
import argparse
import os
import pathlib
import statistics
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients

import peers
from daemon import Daemon
from introspect.v1 import attribution_pb2 as pb
from introspect.v1 import capture_pb2, capture_pb2_grpc, common_pb2

ROOT = pathlib.Path(__file__).resolve().parents[3]
STEPS = 50
RESIDUAL = 0.01  # that adaptive steps have to reach
SIZES = [1, 2, 4, 8, 16]  # of Captum's batches
TRIAL = 16  # evaluations to choose among them
BATCH_TOKENS = 2048  # of the daemon's batches, by default
AGREE = 1e-3  # of the largest score: what is compared must be the same thing
ALL = ["gradients", "ablation", "differences", "adaptive", "memory"]


def arguments():
    parser = argparse.ArgumentParser(prog="run", description=__doc__)
    parser.add_argument("--binary", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", required=True, type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side; all cores")
    parser.add_argument("--runs", type=int, default=5, help="of either side; 5")
    parser.add_argument("--tokens", type=int, default=128, help="of the row that is explained; 128")
    parser.add_argument("--difference-steps", type=int, default=2, help="points of the path of finite differences; 2")
    parser.add_argument("--texts", type=int, default=60, help="demo texts that are explained with adaptive steps; 60")
    parser.add_argument("--only", choices=ALL, action="append", help="what to measure; everything")
    return parser.parse_args()


class Table:
    """Rows as they come."""

    HEAD = ["what", "runs", "ours", "other", "ratio", "target", ""]
    WIDTHS = [58, 5, 11, 11, 8, 8, 6]

    def __init__(self):
        self.line(self.HEAD)

    def line(self, cells):
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, self.WIDTHS))), flush=True)

    def row(self, what, runs, ours, other, ratio=None, target=None, at_most=False):
        """`target` is for the ratio: to be reached, or not to be passed."""
        said = "" if target is None else ("met" if (ratio <= target if at_most else ratio >= target) else "missed")
        wanted = "" if target is None else f"{'<=' if at_most else '>='} {target:g}"
        self.line([what, str(runs), ours, other, "" if ratio is None else f"{ratio:.2f}", wanted, said])


def note(text):
    print(f"    {text}", flush=True)


def seconds(value):
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def timed(f):
    started = time.perf_counter()
    value = f()
    return time.perf_counter() - started, value


def in_turn(runs, ours, theirs):
    """Medians of both, and their last answers. Who begins changes from run to run."""
    times, answers = ([], []), [None, None]
    for run in range(runs):
        for side in [0, 1] if run % 2 == 0 else [1, 0]:
            elapsed, answers[side] = timed([ours, theirs][side])
            times[side].append(elapsed)
    return statistics.median(times[0]), statistics.median(times[1]), *answers


def fastest(what, call):
    """The size of batches with which `call(size)` is fastest, and how long each took."""
    call(SIZES[-1])
    took = {size: timed(lambda: call(size))[0] for size in SIZES}
    best = min(took, key=took.get)
    note(f"Captum's {what}, chosen: {best}; seconds by size: " + ", ".join(f"{s}: {t:.2f}" for s, t in took.items()))
    return best


def difference(ours, theirs):
    """Of the largest score."""
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if worst > AGREE:
        raise SystemExit(f"the two sides do not compute the same: {worst:.1e} of the largest score apart")
    return worst


def where(answer):
    """Where the last of our runs spent its time."""
    t = answer.summary.timings
    note(
        f"ours, last run: queue {t.queue_seconds:.3f}, build {t.build_seconds:.3f}, run {t.run_seconds:.3f}, reduce {t.reduce_seconds:.3f}, "
        f"encode {t.encode_seconds:.3f} of {t.total_seconds:.3f} s; {answer.rows} rows"
    )


def gradients(table, options, daemon, peer):
    ids, baseline = peer.ids(options.tokens)
    captum = LayerIntegratedGradients(peer.of_ids, peer.model.get_input_embeddings())

    def theirs(steps, size):
        return captum.attribute(ids, baseline, n_steps=steps, internal_batch_size=size)

    def ours():
        return daemon.attribute(
            peer.name, ids, baseline, target=peers.TARGET, integrated_gradients=pb.IntegratedGradients(steps=STEPS)
        )

    best = fastest(f"internal_batch_size ({TRIAL} steps)", lambda size: theirs(TRIAL, size))
    first, _ = timed(ours)
    mine, other, answer, found = in_turn(options.runs, ours, lambda: theirs(STEPS, best))
    worst = difference(answer.scores, found[0].sum(-1).numpy())
    what = f"{peer.name}: integrated gradients, {STEPS} steps, {options.tokens} tokens"
    table.row(what, options.runs, seconds(mine), seconds(other), other / mine, 2)
    note(f"largest relative difference of the scores {worst:.1e}; delta {answer.result.delta:.1e}; first call {first:.1f} s")
    where(answer)


def ablation(table, options, daemon, peer):
    ids, baseline = peer.ids(options.tokens)
    captum = FeatureAblation(peer.of_ids)
    groups = torch.arange(options.tokens)[None] * TRIAL // options.tokens

    def theirs(size, mask=None):
        with torch.no_grad():
            return captum.attribute(ids, baseline, feature_mask=mask, perturbations_per_eval=size)

    def ours():
        return daemon.attribute(peer.name, ids, baseline, target=peers.TARGET, ablation=pb.Ablation())

    best = fastest(f"perturbations_per_eval ({TRIAL} features)", lambda size: theirs(size, groups))
    ours()
    mine, other, answer, found = in_turn(options.runs, ours, lambda: theirs(best))
    worst = difference(answer.scores, found[0].numpy())
    table.row(f"{peer.name}: ablation of {options.tokens} tokens", options.runs, seconds(mine), seconds(other), other / mine, 1.5)
    note(f"largest relative difference of the scores {worst:.1e}")
    where(answer)


def differences(table, options, daemon, peer):
    """The same integral by exact gradients and by central differences, both ours."""
    ids, baseline = peer.ids(options.tokens)
    steps = options.difference_steps
    exact = pb.IntegratedGradients(steps=steps)
    central = pb.FiniteDifference(path_steps=steps, scheme=pb.SCHEME_CENTRAL)

    def ask(**method):
        return lambda: daemon.attribute(peer.name, ids, baseline, target=peers.TARGET, **method)

    ask(integrated_gradients=exact)()
    elapsed, answer = timed(ask(integrated_gradients=exact))
    slow, approximate = timed(ask(finite_difference=central))
    elapsed = statistics.median([elapsed, *(timed(ask(integrated_gradients=exact))[0] for _ in range(options.runs - 1))])
    what = f"{peer.name}: exact gradients by central differences, {steps} steps"
    table.row(what, options.runs, seconds(elapsed), seconds(slow), slow / elapsed, 30)
    worst = np.abs(answer.scores - approximate.scores).max() / np.abs(answer.scores).max()
    note(f"largest relative difference {worst:.1e}; rows {answer.rows} and {approximate.rows} (differences were run once)")


def adaptive(table, options, daemon, name):
    """Points that adaptive steps need for a residual of one percent, on texts that a person can check."""
    lines = (ROOT / "assets" / "texts.tsv").read_text().splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines[:: max(1, len(lines) // options.texts)]]
    rows, fixed_residuals, residuals = [], [], []
    for text in texts:
        answer = daemon.attribute(name, text=text, integrated_gradients=pb.IntegratedGradients(tolerance=RESIDUAL))
        fixed = daemon.attribute(name, text=text, integrated_gradients=pb.IntegratedGradients(steps=STEPS))
        rows.append(answer.result.cost.gradient_rows)
        residuals.append(answer.result.residual_ratio)
        fixed_residuals.append(fixed.result.residual_ratio)
    median = statistics.median(rows)
    reached = sum(r <= RESIDUAL for r in residuals)
    what = f"{name}: evaluations, adaptive to {RESIDUAL:.0%} by {STEPS} fixed steps"
    table.row(what, len(texts), f"{median:g}", str(STEPS), median / STEPS, 0.5, at_most=True)
    quartiles = np.percentile(rows, [0, 25, 75, 100])
    note(f"evaluations, least, quartiles, most: {', '.join(f'{q:g}' for q in quartiles)}; {reached} of {len(texts)} texts within {RESIDUAL:.0%}")
    kept = sum(r <= RESIDUAL for r in fixed_residuals)
    note(f"{STEPS} fixed steps: {kept} of {len(texts)} within {RESIDUAL:.0%}; median residual {statistics.median(fixed_residuals):.1e}")


def memory(table, options, peer):
    """Peak of a worker that only predicts, and of one that differentiates, each in a daemon of its own."""
    ids, baseline = peer.ids(options.tokens)

    def predict(daemon):
        request = capture_pb2.CaptureRequest(model=peer.name, selection=common_pb2.Selection(logits=common_pb2.LOGITS_ALL))
        request.input.tokens.ids.extend(ids[0].tolist())
        list(capture_pb2_grpc.CaptureServiceStub(daemon.channel).Capture(request))

    def differentiate(daemon):
        daemon.attribute(peer.name, ids, baseline, target=peers.TARGET, input_x_gradient=pb.InputXGradient())

    def integrate(daemon):
        daemon.attribute(peer.name, ids, baseline, target=peers.TARGET, integrated_gradients=pb.IntegratedGradients(steps=STEPS))

    peaks = []
    for use in [predict, differentiate, integrate]:
        with Daemon(options.binary, options.work, {peer.name: peer.folder}, options.threads) as daemon:
            use(daemon)
            peaks.append(daemon.worker_peak())
    plain, gradient, path = peaks
    activations = kept_for_backward(peer, ids)
    share = (gradient - activations) / plain
    what = f"{peer.name}: peak memory, gradient less activations, by plain"
    table.row(what, 1, megabytes(gradient), megabytes(plain), share, 2, at_most=True)
    weights = sum(p.numel() * p.element_size() for p in peer.model.parameters())
    note(f"weights {megabytes(weights)}; activations that PyTorch keeps of one row {megabytes(activations)}")
    together = max(1, min(STEPS, BATCH_TOKENS // options.tokens))
    note(
        f"peak while {STEPS} steps run, {together} rows together: {megabytes(path)}, "
        f"less their activations {(path - together * activations) / plain:.2f} of plain"
    )


def megabytes(count):
    return f"{count / 1e6:.0f} MB"


def kept_for_backward(peer, ids):
    """Bytes of all that PyTorch saves for the backward pass of one row, each once; with attention as it was exported."""
    kept = {}
    peer.model.set_attn_implementation("eager")

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    weights = {p.untyped_storage().data_ptr() for p in peer.model.parameters()}
    x = peer.model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = peer.of_embeds(x)
        total = sum(size for at, size in kept.items() if at not in weights)
    del y
    peer.model.set_attn_implementation("sdpa")
    return total


def main():
    options = arguments()
    wanted = options.only or ALL
    torch.set_num_threads(options.threads)
    models = [peer for peer in [peers.base(options.work), peers.teacher()] if peer]
    print(f"{options.threads} threads each; PyTorch {torch.__version__}; ours over gRPC, with everything that the client waits for")
    table = Table()
    for peer in models:
        with Daemon(options.binary, options.work, {peer.name: peer.folder}, options.threads) as daemon:
            for name, measure in [("gradients", gradients), ("ablation", ablation), ("differences", differences)]:
                if name in wanted:
                    measure(table, options, daemon, peer)
    if "adaptive" in wanted:
        texts = {"demo": ROOT / "assets" / "demo-model"} | {p.name: p.folder for p in models if (p.folder / "tokenizer.json").is_file()}
        for name, folder in texts.items():
            with Daemon(options.binary, options.work, {name: folder}, options.threads) as daemon:
                adaptive(table, options, daemon, name)
    if "memory" in wanted:
        for peer in models:
            memory(table, options, peer)


if __name__ == "__main__":
    main()
