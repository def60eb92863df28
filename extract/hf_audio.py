"""HfAudio: WavLM, HuBERT, wav2vec2, AST and Whisper's encoder from Hugging Face folders, as one sound encoder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import VacliError
from ..store import Fingerprints, Track
from .device import choose_device, choose_dtype
from .encoder import Card
from .logmel import joined
from .weights import EncoderError, folders, from_hub, licence_note

if TYPE_CHECKING:  # seconds to import: only where a model is built, never for a recipe that needs none
    import torch

# Shape legend: S samples, T rows of time, D dims, F bands of frequency.

_WAVES, _AST, _WHISPER = ("wavlm", "hubert", "wav2vec2"), "audio-spectrogram-transformer", "whisper"
_CHUNK_S = 30.0  # of the models that hear waves; the others were trained on one length, and say which
# One part in so many of a chunk its neighbour computes too: a row is taken from where it is further from the edge.
_OVERLAP = {**dict.fromkeys((*_WAVES, _WHISPER), 6), _AST: 2}
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)  # in order of preference
_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(/\w[\w.-]*)?")


class Grid(NamedTuple):
    """Where a model's rows lie, in samples: row k sees `seen` of them from k * hop on and is timed by its middle.

    chunk: what is computed at once. step: from one chunk to the next, whole hops.
    """

    hop: int
    seen: int
    middle: float
    chunk: int
    step: int

    def rows(self, samples: int) -> int:
        """How many rows so many samples give."""
        return max(0, 1 + (samples - self.seen) // self.hop)


class HfAudio:
    """Sound in, (T, D) out at the model's own rate: 50 Hz for wav2vec2's family and Whisper, 10 Hz for AST.

    model: a folder with config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin, read with
    weights_only), or a hub id, then looked for as a folder of that name in ./weights and $VACLI_WEIGHTS, in the
    Hugging Face cache and on the hub. layer: "last" (the model's last hidden state), N (hidden state N, 0 being what
    enters the first layer) or "mean:K" (the mean of the last K). dtype, device: as of `Mae`.

    Times: of wav2vec2's family the middle of the 25 ms a row's convolutions see; of AST the middle of the patches' 175
    ms (its tokens are averaged over frequency); of Whisper the middle of its mel frames, every 20 ms from 0.
    Long sound is computed in chunks that overlap (30 s with 5 s, for AST 10.26 s with half), each prepared by itself by
    the model's own feature extractor, so that memory does not grow but for the rows; where attention, or a mean over
    the chunk, reaches further than an overlap, a row differs from that of a pass over the whole.

    Raises VacliError without transformers, EncoderError at once for absent files, another kind of model, a wrong
    option; the first call does for what cannot be loaded whole.
    """

    name, eats, clock = "hf-audio", "sound", "own"
    card = Card(
        "as the model has it",
        "a hub id or a folder",
        "as the model's card says",
        get="hf download MODEL --local-dir weights/NAME (the first run does it where there is a network)",
    )

    def __init__(
        self,
        model: str | None = None,
        layer: str | int = "last",
        dtype: str | None = None,
        device: str | None = None,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise VacliError(
                "hf-audio needs the package transformers, which is not here: pip install 'vacli[hf]'"
            )
        if not model:
            raise EncoderError(
                "hf-audio wants a model: a hub id as hf-audio:microsoft/wavlm-large, or hf-audio:FOLDER"
            )
        self.folder = _find_folder(model)
        self.model_name = str(self.folder) if Path(model).is_dir() else model
        self.layer = _layer(layer)
        about = _json(self.folder / "config.json")
        self.family = str(about.get("model_type"))
        if self.family not in _OVERLAP:
            raise EncoderError(
                f"{model} is a model of type {self.family!r}; hf-audio knows {', '.join(_OVERLAP)}: wanted one of those"
            )
        self.preprocessor, self.weights = _the_files(self.folder)
        said = _json(self.preprocessor)
        self.rate_hz = int(said.get("feature_extractor", said).get("sampling_rate", 16000))
        self.licence = _licence(self.folder)
        self._asked_device = device
        if device is not None:
            choose_device(device, self.name)
        wide = about.get("hidden_size", about.get("d_model", 768)) >= 768
        self.dtype = choose_dtype(dtype, device, wide, self.name)
        self._fingerprints = fingerprints or Fingerprints()

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self._asked_device, self.name)

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `HfAudio(...)`."""
        return {"model": self.model_name, "layer": self.layer, "dtype": self.dtype}

    def recipe(self) -> dict[str, Any]:
        """All that decides the values; not what the model is called, so a copy of it makes the same tracks."""
        files = (self.folder / "config.json", self.preprocessor, *self.weights)
        return {
            "track": self.name,
            "version": 1,
            "model_type": self.family,
            "files_sha256": {path.name: self._fingerprints.file(path) for path in files},
            "layer": self.layer,
            "chunk_s": _CHUNK_S if self.family in _WAVES else "as the model has it",
            "overlap": f"1/{_OVERLAP[self.family]}",
            "rate_hz": self.rate_hz,
            "compute_dtype": self.dtype,
            "dtype": "float16",
        }

    @cached_property
    def _model(self) -> Any:
        """Built at the first sound: planning a run that has nothing to do loads none."""
        model = load_model(self.folder, self.weights[0])
        model = model.get_encoder() if self.family == _WHISPER else model
        states, asked = int(model.config.num_hidden_layers) + 1, self.layer.removeprefix("mean:")
        if self.layer != "last" and int(asked) >= states + (asked != self.layer):
            raise EncoderError(
                f"hf-audio.layer is {self.layer}, but {self.model_name} has the hidden states 0 to {states - 1}; "
                "wanted one of them, or last"
            )
        return model.eval().requires_grad_(False).to(self.device)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        with _speaking_clearly(self.folder):
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def _prepare(self) -> Any:
        from transformers import AutoFeatureExtractor

        with _speaking_clearly(self.folder):
            return AutoFeatureExtractor.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )

    @property
    def dim(self) -> int:
        return int(self._config.hidden_size)

    @cached_property
    def grid(self) -> Grid:
        """Where the rows of this model lie."""
        config = self._config
        if self.family in _WAVES:
            hop, seen = _convolved(config.conv_kernel, config.conv_stride)
            middle, chunk = seen / 2, round(_CHUNK_S * self.rate_hz)
        elif self.family == _AST:  # patches over rows of 25 ms every 10 ms
            window, row = round(0.025 * self.rate_hz), round(0.010 * self.rate_hz)
            hop, seen = row * config.time_stride, window + row * (config.patch_size - 1)
            middle, chunk = seen / 2, window + row * (config.max_length - 1)
        else:  # two mel frames a row, each around its time
            row = int(self._prepare.hop_length)
            hop, seen, middle, chunk = 2 * row, row, 0.0, int(self._prepare.n_samples)
        step = max(1, (chunk - chunk // _OVERLAP[self.family]) // hop)
        return Grid(hop, seen, middle, chunk, step * hop)

    def __call__(self, blocks: Iterable[np.ndarray]) -> Track:
        """blocks: float32 mono samples at rate_hz in pieces of any length, the first sample at t = 0.

        Where there is too little sound for one row the Track is empty.
        """
        return joined(self.pieces(blocks), self.dim)

    def pieces(self, blocks: Iterable[np.ndarray]) -> Iterator[Track]:
        """The Track of a call in pieces, one for each chunk, as the sound comes; none where there is too little."""
        pending, first = (
            np.zeros((0, self.dim), np.float16),
            0,
        )  # rows of the chunk before, from row `first` on
        for begin, samples in chunks(blocks, self.grid):
            seam = (begin + first + len(pending)) // 2
            if len(pending):
                yield self._timed(pending[: seam - first], first)
            pending, first = self._rows(samples)[seam - begin :], seam
        if len(pending):
            yield self._timed(pending, first)

    def _timed(self, rows: np.ndarray, first: int) -> Track:
        """Rows (T, D) of which the first is row `first` of the whole."""
        centres = np.arange(first, first + len(rows)) * self.grid.hop + self.grid.middle  # samples
        return Track(rows, centres / self.rate_hz)

    def _rows(self, samples: np.ndarray) -> np.ndarray:
        """(S,) samples, a chunk or less -> (T, D) float16, all rows they give."""
        import torch

        given = self._prepare(samples, sampling_rate=self.rate_hz, return_tensors="pt")
        casting = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")
        with torch.inference_mode(), casting:
            # no mask of padding: of what is padded (AST, Whisper) the models were trained to see it
            tokens = self._hidden(given[self._prepare.model_input_names[0]].to(self.device))
        if self.family == _AST:  # the first two are for classes; the others run through time, band after band
            config = self._config
            bands = 1 + (config.num_mel_bins - config.patch_size) // config.frequency_stride
            tokens = tokens[2:].unflatten(0, (bands, -1)).mean(0)  # (F * T, D) -> (T, D)
        count = self.grid.rows(len(samples))
        if len(tokens) < count:
            raise EncoderError(
                f"{self.model_name} gives {len(tokens)} rows for {len(samples)} samples, where {count} were wanted: "
                "its layers are none that hf-audio knows"
            )
        return tokens[:count].float().cpu().numpy().astype(np.float16)

    def _hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """(1, ...) prepared sound -> (tokens, D) of the layer asked for."""
        import torch

        if self.layer == "last":
            return self._model(inputs).last_hidden_state[0]
        states = self._model(inputs, output_hidden_states=True).hidden_states
        if self.layer.startswith("mean:"):
            return torch.stack(states[-int(self.layer[5:]) :]).mean(0)[0]
        return states[int(self.layer)][0]


def chunks(blocks: Iterable[np.ndarray], grid: Grid) -> Iterator[tuple[int, np.ndarray]]:
    """Sample blocks of any length -> (row, samples): chunks that overlap, and the row that each begins with.

    All are grid.chunk long; the last reaches back for as much as whole hops allow. Sound without a row has none.
    """
    held, length, begin, begun = [np.zeros(0, np.float32)], 0, 0, False  # from the last chunk's begin on
    for block in blocks:
        held.append(block)
        length += len(block)
        while length >= grid.chunk + grid.step * begun:
            samples = np.concatenate(held)[grid.step * begun :]
            begin += grid.step * begun
            yield begin // grid.hop, samples[: grid.chunk]
            held, length, begun = [samples], len(samples), True
    if begun and grid.rows(length) == grid.rows(grid.chunk):
        return
    back = max(0, -(-(length - grid.chunk) // grid.hop))  # hops
    samples = np.concatenate(held)[back * grid.hop :]
    if grid.rows(len(samples)):
        yield begin // grid.hop + back, samples


def load_model(folder: Path, weights: Path) -> Any:
    """The model in a folder, without its heads, in float32. Raises EncoderError where it cannot be loaded whole."""
    import torch
    from transformers import AutoModel

    with _speaking_clearly(folder):
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=".safetensors" in weights.name,
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    # what hides rows in training, and a decoder that is not called, may be absent
    missing = [
        k for k in sorted(report["missing_keys"]) if not re.search(r"masked_spec_embed$|^decoder\.", k)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EncoderError(
            f"weights {weights} do not fit their config.json: missing {', '.join(missing[:3])}{more}; "
            "copy the whole folder again"
        )
    return model


@contextlib.contextmanager
def _speaking_clearly(folder: Path) -> Iterator[None]:
    """transformers without its bars and reports; what it raises, of a dozen kinds, becomes one line."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of AST's own filterbank, that some bands are narrower than a bin
            yield
    except Exception as e:
        raise EncoderError(
            f"cannot load the model in {folder} ({type(e).__name__}: {' '.join(str(e).split())[:200]}); "
            "wanted the whole folder as its makers have it; copy it again"
        ) from e
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _convolved(kernels: Iterable[int], strides: Iterable[int]) -> tuple[int, int]:
    """Samples from a row to the next, and those that a row sees, of unpadded convolutions behind each other."""
    hop, seen = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        seen += (kernel - 1) * hop
        hop *= stride
    return hop, seen


def _layer(asked: str | int) -> str:
    text = str(asked)
    if text == "last" or re.fullmatch(r"\d{1,3}|mean:[1-9]\d{0,2}", text):
        return text
    raise EncoderError(f"hf-audio.layer is {asked!r}; wanted last, a number of a hidden state, or mean:K")


# ---- the files of a model ------------------------------------------------------------------------------------


def _find_folder(model: str) -> Path:
    """A folder, then one of its name among the weights, then the Hugging Face cache, then the hub."""
    name = model.rstrip("/").rpartition("/")[2]
    for place in (Path(model), *(folder / name for folder in folders())):
        if (place / "config.json").is_file():
            return place.absolute()
    if Path(model).is_dir():
        raise EncoderError(
            f"{model} holds no config.json; wanted a model's whole folder, as from save_pretrained"
        )
    if not _HUB_ID.fullmatch(model):
        raise EncoderError(
            f"no folder {model}; wanted a model's folder, or a hub id as microsoft/wavlm-large"
        )
    if config := from_hub(model, "config.json"):
        _complete(model, config.parent)
        return config.parent
    raise EncoderError(
        f"no model {model} here and no network: `hf download {model} --local-dir {folders()[0] / name}` where there is "
        "one, put that folder there, or give any as hf-audio:FOLDER"
    )


def _complete(model: str, snapshot: Path) -> None:
    """Fetch what the cache lacks of a model; what it has is not asked for, as that would wait for the network."""
    if not any((snapshot / file).is_file() for file in _WEIGHTS):
        if not any(from_hub(model, file) for file in _WEIGHTS):
            return
        from_hub(model, "README.md")  # for the licence
    if not any((snapshot / file).is_file() for file in _PREPROCESSORS):
        from_hub(model, _PREPROCESSORS[0])
    for shard in _shards(snapshot):
        if not shard.is_file():
            from_hub(model, shard.name)


def _the_files(folder: Path) -> tuple[Path, list[Path]]:
    """The feature extractor's file, and those of the weights. Raises EncoderError for what is missing."""
    prepare = next((folder / f for f in _PREPROCESSORS if (folder / f).is_file()), None)
    weights = next((folder / f for f in _WEIGHTS if (folder / f).is_file()), None)
    shards = _shards(folder) if weights and weights.suffix == ".json" else []
    lost = [] if prepare else [_PREPROCESSORS[0]]
    lost += [] if weights else [f"{_WEIGHTS[0]} (or {_WEIGHTS[2]})"]
    lost += [shard.name for shard in shards if not shard.is_file()]
    if lost or prepare is None or weights is None:
        raise EncoderError(f"{folder} lacks {', '.join(lost)}; wanted a model's whole folder; copy it again")
    return prepare, [weights, *shards]


def _shards(folder: Path) -> list[Path]:
    index = folder / _WEIGHTS[1]
    if not index.is_file() or (folder / _WEIGHTS[0]).is_file():
        return []
    return [folder / name for name in sorted({Path(f).name for f in _json(index)["weight_map"].values()})]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EncoderError(
            f"cannot read {path}: {e}; wanted the JSON of a model's makers; copy it again"
        ) from e
    if not isinstance(found, dict):
        raise EncoderError(f"{path} holds no JSON object; wanted the file of a model's makers; copy it again")
    return found


def _licence(folder: Path) -> str | None:
    """What is to be told of the licence in the model's card, if a card lies in the folder and names one."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        card = (folder / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
        if front and (said := re.search(r"^license:\s*['\"]?([\w.-]+)", front[1], re.MULTILINE)):
            return licence_note(said[1].lower())
    return None
