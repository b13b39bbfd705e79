"""What a request for generated text says, checked: its parameters, its chat, its tokens, and the text as it grows.

Pure functions without Triton; a service's folder holds a copy of this file, so nothing of the project is imported.
Whatever is wrong with a request raises ValueError with the words that the client gets.
"""

import json
import math
import re

PARAMETERS = ("max_new_tokens", "temperature", "top_p", "seed", "stream")
DEFAULT_NEW_TOKENS = 64  # of a request that asks for none, where the service's limit is not below it
ROLES = ("system", "user", "assistant")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can write a surrogate alone, which is no character
UNFINISHED = "\ufffd"  # what a tokenizer makes of a character of which not all bytes have come


# --- parameters ----------------------------------------------------------------------


def read_parameters(given, limit):
    """{"max_new_tokens", "temperature", "top_p", "seed", "stream"} of a request's parameters; limit: of new tokens."""
    unknown = sorted(given.keys() - set(PARAMETERS))
    if unknown:
        raise ValueError(f"{unknown[0]}: expected one of the parameters {', '.join(PARAMETERS)}; found it unknown")
    found = {
        "max_new_tokens": read_number(given, "max_new_tokens", min(DEFAULT_NEW_TOKENS, limit), 1, limit, whole=True),
        "temperature": read_number(given, "temperature", 0.0, 0.0, math.inf),
        "top_p": read_number(given, "top_p", 1.0, 0.0, 1.0),
        "seed": read_number(given, "seed", None, 0, 2**63 - 1, whole=True),
        "stream": read_flag(given, "stream"),
    }
    if found["top_p"] == 0:
        raise ValueError("top_p: expected above 0 and at most 1, found 0")
    if found["top_p"] < 1 and found["temperature"] == 0:
        raise ValueError(
            f"top_p: expected a temperature above 0 with it, found top_p {found['top_p']:g} and none; "
            "the most likely token is taken then"
        )
    return found


def read_number(given, name, default, low, high, whole=False):
    """A parameter as a finite number from low to high, or the default where it is not given."""
    value = given.get(name, default)
    if value is default:
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (whole and number % 1):
        bounds = f"from {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}" if high < 2**53 else "from 0"
        raise ValueError(f"{name}: expected a {'whole ' if whole else ''}number {bounds}, found {value!r}")
    return int(value if isinstance(value, str) and value.isdecimal() else number) if whole else number


def read_flag(given, name):
    """A parameter that is true or false."""
    value = given.get(name, False)
    if value in (True, False):
        return bool(value)
    if value in ("true", "false"):
        return value == "true"
    raise ValueError(f"{name}: expected true or false, found {value!r}")


# --- prompts -------------------------------------------------------------------------


def read_messages(text):
    """JSON list of {"role", "content"} -> the same as objects."""
    form = 'send a JSON list such as [{"role": "user", "content": "Hello"}]'
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"MESSAGES: expected JSON, found: {error}; {form}") from None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"MESSAGES: expected a list with a message at least, found {str(messages)[:60]}; {form}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(
                f"MESSAGES: expected role and content in message {number}, found {str(message)[:60]}; {form}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"MESSAGES: expected a role of {', '.join(ROLES)} in message {number}, found {str(message['role'])[:60]!r}"
            )
        if not isinstance(message["content"], str) or HALF_A_PAIR.search(message["content"]):
            raise ValueError(
                f"MESSAGES: expected a text as content of message {number}, found {message['content']!r:.60}"
            )
    return messages


def compile_template(source):
    """A checkpoint's chat template, rendered in a sandbox as transformers does it."""
    import jinja2.sandbox  # here: only a chat needs the package

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    return environment.from_string(source)


def render_chat(template, messages, special_tokens):
    """The prompt of a chat, up to where the assistant's answer begins."""
    try:
        return template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"MESSAGES: expected a chat that the model's template takes, found: {error}") from None


def encode_prompt(tokenizer, text, name, limit, special=True):
    """Token ids of a prompt; name: of the input, limit: of its tokens."""
    ids = tokenizer.encode(text, add_special_tokens=special).ids
    if not 1 <= len(ids) <= limit:
        raise ValueError(f"{name}: expected 1 to {limit} tokens, the limit of this service; found {len(ids)}")
    return ids


# --- the text ------------------------------------------------------------------------


def next_piece(decode, tokens, sent, last):
    """(piece, length of all text so far): what the newest token adds; all pieces together are the whole text.

    decode: list of ids -> text. sent: the length after the piece before. last: whether no token follows, else the bytes
    of an unfinished character wait for the next one.
    """
    text = decode(tokens)
    if not last and text.endswith(UNFINISHED):
        return "", sent
    return text[sent:], max(sent, len(text))
