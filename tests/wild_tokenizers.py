"""Small tokenizers of the kinds that people use, which differ in what they do at the start of a text."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
PRINTABLE = [chr(code) for code in range(32, 127)]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def bpe(words: Sequence[str], alphabet: Sequence[str], **settings: Any) -> Tokenizer:
    """A BPE that merges each word from its left end."""
    vocabulary = dict.fromkeys([*SPECIAL, *alphabet])
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    vocabulary |= dict.fromkeys(left + right for left, right in merges)
    ids = {token: number for number, token in enumerate(vocabulary)}
    return Tokenizer(models.BPE(vocab=ids, merges=list(dict.fromkeys(merges)), **settings))


def llama2() -> PreTrainedTokenizerBase:
    """Byte-fallback BPE whose normalizer puts a space before every text, and before what follows a special token."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *PRINTABLE[1:]]
    words = ["▁The", "▁is", "▁Paris", "is", "ing", ".Pa"]
    backend = bpe(words, alphabet, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrapped(backend)


def metaspace(scheme: str, *, one_line: bool = False) -> PreTrainedTokenizerBase:
    """A Unigram whose pre-tokenizer puts a space before texts; with `one_line`, its normalizer knows no line breaks."""
    pieces = [*SPECIAL, "▁", "\n", *PRINTABLE[1:], "▁The", "▁is", "▁Paris", "ing", "▁going"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - 1.0 / len(piece)) for piece in pieces], unk_id=0))
    if one_line:
        backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return wrapped(backend)


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerBase:
    words = ["The", "ĠThe", "Ġis", "ĠParis", "Paris", "ing", "going", "ĊĊ", "ĊĊĊ"]
    backend = bpe(words, sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def llama3() -> PreTrainedTokenizerBase:
    """Byte BPE whose pre-tokenizer leaves line breaks with the mark before them."""
    backend = bpe(["ĠParis", "Paris", "ĊĊ", "ĊĊĊ", ".Ċ"], sorted(pre_tokenizers.ByteLevel.alphabet()))
    cut = pre_tokenizers.Split(Regex(r"[^\s\w]+\n*|\s*\n+| ?\w+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def word_piece() -> PreTrainedTokenizerBase:
    tokens = [*SPECIAL, "the", "is", "paris", "go", "going", *PRINTABLE, *(f"##{letter}" for letter in PRINTABLE)]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocab=ids, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrapped(backend)


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which gives no offsets: characters, and `is` and ` P` as one token."""

    def __init__(self, **settings: Any) -> None:
        self.tokens = [*SPECIAL, "\n", *PRINTABLE, "is", " P"]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found = []
        while text:
            token = text[:2] if text[:2] in ("is", " P") else text[:1]
            found.append(token)
            text = text[len(token) :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.tokens.index(token) if token in self.tokens else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama 2": llama2,
    "llama 3": llama3,
    "metaspace before every text": lambda: metaspace("always"),
    "metaspace before the first text": lambda: metaspace("first"),
    "metaspace without line breaks": lambda: metaspace("always", one_line=True),
    "bytes": lambda: byte_level(False),
    "bytes with a space before": lambda: byte_level(True),
    "word pieces": word_piece,
    "slow": SlowTokenizer,
}
