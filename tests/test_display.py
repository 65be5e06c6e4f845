"""Outputs in a notebook: the text, its tokens coloured; and still plain dicts."""

import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import jaxengine
from jaxengine.display import Output, Shown

META: dict[str, Any] = {"completion_tokens": 3, "finish_reason": {"type": "stop"}, "seed": 5}
TRIPLES = [(0.0, 7, "a<b"), (-0.5, 8, "\n"), (-30.0, 9, '"&')]


class Spans(HTMLParser):
    """Texts, titles and opacities of the spans of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.opacities: list[float] = []
        self._is_span = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_span = tag == "span"
        if self._is_span:
            given = dict(attrs)
            self.titles.append(given["title"] or "")
            self.opacities.append(float((given["style"] or "").rstrip(")").rsplit(", ", 1)[1]))

    def handle_data(self, data: str) -> None:
        if self._is_span:
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._is_span = False


def make(**meta: Any) -> Output:
    return Output(text='a<b\n"&', output_ids=[7, 8, 9], meta_info={**META, **meta})


def page_of(shown: Any) -> str:
    return shown._repr_html_()


def test_an_output_is_a_dict_to_everyone_else():
    output = make()
    assert output == {"text": 'a<b\n"&', "output_ids": [7, 8, 9], "meta_info": META}
    assert json.loads(json.dumps(output)) == output
    assert repr(output) == repr(dict(output))


def test_tokens_are_coloured_by_how_unlikely_they_were():
    spans = Spans(page_of(make(output_token_logprobs=TRIPLES)))
    assert spans.texts == ["a<b", "↵\n", '"&']
    assert spans.titles[1] == r"'\n' (id 8): logprob -0.500"
    expected = [0, 0.6 * (1 - np.exp(-0.5)), 0.6]
    np.testing.assert_allclose(spans.opacities, expected, atol=0.006)


def test_tokens_are_coloured_by_what_was_captured():
    output = make(output_token_logprobs=TRIPLES)
    output["captures"] = {"entropy": np.array([0.0, 1.0, 4.0], np.float32)}
    for shown in (output, jaxengine.show(output), jaxengine.show([output], by="entropy")):
        np.testing.assert_allclose(Spans(page_of(shown)).opacities, [0, 0.15, 0.6], atol=0.006)
    assert Spans(page_of(jaxengine.show(output, by="logprob"))).opacities[2] == 0.6


def test_without_numbers_the_text_stands_alone():
    for output in (make(), make(output_token_logprobs=[(0.0, i, None) for i in (7, 8, 9)])):
        page = page_of(output)
        assert Spans(page).texts == []
        assert "a&lt;b\n&quot;&amp;" in page
        assert "3 tokens, stop, seed 5" in page


def test_what_is_not_there_cannot_be_shown():
    with pytest.raises(ValueError, match="pass return_logprob=True"):
        jaxengine.show(make(), by="logprob")
    with pytest.raises(ValueError, match="pass capture="):
        jaxengine.show(make(), by="entropy")


def test_shown_outputs_have_a_plain_form():
    shown = jaxengine.show([make(), make()])
    assert isinstance(shown, Shown)
    assert repr(shown) == 'a<b\n"&\n---\na<b\n"&'


def test_an_engine_gives_outputs_that_show_themselves(demo: Any):
    params = {"temperature": 0.9, "seed": 5, "max_new_tokens": 6}
    output = demo.generate("ROMEO:\n", params, return_logprob=True)
    assert type(output) is Output
    # The tokenizer gives the texts that the lists of logprobs were not asked for.
    spans = Spans(page_of(jaxengine.show(output, tokenizer=demo.tokenizer)))
    assert "".join(spans.texts).replace("↵", "") == demo.tokenizer.decode(output["output_ids"])
