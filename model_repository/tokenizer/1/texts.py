"""A request's strings -> texts -> tokens, within limits. A copy lies beside every model that tokenises.

A tokenizer reads all of a text before it cuts it to the model's length, and everybody waits meanwhile. So the bytes are
bounded first, and of a long text no more is read than its tokens need.
"""

LIMITS = {"max_text_bytes": 65_536, "max_request_bytes": 262_144}  # where a config does not say otherwise
ALONE_CHARACTERS = 4096  # of all texts together, up to which one thread encodes them
FIRST_CHARACTERS = 32  # for each token of the model's length: as much of a long text is read first


def read_limits(config):
    """(largest text, largest request), both in bytes, from the parameters of a model's config."""
    given = config.get("parameters", {})
    return tuple(int(given[name]["string_value"]) if name in given else value for name, value in LIMITS.items())


def read_texts(columns, limits):
    """A text for each row of a request, or a tuple where it has several strings; columns: {input: array of bytes}.

    Raises ValueError where a text or the request is too large, or a text is not UTF-8.
    """
    largest, all_together = limits
    rows = {name: list(values.reshape(-1)) for name, values in columns.items()}
    for name, values in rows.items():
        for row, value in enumerate(values):
            if len(value) > largest:
                raise ValueError(
                    f"{name}: expected at most {largest} bytes, found {len(value)} in row {row}; send a shorter text"
                )
    if (size := sum(map(len, sum(rows.values(), [])))) > all_together:
        raise ValueError(f"expected at most {all_together} bytes in a request, found {size}; send fewer texts at once")
    texts = [[decode(name, row, value) for row, value in enumerate(values)] for name, values in rows.items()]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def decode(name, row, value):
    """Bytes -> text."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, found {error} in row {row}; encode it as UTF-8") from None


def encode(tokenizer, texts):
    """Encodings of texts or pairs, cut as the tokenizer is set; the same as encode_batch makes, at the cost of the cut text."""
    length = (tokenizer.truncation or {}).get("max_length")
    if length is None or not any(isinstance(text, str) and len(text) > FIRST_CHARACTERS * length for text in texts):
        return encode_all(tokenizer, texts)
    first = [beginning(text, FIRST_CHARACTERS * length) for text in texts]
    encodings = encode_all(tokenizer, first)
    if all(e.overflowing or cut == text for e, cut, text in zip(encodings, first, texts, strict=True)):
        return encodings
    # too few tokens in a beginning: long runs without a space, or of spaces
    return encode_all(
        tokenizer, [cut if e.overflowing else text for e, cut, text in zip(encodings, first, texts, strict=True)]
    )


def encode_all(tokenizer, texts):
    """What encode_batch makes; of short texts, unless it pads them, without its threads: they cost more than they bring."""
    pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
    if tokenizer.padding or sum(len(part) for pair in pairs for part in pair) > ALONE_CHARACTERS:
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(*pair) for pair in pairs]


def beginning(text, size):
    """At most so many characters of a text, up to a space, behind which tokens do not depend on what follows."""
    if isinstance(text, tuple) or len(text) <= size:
        return text
    words = text[:size].rsplit(None, 1)
    return words[0] if len(words) == 2 else text
