"""Whether a tokenizer and the lengths of the examples fit a model."""


def check_context(max_length: int, context_length: int) -> None:
    """Refuse examples longer than the model's context, both in tokens.

    Raises:
        ValueError: `max_length` is above `context_length`.
    """
    if max_length > context_length:
        raise ValueError(
            f"`lengths.max_length`={max_length} is longer than the model's context of {context_length} tokens; "
            f"set it to at most {context_length}."
        )


def check_vocabulary(tokenizer_size: int, vocab_size: int) -> None:
    """Refuse a tokenizer that knows ids which the model does not; a larger (padded) model vocabulary is fine.

    Args:
        tokenizer_size: One more than the largest token id of the tokenizer.
        vocab_size: Rows of the model's embedding.

    Raises:
        ValueError: The tokenizer is the larger one.
    """
    if tokenizer_size > vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {tokenizer_size - 1}, the model's vocabulary has {vocab_size}; "
            "set `tokenizer` to the name of the model that is trimmed."
        )
