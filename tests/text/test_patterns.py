"""`stop_regex`: what searching the whole text after every token would give, trimmed."""

import random
from typing import Any

import pytest
import regex

from jaxengine.errors import RequestError
from jaxengine.text import patterns as patterns_module
from jaxengine.text.detokenizer import Detokenizer, Vocabulary
from jaxengine.text.patterns import compile_pattern
from tests.text.tokenizers_for_tests import byte_level

PATTERNS = [
    r"ab+c",
    r"\d{3}",
    r"\n\n",
    r"(?<=x)y",
    r"[é世]+!",
    r"(a|ab)(c|bcd)",
    r"e.*?f",
    r"\bend\b",
    r"b$",
    r"a++b",
]


@pytest.fixture(scope="module")
def vocabulary() -> tuple[Any, Vocabulary]:
    tokenizer = byte_level()
    return tokenizer, Vocabulary(tokenizer)


def first_match(
    tokenizer: Any, ids: list[int], patterns: list[str], stop: list[str]
) -> tuple[int, str, str] | None:
    """Tokens taken, text kept and what matched: the whole text is searched after every token."""
    for count in range(1, len(ids) + 1):
        # Bytes of a character that is not whole yet decode to U+FFFD, which no pattern matches.
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        found = [(m.end(), m.start(), p) for p in patterns if (m := regex.search(p, text))]
        found += [(at + len(s), at, s) for s in stop if (at := text.find(s)) >= 0]
        if found:
            _, start, matched = min(found)
            return count, text[:start], matched
    return None


def test_patterns_end_a_text_where_searching_all_of_it_would(vocabulary: Any):
    tokenizer, words = vocabulary
    rng = random.Random(0)
    num_matched = 0
    for _ in range(400):
        text = "".join(rng.choices("aabbccdefxy 1234\n!é世 end", k=rng.randint(1, 40)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        patterns = rng.sample(PATTERNS, rng.randint(1, 3))
        stop = rng.sample(["bc", "世", "34"], rng.randint(0, 1))
        wanted = first_match(tokenizer, ids, patterns, stop)
        detokenizer = Detokenizer(words, stop=stop, stop_regex=patterns)
        given, rest = "", ids
        while rest and detokenizer.matched is None:
            cut = rng.randint(1, 5)
            given += detokenizer.push(rest[:cut])
            rest = rest[cut:]
        given += detokenizer.finish()
        if wanted is None:
            assert detokenizer.matched is None and given == tokenizer.decode(ids)
        else:
            num_matched += 1
            got = (detokenizer.num_tokens, given, detokenizer.matched)
            assert got == wanted, (text, patterns, stop)
    assert 100 < num_matched < 350


def test_a_match_is_kept_on_request(vocabulary: Any):
    tokenizer, words = vocabulary
    ids = tokenizer("one 123 two", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(words, stop_regex=[r"\d+3"], no_stop_trim=True)
    assert detokenizer.push(ids) == "one 123" and detokenizer.matched == r"\d+3"


@pytest.mark.parametrize("pattern", ["(", "a*", ""])
def test_bad_patterns_are_refused(pattern: str):
    with pytest.raises(RequestError, match="`stop_regex`"):
        compile_pattern(pattern)


def test_a_pattern_without_end_fails_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patterns_module, "TIMEOUT_S", 0.05)
    search = patterns_module.PatternSearch([r"(?:a|a)*(?:a|a)*(?:a|a)*\d"])
    with pytest.raises(RequestError, match="took longer than"):
        search.push(b"a" * 200)
