"""Check that a tokenizer and the lengths of the examples fit a model."""

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
    """Refuse a tokenizer with more tokens than the model: it belongs to another model. The model may be larger.

    Args:
        tokenizer_size: largest token id of the tokenizer plus one, without tokens that were added to it.
        vocab_size: number of rows of the model's embedding.

    Raises:
        UserError: `tokenizer_size` is above `vocab_size`.
    """
    if tokenizer_size > vocab_size:
        raise UserError(
            f"The tokenizer has ids up to {tokenizer_size - 1}, the model's vocabulary has {vocab_size}; "
            "set `tokenizer` to the name of the model that is trimmed."
        )


def check_ids(largest: int, token: str, vocab_size: int) -> None:
    """Refuse text with a token that the model has no embedding for: it was added only to the tokenizer.

    Args:
        largest: largest token id in the text.
        token: the token with this id.
        vocab_size: number of rows of the model's embedding.

    Raises:
        UserError: `largest` is not below `vocab_size`.
    """
    if largest >= vocab_size:
        raise UserError(
            f"The text holds the token {token!r} with id {largest}, the model's vocabulary has {vocab_size}; set "
            "`tokenizer` to the name of the model that is trimmed, or take the token out of text and chat template."
        )
