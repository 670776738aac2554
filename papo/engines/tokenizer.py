"""Tokenizers: that of the embedded policy, and where in a text the tokens of any policy stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from papo.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_BOX = "\\boxed{"
SYMBOLS = (_BOX, "}", "\n", "=", "?", "+", "-", *"0123456789")


_PIECE = re.compile(r" ?(?:[^\W\d]+|[^\s])|\s")
_LINE = re.compile(r"\n[ ]+")


def symbols_of(texts: Iterable[str]) -> tuple[str, ...]:
    """SYMBOLS where they write every text; else these, and after them in their order what else the texts hold.

    That is each word and each other character, with and without a space before it, line breaks with the spaces that indent the next
    line, and single characters, of which any other word can be made.
    """
    distinct = set(texts)
    characters = {character for text in distinct for character in text.replace(_BOX, "")}
    if characters <= set(SYMBOLS):
        return SYMBOLS
    found = {piece for text in distinct for pattern in (_LINE, _PIECE) for piece in pattern.findall(text)}
    found |= {piece.strip(" ") for piece in found} | characters
    return (*SYMBOLS, *sorted(found - {"", *SYMBOLS}))


def build_tokenizer(symbols: Sequence[str] = SYMBOLS) -> PreTrainedTokenizerFast:
    """The embedded policy's: one id a symbol, the longest that fits; a character that is none becomes `<unk>`.

    The symbols of the sums are single characters, but for the opening of a box.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {symbol: index for index, symbol in enumerate([*special, *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    longer = sorted((symbol for symbol in symbols if len(symbol) > 1), key=len, reverse=True)
    pattern = "|".join([*map(_escaped, longer), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _escaped(symbol: str) -> str:
    """A regular expression of the symbol alone."""
    return re.sub(r"([^\w\s])", r"\\\1", symbol)


class TokenizerAligner:
    """Where the tokens of a policy stand, by its `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def versions(self) -> dict[str, str]:
        return {"tokenizers": version("tokenizers")}

    def starts(self, completion_ids: Sequence[int], completion: str) -> list[int]:
        """See `token_starts`.

        Raises:
            CheckpointError: the file is not that of a tokenizer.
        """
        return token_starts(self._tokenizer, completion_ids, completion)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(
                f"not a tokenizer: {error}",
                where=str(self._path),
                fix="delete the policy and run the stage that makes it",
            ) from error


def token_starts(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """The character of `text` at which each token starts, also where the text would not be encoded as these ids.

    A token that completes no character, as the first byte of a longer one, starts where the text so far ends. A token without text,
    as a special one that the text leaves out, does so too; the last one, if the text is that of the ids before it, at its end.

    Args:
        tokenizer: of the policy that sampled the ids.
        ids: (T,) a completion.
        text: what `tokenizer` decodes them to, with all special tokens, with all but a last one, or with none.

    Returns:
        (T,) characters, none lower than the one before.

    Raises:
        DataError: the text is not that of the ids.
    """
    ids = list(ids)
    for told, without_special in ((ids, False), (ids[:-1], False), (ids, True)):
        if tokenizer.decode(told, skip_special_tokens=without_special) == text:
            starts = _starts(tokenizer, told, text, without_special)
            return starts + [len(text)] * (len(ids) - len(told))
    raise DataError(
        f"a completion of {len(text)} characters is not the text of its {len(ids)} token ids",
        where=f"completion {text[:60]!r}",
        fix="run rollout again with the tokenizer of this policy",
    )


def _starts(tokenizer: Tokenizer, ids: list[int], text: str, without_special: bool) -> list[int]:
    """`token_starts` of ids that decode to `text` as a whole: token by token, what is not whole yet with the next."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=without_special)
    starts: list[int] = []
    held: list[int] = []
    end = 0
    for token in ids:
        # A token such as ` a` with the first byte of a character is held back with its whole characters.
        whole = _common(tokenizer.decode(held, skip_special_tokens=without_special), text, end) if held else 0
        starts.append(end + whole)
        held.append(token)
        try:
            piece = stream.step(tokenizer, token) or ""
        except Exception:  # the library raises nothing narrower, on bytes that are no character
            return _compared(tokenizer, ids, text, without_special)
        if not text.startswith(piece, end):
            return _compared(tokenizer, ids, text, without_special)
        if piece:
            end, held = end + len(piece), []
    return starts


def _compared(tokenizer: Tokenizer, ids: list[int], text: str, without_special: bool) -> list[int]:
    """As `_starts`: how much of the text the tokens before make up. Quadratic in the number of tokens."""
    starts, end = [], 0
    for number in range(len(ids)):
        before = tokenizer.decode(ids[:number], skip_special_tokens=without_special)
        if before.startswith(text[:end]):
            end += _common(before[end:], text, end)
        starts.append(end)
    return starts


def _common(piece: str, text: str, start: int) -> int:
    """How many characters `piece` and `text` from `start` on begin with in common."""
    pairs = zip(piece, text[start : start + len(piece)], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
