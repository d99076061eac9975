"""Whether a tokenizer and the lengths of the examples fit a model."""

from pdtrim_pl.errors import UserError


def check_context(max_length: int, context_length: int) -> None:
    """Refuse examples longer than the model's context, both in tokens.

    Raises:
        UserError: `max_length` is above `context_length`.
    """
    if max_length > context_length:
        raise UserError(
            f"`lengths.max_length`={max_length} is longer than the model's context of {context_length} tokens; "
            f"set it to at most {context_length}."
        )


def check_vocabulary(tokenizer_size: int, vocab_size: int) -> None:
    """Refuse a tokenizer of another model, by its size; a larger (padded) model vocabulary is fine.

    Args:
        tokenizer_size: One more than the largest token id of the tokenizer, tokens added later left out.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: The tokenizer is the larger one.
    """
    if tokenizer_size > vocab_size:
        raise UserError(
            f"The tokenizer has ids up to {tokenizer_size - 1}, the model's vocabulary has {vocab_size}; "
            "set `tokenizer` to the name of the model that is trimmed."
        )


def check_ids(largest: int, token: str, vocab_size: int) -> None:
    """Refuse text with a token that the model has no embedding for, such as one added to the tokenizer alone.

    Args:
        largest: The largest token id of the text.
        token: What this id stands for.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: The id is beyond the embedding.
    """
    if largest >= vocab_size:
        raise UserError(
            f"The text holds the token {token!r} with id {largest}, the model's vocabulary has {vocab_size}; set "
            "`tokenizer` to the name of the model that is trimmed, or take the token out of text and chat template."
        )
