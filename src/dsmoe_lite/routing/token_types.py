"""The type of a token, word, digit, punctuation ..., from its characters alone."""

from collections.abc import Sequence

TYPES = ("word", "word part", "digit", "punctuation", "space", "byte")


def token_types(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the type of each token of a text, in order.

    A word starts at a letter that does not follow another letter; its later tokens are word parts. "byte" is a further
    byte of a character that several tokens share.
    """
    types, previous = [], ""
    for token in tokens:
        types.append(_type(token, previous))
        previous = token or previous
    return tuple(types)


def _type(token: str, previous: str) -> str:
    core = token.strip()
    if not core:
        return "space" if token else "byte"
    if any(character.isalpha() for character in core):
        continues = token == token.lstrip() and core[0].isalpha() and previous[-1:].isalpha()
        return "word part" if continues else "word"
    return "digit" if any(character.isnumeric() for character in core) else "punctuation"
