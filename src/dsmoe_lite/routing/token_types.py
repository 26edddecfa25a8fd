"""What kind of token a token is, from its characters alone."""

from collections.abc import Sequence

TYPES = ("word", "word part", "digit", "punctuation", "space", "byte")


def token_types(tokens: Sequence[str]) -> tuple[str, ...]:
    """The type of each token of a text, in order.

    A word starts where no letter stands before it; its later tokens are parts. "byte": a further byte of a character
    that several tokens share.
    """
    types, before = [], ""
    for token in tokens:
        types.append(_type(token, before))
        before = token or before
    return tuple(types)


def _type(token: str, before: str) -> str:
    core = token.strip()
    if not core:
        return "space" if token else "byte"
    if any(character.isalpha() for character in core):
        goes_on = token == token.lstrip() and core[0].isalpha() and before[-1:].isalpha()
        return "word part" if goes_on else "word"
    return "digit" if any(character.isnumeric() for character in core) else "punctuation"
