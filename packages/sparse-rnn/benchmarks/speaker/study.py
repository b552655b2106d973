"""Prune the LSTM of a released speaker encoder and see what that does to its embeddings.

    pip install librosa espeakng-loader matplotlib      # features, a synthesiser, the plot
    pip install --no-deps resemblyzer                   # the model: 3 layers of 256 units
    python study.py --json study.json --plot study.svg

The model is resemblyzer's pretrained.pt in torch's layers. It hears sentences that espeak-ng
speaks; voices and sentences of the test are not those of the training. At each density all
recurrent matrices are pruned together, further by a cubic schedule, and trained to give the
embeddings that the dense model gives; beside it stands the same density in one shot.

Legend: B utterances, T frames, M mel channels, E embedding size.
"""

import argparse
import copy
import ctypes
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.kernels.bench.machine import describe
from fivefold.parallel_core.files import atomic_file
from fivefold.sparse_rnn import prune

RATE, FRAMES, CHANNELS, LOUDNESS = 16000, 160, 40, 10 ** (-30 / 20)
ACCENTS = ("en-us", "en-gb-scotland")
TRAINING_VOICES, TEST_VOICES = ("m1", "m2", "m3", "m4", "f1", "f2", "f3"), ("m5", "m6", "m7", "f4")
TRAINING_TEXTS = (
    "The committee will announce its decision early tomorrow morning.",
    "Please bring a warm coat, because the nights are cold up there.",
    "Seven small boats were waiting quietly behind the old harbour wall.",
    "Nobody had expected the price of sugar to fall so quickly.",
    "My brother repairs violins and plays them badly every evening.",
    "Turn left at the second bridge and follow the narrow path uphill.",
)
TEST_TEXTS = (
    "A large yellow dog was sleeping in the middle of the road.",
    "She measured the window twice before ordering the glass.",
    "We could hear thunder long before the first rain arrived.",
    "The library keeps every newspaper printed since the war.",
)


class Encoder(nn.Module):
    """Frames (B, T, M) to embeddings (B, E) of length 1, as resemblyzer's VoiceEncoder."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(CHANNELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, frames: Tensor) -> Tensor:
        """Embeddings."""
        _, (h, _) = self.lstm(frames)
        return F.normalize(F.relu(self.linear(h[-1])), dim=1)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--steps", type=int, default=60, help="of training at each density")
    parser.add_argument("--threads", type=int, default=2, help="of the timing")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, speak = released(), Speaker()
    training = torch.stack([x for v in voices(TRAINING_VOICES) for x in speak(v, TRAINING_TEXTS)])
    test = [torch.stack(speak(voice, TEST_TEXTS)) for voice in voices(TEST_VOICES)]
    rows = [row(1.0, "released", model, model, test)]
    gradual, before, work = copy.deepcopy(model), 1.0, options.json.with_suffix(".pt")
    if work.exists():
        held = torch.load(work)
        rows, before = held["rows"], held["density"]
        gradual.load_state_dict(held["model"])
    for density in [each for each in options.densities if each < before]:
        shot = copy.deepcopy(model)
        prune.GradualPruner(shot, prune.OneShot(density=density), scope="global").step()
        rows.append(row(density, "one shot", model, shot, test))
        train(gradual, model, training, before, density, options.steps)
        rows.append(row(density, "gradual", model, gradual, test))
        sparse = prune.export(gradual)
        rows.append(row(density, "gradual, sparse layers", model, sparse, test))
        rows[-1] |= timed(model, sparse, test[0][:1], options.threads)
        before = density
        with atomic_file(work) as file:
            torch.save({"rows": rows, "density": density, "model": gradual.state_dict()}, file)
    record = {
        "machine": describe("cpu", options.threads),
        "versions": {n: version(n) for n in ("torch", "resemblyzer", "espeakng-loader")},
        "steps": options.steps,
        "voices": len(test),
        "utterances": len(test) * len(TEST_TEXTS),
        "rows": rows,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.plot:
        draw(rows, options.plot)
    work.unlink()


@torch.no_grad()
def row(
    density: float, way: str, dense: Encoder, model: Encoder, test: list[Tensor]
) -> dict[str, object]:
    """How near embeddings are to the dense model's, and how often a voice is told by them.

    A voice is told by the nearest mean of the other utterances, one voice against all.
    """
    found = torch.stack([model(x) for x in test])
    expected = torch.stack([dense(x) for x in test])
    cosine = (found * expected).sum(-1)
    total, right = found.sum(1), 0
    for voice in range(found.shape[0]):
        for one in found[voice]:
            means = total.clone()
            means[voice] -= one
            right += int((F.normalize(means, dim=1) @ one).argmax()) == voice
    share = right / cosine.numel()
    print(
        f"{density:5.2f} {way:24} cosine {cosine.mean():.4f}, least {cosine.min():.4f}, {share:.1%}"
    )
    rates = {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "told": share}
    return {"density": density, "way": way, **{k: round(v, 4) for k, v in rates.items()}}


def train(
    model: Encoder, dense: Encoder, frames: Tensor, before: float, density: float, steps: int
) -> None:
    """Prune from one density to the next in half of the steps and train on in the rest."""
    schedule = prune.Cubic(
        density=density,
        start=0,
        end=steps // 2,
        every=max(1, steps // 20),
        initial_density=before,
    )
    pruner = prune.GradualPruner(model, schedule, scope="global")
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 - step / steps) + 2e-5
        some = frames[torch.randperm(frames.shape[0])[:16]]
        with torch.no_grad():
            wanted = dense(some)
        loss = 1 - (model(some) * wanted).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        pruner.step()
    pruner.remove()


@torch.no_grad()
def timed(dense: Encoder, sparse: Encoder, frames: Tensor, threads: int) -> dict[str, float]:
    """Milliseconds of one utterance, the least of calls in turns."""
    runs: dict[str, Callable[[], object]] = {
        "dense_ms": lambda: dense(frames),
        "sparse_ms": lambda: sparse(frames),
    }
    before, best = torch.get_num_threads(), dict.fromkeys(runs, float("inf"))
    torch.set_num_threads(threads)
    for _ in range(100):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    torch.set_num_threads(before)
    print(f"      {best['dense_ms']:.2f} ms dense, {best['sparse_ms']:.2f} ms sparse")
    return {name: round(value, 3) for name, value in best.items()}


class Speaker:
    """Sentences in a voice of espeak-ng, as frames of the encoder."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = espeakng_loader.load_library()
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(2, 0, data, 0)  # 2: returns when all is said
        self._samples: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = kind(self._take)  # the library does not keep it alive
        self._library.espeak_SetSynthCallback(self._callback)

    def __call__(self, voice: str, texts: tuple[str, ...]) -> list[Tensor]:
        """Frames (T, M) of each text."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SystemExit(f"espeak-ng has no voice {voice}")
        return [frames_of(self._say(text), self._rate) for text in texts]

    def _say(self, text: str) -> np.ndarray:
        self._samples.clear()
        said = text.encode() + b"\0"
        self._library.espeak_Synth(said, ctypes.c_size_t(len(said)), 0, 1, 0, 1, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._samples).astype(np.float32) / 32768

    def _take(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def frames_of(wave: np.ndarray, rate: int) -> Tensor:
    """The middle 1.6 s as resemblyzer has its frames: mel power, no logarithm (T, M)."""
    import librosa

    wave = librosa.resample(wave, orig_sr=rate, target_sr=RATE, res_type="polyphase")
    wave = wave * max(1.0, LOUDNESS / float(np.sqrt(np.mean(wave**2))))
    mel = librosa.feature.melspectrogram(
        y=wave, sr=RATE, n_fft=RATE * 25 // 1000, hop_length=RATE // 100, n_mels=CHANNELS
    )
    first = max(0, (mel.shape[1] - FRAMES) // 2)
    return torch.from_numpy(mel.T[first : first + FRAMES].astype(np.float32))


def voices(variants: tuple[str, ...]) -> list[str]:
    """Names of voices: every variant with every accent."""
    return [f"{accent}+{variant}" for accent in ACCENTS for variant in variants]


def released() -> Encoder:
    """Resemblyzer's weights in torch's layers; the package itself is not imported."""
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is in resemblyzer: pip install --no-deps resemblyzer")
    held = torch.load(Path(spec.origin).parent / "pretrained.pt", map_location="cpu")
    model = Encoder()
    state = {k: v for k, v in held["model_state"].items() if k in model.state_dict()}
    model.load_state_dict(state)
    return model


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Likeness to the dense embeddings against density."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fivefold"
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for way, marker in (("one shot", "o"), ("gradual", "s")):
        points = [(r["density"], r["cosine"]) for r in rows if r["way"] == way]
        axes.plot(*zip(*points, strict=True), marker=marker, label=way)
    axes.set(xscale="log", xlabel="share of recurrent weights kept", ylabel="cosine with dense")
    axes.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5], ["5 %", "10 %", "20 %", "30 %", "50 %"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
