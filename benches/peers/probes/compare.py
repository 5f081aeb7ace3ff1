"""A probe for each layer by the daemon, and by PyTorch with scikit-learn; prints a table. Started by `run`."""
import argparse
import os
import pathlib
import statistics
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression

import data
from daemon import Daemon
from introspect.v1 import common_pb2, probe_pb2 as pb, probe_pb2_grpc

TESTED = 500  # texts that judge
LABELS = ["negative", "positive"]
STEPS = 1000  # of scikit-learn's optimiser, which by default stops at 100 and warns
AGREE = 0.01  # of the accuracies: what is compared must be the same thing


def arguments():
    parser = argparse.ArgumentParser(prog="run", description=__doc__)
    parser.add_argument("--binary", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", required=True, type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side; all cores")
    parser.add_argument("--runs", type=int, default=5, help="of either side; 5")
    parser.add_argument("--examples", type=int, default=10_000, help="to train on; 10000")
    parser.add_argument("--loop", type=int, default=500, help="examples of the whole way, which the notebook's loop goes one by one; 500")
    return parser.parse_args()


class Texts:
    """So many to train on, and some to judge by."""

    def __init__(self, cache, count):
        rows = data.load(cache)
        known, held = data.labelled(rows, "train"), data.labelled(rows, "test")
        if count > len(known):
            raise SystemExit(f"there are {len(known)} texts to train on: ask for no more by --examples and --loop")
        # The order of the files is by source; a seeded one mixes them.
        known = [known[k] for k in np.random.default_rng(3).permutation(len(known))[:count]]
        self.known = [(row.text, row.label) for row in known]
        self.held = [(row.text, row.label) for row in held[:TESTED]]


class Ours:
    """`ProbeService.Train` over a loaded model."""

    def __init__(self, daemon):
        self.stub = probe_pb2_grpc.ProbeServiceStub(daemon.channel)

    def train(self, texts, control):
        """Seconds of everything and of the fits alone, and the accuracy of each layer."""

        def requests():
            header = pb.TrainHeader(model="teacher", pooling=common_pb2.POOLING_MEAN, labels=LABELS, skip_control=not control)
            yield pb.TrainRequest(header=header)
            for part, rows in ((pb.PART_TRAIN, texts.known), (pb.PART_TEST, texts.held)):
                for text, label in rows:
                    example = pb.Example(label=LABELS[label], part=part)
                    example.input.text.text = text
                    yield pb.TrainRequest(example=example)

        started, fitted = time.perf_counter(), None
        for message in self.stub.Train(requests()):
            kind = message.WhichOneof("item")
            if kind == "report":
                # Fits begin together: the first that is done tells when.
                fitted = fitted or time.perf_counter() - message.report.seconds
                last = time.perf_counter()
            elif kind == "result":
                reports = message.result.probe.reports
        seconds = time.perf_counter() - started
        return seconds, last - fitted, [report.classes.accuracy for report in reports]


class Theirs:
    """Hidden states by transformers, probes by scikit-learn."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.layers = self.model.config.num_hidden_layers + 1

    @torch.no_grad()
    def states(self, texts):
        """Mean-pooled, of all layers at once: `[layer][text, width]`."""
        found = [[] for _ in range(self.layers)]
        for text, _ in texts:
            states = self.model(**self.tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            for layer, state in enumerate(states):
                found[layer].append(state[0].mean(0).numpy())
        return [np.stack(rows) for rows in found]

    def fit(self, known, held, texts, steps):
        """Seconds, and the accuracy of each layer."""
        learnt, asked = ([label for _, label in rows] for rows in (texts.known, texts.held))
        started = time.perf_counter()
        right = [LogisticRegression(max_iter=steps).fit(x, learnt).score(y, asked) for x, y in zip(known, held)]
        return time.perf_counter() - started, right

    @torch.no_grad()
    def notebook(self, texts):
        """The chapter's loop: for each layer a pass for each text."""
        started, right = time.perf_counter(), []
        for layer in range(self.layers):
            parts = []
            for rows in (texts.known, texts.held):
                x = []
                for text, _ in rows:
                    inputs = self.tokenizer(text, return_tensors="pt")
                    x.append(self.model(**inputs, output_hidden_states=True).hidden_states[layer].mean(dim=1).squeeze().numpy())
                parts.append((np.array(x), [label for _, label in rows]))
            probe = LogisticRegression(max_iter=STEPS).fit(*parts[0])
            right.append(probe.score(*parts[1]))
        return time.perf_counter() - started, right


def agreed(ours, theirs):
    off = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if off > AGREE:
        raise SystemExit(f"accuracies are {off:.3f} apart: what was compared is not the same thing\nours   {ours}\ntheirs {theirs}")
    return off


def row(what, runs, ours, theirs, target):
    ratio = theirs / ours
    said = "" if target is None else f">= {target:g} {'met' if ratio >= target else 'missed'}"
    print(f"{what:62}{runs:5}{ours:11.2f} s{theirs:11.2f} s{ratio:8.2f}  {said}", flush=True)


def main():
    asked = arguments()
    folder = os.environ.get("INTROSPECTD_BENCH_CLASSIFIER")
    if not folder:
        raise SystemExit("INTROSPECTD_BENCH_CLASSIFIER must name the folder of the teacher: assets/README.md says how it is made")
    torch.set_num_threads(asked.threads)
    theirs = Theirs(folder)
    many, few = Texts(asked.work, asked.examples), Texts(asked.work, asked.loop)
    known, held = theirs.states(many.known), theirs.states(many.held)
    print(f"{'what':62}{'runs':>5}{'ours':>13}{'other':>13}{'ratio':>8}  target")
    with Daemon(asked.binary, asked.work, {"teacher": folder}, asked.threads) as daemon:
        ours = Ours(daemon)
        timed = {name: [] for name in ("ours", "control", "theirs", "short")}
        for _ in range(asked.runs):
            _, seconds, right = ours.train(many, control=False)
            timed["ours"].append(seconds)
            timed["control"].append(ours.train(many, control=True)[1])
            seconds, other = theirs.fit(known, held, many, STEPS)
            timed["theirs"].append(seconds)
            timed["short"].append(theirs.fit(known, held, many, 100)[0])
            off = agreed(right, other)
        mid = {name: statistics.median(those) for name, those in timed.items()}
        shape = f"{asked.examples} examples x {theirs.layers} layers x {known[0].shape[1]}"
        row(f"fits: {shape}", asked.runs, mid["ours"], mid["theirs"], 1)
        row("the same, scikit-learn stopped after its default of 100 steps", asked.runs, mid["ours"], mid["short"], None)
        row("the same, ours with the control task", asked.runs, mid["control"], mid["theirs"], None)
        whole = {"ours": [], "theirs": []}
        for _ in range(asked.runs):
            seconds, _, right = ours.train(few, control=False)
            whole["ours"].append(seconds)
            seconds, other = theirs.notebook(few)
            whole["theirs"].append(seconds)
            agreed(right, other)
        mid = {name: statistics.median(those) for name, those in whole.items()}
        row(f"the whole way: {asked.loop} + {TESTED} texts, beside the notebook's loop", asked.runs, mid["ours"], mid["theirs"], 5)
    print(f"accuracies by layer: {', '.join(f'{r:.3f}' for r in right)} ({asked.loop} examples); with {asked.examples} at most {off:.4f} apart")


if __name__ == "__main__":
    main()
