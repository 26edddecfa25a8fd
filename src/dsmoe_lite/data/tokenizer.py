"""Byte-level BPE, trained once per corpus and cached."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, require, require_int
from dsmoe_lite.common.files import write_json
from dsmoe_lite.data.corpus import Corpus

END = "<|end|>"  # follows every document
END_ID = 0
SAMPLE_BYTES = 20_000_000
RECIPE = 2  # part of the cache key: raise it if the training changes


def load_tokenizer(corpus: Corpus, vocab_size: int, *, folder: Path | None = None) -> Tokenizer:
    """Return the tokenizer of `corpus` with `vocab_size` ids: from `folder` (the cache), or trained on the first 20 MB.

    The 256 bytes are in the vocabulary, so every text can be encoded and decodes to itself. Each digit is a token.
    Raises InputError if vocab_size leaves no room for END and the bytes, or is above 65536, and for a file in the cache
    that is damaged or was made for other text.
    """
    require_int("vocab_size", vocab_size, 257, 65_536)
    key = json.dumps([corpus.fingerprint(), vocab_size, SAMPLE_BYTES, RECIPE, tokenizers.__version__], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = (folder or paths.cache() / "tokenizers") / f"{corpus.name}-{vocab_size}-{digest}.json"
    if not path.exists():
        write_json(path, {"made_for": key, "tokenizer": _train(corpus, vocab_size).to_str()})
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        require(stored["made_for"] == key, "made_for", stored["made_for"], "is another corpus or size")
        return read_tokenizer(stored["tokenizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged tokenizer ({error}); remove it, and it will be trained again") from None


def read_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer from its JSON, for example from a model file's metadata. Raises InputError if it is damaged.

    The characters of <|end|> in a text are encoded like all others: only END_ID is the end of a document.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"damaged tokenizer ({error})") from None
    tokenizer.encode_special_tokens = True  # the library's name for: take special tokens in a text for text
    return tokenizer


def _train(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    return tokenizer


def _sample(corpus: Corpus) -> Iterator[str]:
    remaining = SAMPLE_BYTES
    for document in corpus.documents("train"):
        remaining -= len(document.text.encode())
        if remaining < 0:
            return
        yield document.text
