"""The human-rated snippets of Hutto & Gilbert (ICWSM 2014), from the source distribution of vaderSentiment 3.3.2 (MIT).

usage: python data.py CACHE_DIR     (prints what there is)

Ratings run from -4 to 4, the mean of twenty people. A text is positive from +0.5 on and negative from -0.5 on; what lies between is
left unlabelled: it counts in no accuracy, and serves the student only as text for the teacher to judge.

Texts that are equal but for case and punctuation are kept once. The split 80/10/10 goes by a hash of the document that a sentence
comes from, and documents that share a near-duplicate (half of their word trigrams in common) count as one: neither the sentences of one
review or article nor two copies of one remark stand on both sides.
"""
import collections
import hashlib
import html
import itertools
import pathlib
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass

SOURCES = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets", "tweet": "tweets"}
THRESHOLD = 0.5
NEAR_DUPLICATE = 0.5
# A trigram that so many texts share is idiom ("one of the ..."), and comparing all its pairs would cost the square.
COMMON_TRIGRAM = 60
SPLITS = ("train", "validation", "test")


@dataclass
class Snippet:
    source: str
    text: str
    rating: float
    document: str
    split: str = ""

    @property
    def label(self):
        return 1 if self.rating >= THRESHOLD else 0 if self.rating <= -THRESHOLD else None


def fetch(cache: pathlib.Path) -> pathlib.Path:
    """The folder with the rated snippets, downloaded once."""
    folder = cache / "hutto_ICWSM_2014"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(cache)]
        subprocess.run(pip + ["vaderSentiment==3.3.2"], check=True)
        archive = next(cache.glob("vader[sS]entiment-3.3.2.tar.gz"))
        with tarfile.open(archive) as outer:
            outer.extractall(cache, filter="data")
        with tarfile.open(cache / archive.name.removesuffix(".tar.gz") / "additional_resources/hutto_ICWSM_2014.tar.gz") as inner:
            inner.extractall(cache, filter="data")
    return folder


def clean(text: str) -> str:
    text = html.unescape(text).replace("''", '"').replace("``", '"')
    return re.sub(r"\s+", " ", text).strip()


def load(cache: pathlib.Path) -> list[Snippet]:
    """Every text once, each with its split."""
    folder, seen, rows = fetch(cache), set(), []
    for source, name in SOURCES.items():
        for line in (folder / f"{name}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            parts = line.split("\t", 2)
            if len(parts) != 3:
                continue
            text = clean(parts[2])
            key = " ".join(words(text)) or text
            if not text or key in seen or "\ufffd" in text:
                continue
            seen.add(key)
            rows.append(Snippet(source, text, float(parts[1]), f"{source}:{parts[0].split('_')[0]}"))
    group = groups(rows)
    for row in rows:
        row.split = split_of(group[row.document])
    return rows


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def groups(rows: list[Snippet]) -> dict[str, str]:
    """For each document the name of its group: the documents that near-duplicates join, directly or by way of others."""
    parent = {row.document: row.document for row in rows}

    def root(name):
        while parent[name] != name:
            name = parent[name]
        return name

    for a, b in near_duplicates([row.text for row in rows]):
        first, second = sorted((root(rows[a].document), root(rows[b].document)))
        parent[second] = first
    return {document: root(document) for document in parent}


def near_duplicates(texts: list[str]):
    """Pairs of texts of which the sets of word trigrams have a Jaccard index of at least `NEAR_DUPLICATE`."""
    trigrams = [set(zip(w, w[1:], w[2:])) for w in map(words, texts)]
    holders = collections.defaultdict(list)
    for k, own in enumerate(trigrams):
        for trigram in own:
            holders[trigram].append(k)
    shared = collections.Counter()
    for where in holders.values():
        if len(where) <= COMMON_TRIGRAM:
            shared.update(itertools.combinations(where, 2))
    for (a, b), count in shared.items():
        if count >= NEAR_DUPLICATE * (len(trigrams[a]) + len(trigrams[b]) - count):
            yield a, b


def split_of(group: str) -> str:
    tenth = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def labelled(rows: list[Snippet], split: str) -> list[Snippet]:
    return [row for row in rows if row.split == split and row.label is not None]


if __name__ == "__main__":
    every = load(pathlib.Path(sys.argv[1]))
    for name in SPLITS:
        kept = labelled(every, name)
        print(f"{name}: {sum(r.split == name for r in every)} texts, {len(kept)} labelled, {sum(r.label for r in kept)} positive")
