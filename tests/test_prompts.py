"""What a request for generated text may say, without a server."""

import jinja2
import pytest
import tokenizers

from core import prompts


def test_numbers_may_come_as_text_and_defaults_are_greedy():
    found = prompts.read_parameters({"max_new_tokens": "7", "seed": str(2**62 + 1), "temperature": "0.5"}, 100)
    assert found == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 1.0, "seed": 2**62 + 1, "stream": False}
    assert prompts.read_parameters({}, 10)["max_new_tokens"] == 10
    assert prompts.read_parameters({"stream": "true"}, 1000)["max_new_tokens"] == prompts.DEFAULT_NEW_TOKENS


@pytest.mark.parametrize("value", [None, True, [1], "nan", float("inf"), {}, "1e400"])
def test_what_is_no_number_is_refused(value):
    for name in ("max_new_tokens", "temperature", "top_p", "seed"):
        if value is None and name == "seed":
            continue  # its default
        with pytest.raises(ValueError, match=f"{name}: expected"):
            prompts.read_parameters({name: value}, 100)


def test_pieces_hold_whole_characters_and_make_up_the_text():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = "naïve 🙂 café 漢字"
    ids, pieces, sent = tokenizer.encode(text).ids, [], 0
    for count in range(1, len(ids) + 1):
        piece, sent = prompts.next_piece(tokenizer.decode, ids[:count], sent, count == len(ids))
        pieces.append(piece)
    assert "".join(pieces) == text and not any(prompts.UNFINISHED in piece for piece in pieces)
    cut = tokenizer.encode("a🙂").ids[:3]  # the last token is in the middle of a character
    assert prompts.next_piece(tokenizer.decode, cut, 1, True)[0].startswith(prompts.UNFINISHED)


def test_a_template_refuses_roles_and_cannot_leave_its_sandbox():
    strict = prompts.compile_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(ValueError, match="no system"):
        prompts.render_chat(strict, [{"role": "system", "content": ""}], {})
    escape = prompts.compile_template("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        prompts.render_chat(escape, [{"role": "user", "content": ""}], {})


def test_a_template_is_rendered_as_transformers_does_it():
    source = (
        "{% for m in messages %}\n  {% if loop.first %}{{ bos_token }}{% endif %}\n<|{{ m.role }}|>{{ m | tojson }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{{ tools is none }}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": "größer <b>"}, {"role": "assistant", "content": "ja"}]
    expected, _ = render_jinja_template([chat], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert prompts.render_chat(prompts.compile_template(source), chat, {"bos_token": "<s>"}) == expected[0]
    with pytest.raises(jinja2.TemplateSyntaxError):
        prompts.compile_template("{% if %}")
