"""Shared fixtures: a byte-level tokenizer and a tiny random Llama, and the settings every test runs under."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

# Before any import of transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models only wait for each other on more, in every process
_datasets_cache = tempfile.mkdtemp(prefix="pdtrim-tests-")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache
atexit.register(shutil.rmtree, _datasets_cache, ignore_errors=True)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from process_group import SERVER  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("pdtrim", derandomize=True, deadline=None, database=None)
settings.load_profile("pdtrim")

LONGEST_FIRST = (
    "strategies", "quickstart", "slurm", "deepspeed", "terminal", "resume", "adapters", "model_files", "merging_runs",
)  # fmt: skip
"""Files that take minutes begin first, so that two workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order within a file: module fixtures are expensive."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Undo what a command does to the package's loggers: later tests in this process look for log lines."""
    loggers = [logging.getLogger(name) for name in ("pdtrim_pl", "callbacks")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Fork the engine's workers from the process that has imported what they need; `test_terminal.py` spawns them."""
    first = SERVER.Process(target=int)  # what the imports print is printed before a test looks
    first.start()
    first.join()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdtrim_pl.serving.engine.crew.multiprocessing.get_context", lambda method: SERVER)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level tokenizer of 259 ids: <pad> 0, <bos> 1, <eos> 2, then the 256 bytes; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random fp32 Llama: 4 blocks, hidden 32, 4 heads, 2 KV heads, context 512; with the tiny tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copytree(tiny_tokenizer_dir, directory, dirs_exist_ok=True)
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory
