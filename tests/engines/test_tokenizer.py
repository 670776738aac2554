"""The character tokenizer: round trips, unknown characters, and that what is saved is what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from papo.engines.sources.sums import SumsSource
from papo.engines.tokenizer import SYMBOLS, build_tokenizer
from papo.params import SumsParams, Tier

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
