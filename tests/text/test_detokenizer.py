"""The incremental detokeniser against decoding all ids at once, for any split."""

import itertools
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxengine
from jaxengine.text.detokenizer import Detokenizer, Vocabulary
from jaxengine.text.tokenizer import load_tokenizer
from tests.text import tokenizers_for_tests as tokenizers

TOKENIZER = tokenizers.byte_level()
VOCABULARY = Vocabulary(TOKENIZER)
NUM_IDS = len(TOKENIZER)
EOS, IM_END = TOKENIZER.convert_tokens_to_ids(tokenizers.SPECIALS)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


ID_OF_BYTES = {VOCABULARY.reader(False, True).read([i]): i for i in range(NUM_IDS)}


def byte_ids(data: bytes) -> list[int]:
    """One single-byte token per byte."""
    return [ID_OF_BYTES[bytes([byte])] for byte in data]


TEXTS = st.text(alphabet="the fox éß世界🙂👩‍👧\n,�", max_size=12)
IDS = st.lists(
    st.lists(st.integers(0, NUM_IDS - 1), max_size=6)
    | TEXTS.map(encode)
    | TEXTS.map(lambda text: byte_ids(text.encode()))
    | st.binary(max_size=6).map(byte_ids),
    max_size=4,
).map(lambda parts: list(itertools.chain(*parts)))


def split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Cuts ids into pushes of the given sizes, and one with the rest."""
    pushes, start = [], 0
    for size in sizes:
        pushes.append(ids[start : start + size])
        start += size
    return [*pushes, ids[start:]]


SIZES = st.lists(st.integers(0, 5), max_size=30)


def run(
    ids: list[int], sizes: list[int], vocabulary: Vocabulary = VOCABULARY, **kwargs: Any
) -> tuple[Detokenizer, list[str]]:
    detokenizer = Detokenizer(vocabulary, **kwargs)
    deltas = [detokenizer.push(push) for push in split(ids, sizes)]
    deltas.append(detokenizer.finish())
    assert detokenizer.text == "".join(deltas)
    return detokenizer, deltas


@given(ids=IDS, sizes=SIZES, skip=st.booleans())
@example(ids=byte_ids(b"\xf0\x9f\x99"), sizes=[1, 1, 1], skip=True)
@example(ids=byte_ids(b"\xe4\xbd\xed\xa0\x80\xff"), sizes=[1] * 6, skip=True)
def test_deltas_join_to_the_whole_decode(ids: list[int], sizes: list[int], skip: bool):
    detokenizer, _ = run(ids, sizes, skip_special_tokens=skip)
    assert detokenizer.text == TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(ids) and detokenizer.matched is None


@given(ids=IDS, sizes=SIZES, skip=st.booleans())
def test_an_unmatched_stop_changes_nothing(ids: list[int], sizes: list[int], skip: bool):
    stops = ["the foxzzz", "世界zzz", "<|im_end|>zzz"]
    detokenizer, _ = run(ids, sizes, skip_special_tokens=skip, stop=stops)
    assert detokenizer.text == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(ids=IDS, sizes=SIZES)
def test_every_push_gives_all_that_is_certain(ids: list[int], sizes: list[int]):
    """What is held back is at most the three bytes of an unfinished character."""
    detokenizer, seen = Detokenizer(VOCABULARY), 0
    for push in split(ids, sizes):
        detokenizer.push(push)
        seen += len(push)
        now = TOKENIZER.decode(ids[:seen], skip_special_tokens=True)
        assert now.startswith(detokenizer.text)
        assert now[len(detokenizer.text) :] in ("", "�")


def step_by_step(ids: list[int], stops: list[str]) -> tuple[int, str, int, int] | None:
    """Tokens, stop, start and end of the first match when decoding anew after every token."""
    for num_tokens in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:num_tokens])
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
        if ends:
            end, start, stop = min(ends)
            return num_tokens, stop, start, end
    return None


@st.composite
def ids_and_stops(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    """Stops that are pieces of the text, so that most of them are found."""
    ids = draw(IDS)
    text = TOKENIZER.decode(ids)
    stops = draw(st.lists(TEXTS.filter(bool), max_size=2))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stops.append(text[start : start + draw(st.integers(1, 8))])
    return ids, [stop for stop in stops if stop and "�" not in stop]


@given(case=ids_and_stops(), sizes=SIZES, no_stop_trim=st.booleans())
def test_stop_strings_cut_as_step_by_step(
    case: tuple[list[int], list[str]], sizes: list[int], no_stop_trim: bool
):
    ids, stops = case
    expected = step_by_step(ids, stops)
    detokenizer, _ = run(
        ids, sizes, stop=stops, skip_special_tokens=False, no_stop_trim=no_stop_trim
    )
    text = TOKENIZER.decode(ids)
    if expected is None:
        assert detokenizer.matched is None and detokenizer.text == text
        return
    num_tokens, stop, start, end = expected
    assert (detokenizer.num_tokens, detokenizer.matched) == (num_tokens, stop)
    assert detokenizer.text == text[: end if no_stop_trim else start]


@given(case=ids_and_stops(), sizes=SIZES)
def test_hidden_tokens_are_searched_but_not_shown(
    case: tuple[list[int], list[str]], sizes: list[int]
):
    ids, stops = case
    stops = [*stops, "<|im_end|>"]
    whole, _ = run(ids, sizes, stop=stops, skip_special_tokens=False)
    hidden, _ = run(ids, sizes, stop=stops, skip_special_tokens=True)
    assert (hidden.num_tokens, hidden.matched) == (whole.num_tokens, whole.matched)
    if hidden.matched == "<|im_end|>" and ids[hidden.num_tokens - 1] == IM_END:
        before = ids[: hidden.num_tokens - 1]
        assert hidden.text == TOKENIZER.decode(before, skip_special_tokens=True)


@given(ids=IDS, sizes=SIZES)
def test_only_text_that_may_begin_a_stop_is_held_back(ids: list[int], sizes: list[int]):
    stop = "the fox"
    ids = [*ids, *encode("x the fo")]
    detokenizer, seen = Detokenizer(VOCABULARY, stop=[stop], skip_special_tokens=False), 0
    for push in split(ids, sizes):
        detokenizer.push(push)
        if detokenizer.matched:
            return
        seen += len(push)
        now = TOKENIZER.decode(ids[:seen])
        held = max(n for n in range(len(stop)) if now.endswith(stop[:n]))
        certain = now[: len(now) - held]
        assert detokenizer.text in (certain, certain.removesuffix("�"))


def test_stop_across_pushes_by_hand():
    ids = encode("say STOP now")
    for size in (1, 2, 3, len(ids)):
        detokenizer, deltas = run(ids, [size] * 20, stop=["STOP"])
        assert (detokenizer.text, detokenizer.matched) == ("say ", "STOP")
        assert TOKENIZER.decode(ids[: detokenizer.num_tokens]).endswith("STOP")
        assert deltas[-1] == ""


def test_the_stop_that_ends_first_wins_whatever_their_order():
    ids = encode("abcd")
    for stops in (["abcd", "bc"], ["bc", "abcd"]):
        assert run(ids, [1] * 4, stop=stops)[0].matched == "bc"
        assert run(ids, [4], stop=stops)[0].text == "a"


def test_pushes_after_a_match_are_dropped():
    detokenizer, _ = run(encode("a|b"), [], stop=["|"])
    assert detokenizer.push(encode("more")) == "" and detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.num_tokens) == ("a", 2)


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_token_is_shown_only_with_no_stop_trim(skip: bool):
    word = encode("fox")[-1]
    for last, text in ((EOS, "<|endoftext|>"), (word, TOKENIZER.decode([word]))):
        for no_stop_trim, stop in itertools.product((True, False), ((), ["zzz"])):
            detokenizer = Detokenizer(
                VOCABULARY, stop=stop, skip_special_tokens=skip, no_stop_trim=no_stop_trim
            )
            detokenizer.push([*encode("hi"), last], is_stopped=True)
            detokenizer.finish()
            is_shown = no_stop_trim and not (skip and last == EOS)
            assert detokenizer.text == ("hi" + text if is_shown else "hi")


def test_a_stop_token_may_complete_a_stop_string():
    detokenizer = Detokenizer(VOCABULARY, stop=["i<|im_end|>"])
    assert detokenizer.push([*encode("hi"), IM_END], is_stopped=True) == "h"
    assert detokenizer.matched == "i<|im_end|>"


def test_every_token_alone_decodes_as_the_tokenizer_does():
    tokenizer = load_tokenizer(jaxengine.DEMO_MODEL)
    for tok, vocabulary in ((TOKENIZER, VOCABULARY), (tokenizer, Vocabulary(tokenizer))):
        for token_id in range(len(tok) + 3):  # ids past the end decode to nothing
            for skip in (True, False):
                detokenizer, _ = run([token_id], [], vocabulary, skip_special_tokens=skip)
                assert detokenizer.text == tok.decode([token_id], skip_special_tokens=skip)


@cache
def window_vocabularies() -> list[tuple[Any, Vocabulary]]:
    built = [tokenizers.byte_fallback(), tokenizers.word_piece()]
    return [(tokenizer, Vocabulary(tokenizer)) for tokenizer in built]


@given(data=st.data(), sizes=SIZES, skip=st.booleans(), which=st.integers(0, 1))
def test_other_tokenizers_are_exact_on_valid_text(
    data: st.DataObject, sizes: list[int], skip: bool, which: int
):
    tokenizer, vocabulary = window_vocabularies()[which]
    pieces = st.integers(1, len(tokenizer) - 1).map(lambda i: [i])
    if which == 0:
        words = st.sampled_from([1, 2, *range(259, len(tokenizer))]).map(lambda i: [i])
        characters = st.text(max_size=2).map(lambda text: [3 + b for b in text.encode()])
        pieces = words | characters
    ids = list(itertools.chain(*data.draw(st.lists(pieces, max_size=12))))
    for stop in ((), ["zzz"]):
        detokenizer, _ = run(ids, sizes, vocabulary, skip_special_tokens=skip, stop=stop)
        assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stop_strings_work_with_other_tokenizers():
    tokenizer, vocabulary = window_vocabularies()[0]
    hidden = tokenizers.SPECIALS[1]
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁fox", "ing", "a", hidden, "b"])
    for sizes in ([], [1] * 6):
        detokenizer, _ = run(ids, sizes, vocabulary, stop=["xin"])
        assert (detokenizer.text, detokenizer.num_tokens) == ("the fo", 3)
        detokenizer, _ = run(ids, sizes, vocabulary, stop=[hidden])
        assert (detokenizer.text, detokenizer.num_tokens) == ("the foxinga", 5)


def test_hidden_tokens_leave_no_trace_in_other_tokenizers():
    tokenizer, vocabulary = window_vocabularies()[1]
    hidden, fox = tokenizer.convert_tokens_to_ids([tokenizers.SPECIALS[1], "fox"])
    detokenizer, _ = run([hidden, fox], [1, 1], vocabulary, stop=["ox"])
    assert (detokenizer.text, detokenizer.num_tokens) == ("f", 2)
    tokenizer, vocabulary = window_vocabularies()[0]
    the, fox = tokenizer.convert_tokens_to_ids(["▁the", "▁fox"])
    for nothing in (1, len(tokenizer)):  # a special id, and one that no token has
        ids = [the, *[nothing] * 10, fox]
        assert run(ids, [1] * 12, vocabulary)[0].text == tokenizer.decode(ids, True) == "the fox"


def test_an_unfinished_character_is_given_out_at_the_end():
    the = encode("the")
    assert run([*the, *byte_ids(b"\xf0\x9f")], [1] * 9)[1][-2:] == ["", "�"]
    tokenizer, vocabulary = window_vocabularies()[0]
    ids = [*tokenizer.convert_tokens_to_ids(["▁the"]), 3 + 0xF0, 3 + 0x9F]
    assert run(ids, [1, 1, 1], vocabulary)[1] == ["the", "", "", "", "��"]


def test_a_push_costs_what_is_new(monkeypatch: pytest.MonkeyPatch):
    num_decoded = []
    for build in (tokenizers.byte_level, tokenizers.byte_fallback):
        tokenizer = build()
        decode = tokenizer.decode
        vocabulary, total = Vocabulary(tokenizer), [0]

        def counted(ids: list[int], decode=decode, total=total, **kwargs: Any) -> str:
            total[0] += len(ids)
            return decode(ids, **kwargs)

        monkeypatch.setattr(tokenizer, "decode", counted)
        run(
            [259] * 1000 if build is tokenizers.byte_fallback else [50] * 1000,
            [1] * 1000,
            vocabulary,
        )
        num_decoded.append(total[0])
    assert num_decoded[0] == 0
    assert num_decoded[1] < 4 * 1000
