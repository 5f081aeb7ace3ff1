"""The human-rated snippets of Hutto & Gilbert (ICWSM 2014), from the source distribution of vaderSentiment 3.3.2 (MIT).

Ratings run from -4 to 4, the mean of twenty people. A text counts as positive from +0.5, as negative from -0.5; what lies
between is left unlabelled (the teacher labels it softly for the student). Texts that are equal but for case and
punctuation are kept once. The split 80/10/10 goes by a hash of the document a sentence comes from, so that sentences of one review
or article never stand on both sides.
"""
import hashlib, html, pathlib, re, subprocess, sys, tarfile
from dataclasses import dataclass

SOURCES = {"movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets", "tweet": "tweets"}
THRESHOLD = 0.5


@dataclass
class Snippet:
    source: str
    text: str
    rating: float
    split: str  # train, validation or test

    @property
    def label(self):
        return 1 if self.rating >= THRESHOLD else 0 if self.rating <= -THRESHOLD else None


def fetch(cache: pathlib.Path) -> pathlib.Path:
    """The folder with the rated snippets, downloaded once."""
    folder = cache / "hutto_ICWSM_2014"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(cache), "vaderSentiment==3.3.2"], check=True)
        archive = next(cache.glob("vader[sS]entiment-3.3.2.tar.gz"))
        with tarfile.open(archive) as outer:
            outer.extractall(cache, filter="data")
        with tarfile.open(cache / archive.name.removesuffix(".tar.gz") / "additional_resources/hutto_ICWSM_2014.tar.gz") as inner:
            inner.extractall(cache, filter="data")
    return folder


def split_of(document: str) -> str:
    tenth = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def clean(text: str) -> str:
    text = html.unescape(text).replace("''", '"').replace("``", '"')
    return re.sub(r"\s+", " ", text).strip()


def load(cache: pathlib.Path) -> list[Snippet]:
    folder, seen, out = fetch(cache), set(), []
    for source, name in SOURCES.items():
        for line in (folder / f"{name}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            parts = line.split("\t", 2)
            if len(parts) != 3:
                continue
            identity, rating, text = parts[0], float(parts[1]), clean(parts[2])
            key = re.sub(r"\W+", " ", text.lower()).strip()
            if not key or key in seen or "\ufffd" in text:
                continue
            seen.add(key)
            out.append(Snippet(source, text, rating, split_of(f"{source}:{identity.split('_')[0]}")))
    return out


if __name__ == "__main__":
    rows = load(pathlib.Path(sys.argv[1]))
    for split in ("train", "validation", "test"):
        part = [r for r in rows if r.split == split]
        labelled = [r.label for r in part if r.label is not None]
        print(f"{split}: {len(part)} texts, {len(labelled)} labelled, {sum(labelled)} positive")
