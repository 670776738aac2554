"""The character tokenizer: round trips, unknown characters, what is saved is what is loaded. And where tokens stand, for others, too."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from papo.engines.sources.programs import ProgramsSource
from papo.engines.sources.sums import SumsSource
from papo.engines.tokenizer import SYMBOLS, TokenizerAligner, build_tokenizer, symbols_of, token_starts
from papo.errors import CheckpointError, DataError
from papo.params import ProgramsParams, ProgramTier, SumsParams, Tier

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS = ["3+5-2=?\n", "3+5=8\n8-2=6\n\\boxed{6}", "", "}}\n\n", "\\boxed{\\boxed{1}", "0123456789"]


def ids_of(tokenizer: object, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]  # typed as an object: the class depends on the checkpoint


def test_every_prompt_and_trace_survives_the_round_trip() -> None:
    tokenizer = build_tokenizer()
    tiers = {"hard": Tier(min_terms=12, max_terms=12, problems=20)}
    source = SumsSource(SumsParams(train=Tier(min_terms=2, max_terms=9, problems=200), eval=tiers, traces=300), seed=1)
    problems = [*source.train(), *source.benchmarks()["hard"]]
    texts = [text for problem in problems for text in (problem.prompt, problem.reference_solution or "")]
    texts += [text for trace in source.traces() for text in trace]
    assert len(texts) == 2 * 220 + 2 * 300
    for text in texts:
        ids = ids_of(tokenizer, text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.replace("\\boxed{", "B"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_known_symbols_survives_the_round_trip(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize(("text", "unknown"), [("3*4", 1), ("three", 5), (" 3 ", 2), ("\\boxed", 6), ("３é🙂\r\t", 5)])
def test_an_unknown_character_is_one_unknown_token(text: str, unknown: int) -> None:
    tokenizer = build_tokenizer()
    assert ids_of(tokenizer, text).count(tokenizer.unk_token_id) == unknown


def test_special_tokens_are_not_written_by_text() -> None:
    tokenizer = build_tokenizer()
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2]
    assert len(tokenizer) == 3 + len(SYMBOLS)
    assert [tokenizer.convert_tokens_to_ids(symbol) for symbol in SYMBOLS] == list(range(3, len(tokenizer)))


def test_what_is_saved_loads_as_the_same_tokenizer(policy: Path) -> None:
    # With a model_type that has a tokenizer class of its own, AutoTokenizer loads that class, which splits and adds otherwise.
    from transformers import AutoTokenizer

    tokenizer, loaded = build_tokenizer(), AutoTokenizer.from_pretrained(policy)
    for text in [*TEXTS, "3*4 \r\n"]:
        assert ids_of(loaded, text) == ids_of(tokenizer, text)
        assert loaded.decode(ids_of(loaded, text)) == tokenizer.decode(ids_of(tokenizer, text))
    names = ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id", "model_max_length")
    assert [getattr(loaded, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert len(loaded) == len(tokenizer)


# ---- other worlds than that of the sums ----


def program_texts(seed: int = 0) -> list[str]:
    tier = ProgramTier(min_operations=2, max_operations=4, problems=1)
    source = ProgramsSource(ProgramsParams(train=tier, eval={}, traces=400), seed=seed)
    return [text for trace in source.traces() for text in trace]


def test_the_vocabulary_of_the_sums_is_what_it_was() -> None:
    traces = SumsSource(SumsParams(traces=500), seed=0).traces()
    symbols = symbols_of(text for trace in traces for text in trace)
    assert symbols == ("\\boxed{", "}", "\n", "=", "?", "+", "-", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert symbols_of([]) == symbols
    saved = json.loads(build_tokenizer(symbols).backend_tokenizer.to_str())
    assert list(saved["model"]["vocab"]) == ["<pad>", "<eos>", "<unk>", *symbols]
    assert saved["pre_tokenizer"]["pattern"] == {"Regex": "\\\\boxed\\{|[\\s\\S]"}


@pytest.mark.parametrize("text", ["box", "\\boxed", "3 + 5", "3*5", "x{"])
def test_what_the_symbols_of_the_sums_do_not_write_is_added(text: str) -> None:
    symbols = symbols_of(["3+5=8\n", text])
    assert symbols[: len(SYMBOLS)] == SYMBOLS
    assert len(symbols) > len(SYMBOLS)
    tokenizer = build_tokenizer(symbols)
    assert tokenizer.unk_token_id not in ids_of(tokenizer, text)
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_programs_are_written_in_words_whatever_the_order_of_the_traces() -> None:
    texts = program_texts()
    symbols = symbols_of(texts)
    assert symbols_of(reversed(texts)) == symbols == tuple(dict.fromkeys(symbols))
    tokenizer = build_tokenizer(symbols)
    for text in texts:
        ids = ids_of(tokenizer, text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert sum(len(ids_of(tokenizer, text)) for text in texts) < 0.35 * sum(map(len, texts))
    program = "def solve(number):\n    return number + 3"
    words = ["def", " solve", "(", "number", ")", ":", "\n    ", "return", " number", " +", " 3"]
    assert [tokenizer.decode([token]) for token in ids_of(tokenizer, program)] == words


def test_a_word_that_no_trace_holds_is_made_of_what_there_is() -> None:
    tokenizer = build_tokenizer(symbols_of(program_texts()))
    text = "def solved(numberless):\n        return nob"
    assert tokenizer.decode(ids_of(tokenizer, text)) == text
    assert ids_of(tokenizer, "Ü").count(tokenizer.unk_token_id) == 1


def test_the_tokens_of_a_program_stand_where_they_are_said_to() -> None:
    tokenizer = build_tokenizer(symbols_of(program_texts())).backend_tokenizer
    for text in program_texts(seed=1):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert token_starts(tokenizer, encoding.ids, text) == [start for start, _ in encoding.offsets]
    eos = tokenizer.token_to_id("<eos>")
    assert token_starts(tokenizer, [*encoding.ids, eos], text)[-1] == len(text)


# ---- where tokens stand in the text ----

LINES = ["3 + 5 = 8, so naïve café", "你好 🙂🙂 done", "x\n\ny = \\boxed{8}"]


def byte_level() -> Tokenizer:
    """A byte-level BPE, as GPT-2's, Llama 3's and Qwen's are; id 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 5, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A BPE with a space before the text and bytes for what it does not know, as Llama 2's and Mistral's are."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "\n"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


def embedded() -> Tokenizer:
    tokenizer: Tokenizer = build_tokenizer().backend_tokenizer
    return tokenizer


def ids_named(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    numbers = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in numbers
    return [number for number in numbers if number is not None]


def by_prefixes(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """How much of the text the tokens before each one make up, at most."""
    found, most = [], 0
    for number in range(len(ids)):
        before = tokenizer.decode(ids[:number], skip_special_tokens=False)
        most = max(most, next((n for n in range(len(before), 0, -1) if text.startswith(before[:n])), 0))
        found.append(most)
    return found


def test_the_characters_of_the_embedded_policy() -> None:
    tokenizer = embedded()
    ids = ids_named(tokenizer, "3", "=", "\n", "\\boxed{", "3", "}", "<eos>")
    assert token_starts(tokenizer, ids, "3=\n\\boxed{3}") == [0, 1, 2, 3, 10, 11, 12]
    assert token_starts(tokenizer, ids, "3=\n\\boxed{3}<eos>") == [0, 1, 2, 3, 10, 11, 12]
    assert token_starts(tokenizer, ids[:-1], "3=\n\\boxed{3}") == [0, 1, 2, 3, 10, 11]


def test_special_tokens_within_a_text() -> None:
    """The sampler writes them out, another may leave them out."""
    tokenizer = embedded()
    ids = ids_named(tokenizer, "<unk>", "3", "<pad>", "4", "<eos>")
    assert token_starts(tokenizer, ids, "<unk>3<pad>4") == [0, 5, 6, 11, 12]
    assert token_starts(tokenizer, ids, "34") == [0, 0, 1, 1, 2]
    assert token_starts(tokenizer, [0, 0], "") == [0, 0]
    assert token_starts(tokenizer, [], "") == []


@pytest.mark.parametrize(
    ("make", "symbol"),
    [(byte_level, lambda byte: byte_level_symbol(byte)), (byte_fallback, lambda byte: f"<0x{byte:02X}>")],
)
def test_a_character_of_several_tokens_starts_with_the_first(
    make: Callable[[], Tokenizer], symbol: Callable[[int], str]
) -> None:
    tokenizer = make()
    ids = ids_named(tokenizer, *map(symbol, "a🙂é\n".encode()), "<eos>")
    assert token_starts(tokenizer, ids, "a🙂é\n") == [0, 1, 1, 1, 1, 2, 2, 3, 4]


def byte_level_symbol(byte: int) -> str:
    """How byte-level tokenizers write a byte: itself if it can be seen, else a letter from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in seen else chr(0x100 + [b for b in range(256) if b not in seen].index(byte))


def test_a_token_may_end_within_a_character() -> None:
    """` ï` as a space with the first byte of the letter, and the second byte."""
    tokenizer = byte_level()
    first, second = "ï".encode()
    merged = "a" + byte_level_symbol(first)
    ids = ids_named(tokenizer, merged, byte_level_symbol(second), "x")
    assert token_starts(tokenizer, ids, "aïx") == [0, 1, 2]


def test_ids_that_are_not_those_of_the_text() -> None:
    """A policy may sample `8` `,` where the text would be encoded as one token."""
    tokenizer = byte_level()
    text = LINES[0]
    whole = tokenizer.encode(text).ids
    single = ids_named(tokenizer, *map(byte_level_symbol, text.encode()))
    assert len(whole) < len(single)
    starts = [len(text.encode()[:n].decode(errors="ignore")) for n in range(len(single))]
    assert token_starts(tokenizer, single, text) == starts
    mixed = single[: len(text.encode()) - 5] + tokenizer.encode(text.encode()[-5:].decode()).ids
    assert tokenizer.encode(text).ids != mixed
    assert token_starts(tokenizer, mixed, text) == by_prefixes(tokenizer, mixed, text)


@pytest.mark.parametrize("make", [embedded, byte_level, byte_fallback])
def test_any_ids_against_the_text_of_every_prefix(make: Callable[[], Tokenizer]) -> None:
    """Most of these hold bytes that are no character."""
    tokenizer, stream = make(), random.Random(0)
    for _ in range(300):
        ids = [stream.randrange(tokenizer.get_vocab_size()) for _ in range(stream.randrange(20))]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert token_starts(tokenizer, ids, text) == by_prefixes(tokenizer, ids, text)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_any_words_against_the_text_of_every_prefix(make: Callable[[], Tokenizer]) -> None:
    tokenizer, stream = make(), random.Random(1)
    words = ["a", " a", "é", "你好", " 🙂", "\n", "\n\n", "aé"]
    for _ in range(300):
        ids = [number for _ in range(stream.randrange(9)) for number in tokenizer.encode(stream.choice(words)).ids]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert "\N{REPLACEMENT CHARACTER}" not in text
        assert token_starts(tokenizer, ids, text) == by_prefixes(tokenizer, ids, text)


@pytest.mark.parametrize("text", ["", "3=8", "3=4 ", "3=4<eos><eos>"])
def test_a_text_of_other_ids_is_refused(text: str) -> None:
    tokenizer = embedded()
    ids = ids_named(tokenizer, "3", "=", "4", "<eos>")
    with pytest.raises(DataError, match="is not the text of its 4 token ids") as caught:
        token_starts(tokenizer, ids, text)
    assert "run rollout again" in caught.value.fix


def test_eight_thousand_tokens_are_quick() -> None:
    tokenizer = byte_level()
    text = "\n".join(LINES * 300)
    ids = tokenizer.encode(text).ids
    assert len(ids) > 8000
    begin = time.process_time()
    assert len(token_starts(tokenizer, ids, text)) == len(ids)
    assert time.process_time() - begin < 1.0


def test_the_aligner_reads_the_tokenizer_of_a_policy(policy: Path) -> None:
    aligner = TokenizerAligner(policy / "tokenizer.json")
    assert aligner.starts(ids_of(build_tokenizer(), "3=\\boxed{3}"), "3=\\boxed{3}") == [0, 1, 2, 9, 10]
    assert set(aligner.versions()) == {"tokenizers"}


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match="not a tokenizer") as caught:
        TokenizerAligner(path).starts([3], "=")
    assert caught.value.where == str(path)
