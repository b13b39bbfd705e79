"""What transformers answers to each text, and how an answer is held against it."""

SCORE_TOLERANCE = 1e-3  # sums in another order differ by a thousandth of that; a coarser precision by more
BATCH = 32


def expected_answers(model, texts, max_length):
    """[(label, softmax score)] of a classifier's folder for the texts, cut to `max_length` tokens, from torch in FP32."""
    import torch  # here: it takes seconds to import
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval().float()
    if network.config.problem_type == "multi_label_classification":
        raise SystemExit(
            f"{model}: expected a classifier with one label a text, found {network.config.problem_type}; choose another"
        )
    answers = []
    with torch.inference_mode():
        for i in range(0, len(texts), BATCH):
            tokens = words(
                texts[i : i + BATCH], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            scores, indices = network(**tokens).logits.softmax(dim=1).max(dim=1)
            answers += [(network.config.id2label[int(k)], float(s)) for s, k in zip(scores, indices, strict=True)]
    return answers


def judge(found, expected):
    """How an answer compares: "right", "failed", "wrong_label" or "wrong_score"."""
    if found is None:
        return "failed"
    if found[0] != expected[0]:
        return "wrong_label"
    return "right" if abs(found[1] - expected[1]) <= SCORE_TOLERANCE else "wrong_score"
