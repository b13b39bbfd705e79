"""A checkpoint as a function of texts, for the servers that batch by themselves and leave the model to their user."""


def open_classifier(model, threads):
    """A function texts -> [{"label", "score"}]."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    words = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()

    @torch.inference_mode()
    def classify(texts):
        tokens = words(list(texts), padding=True, truncation=True, return_tensors="pt")
        scores, indices = network(**tokens).logits.softmax(dim=1).max(dim=1)
        pairs = zip(scores.tolist(), indices.tolist(), strict=True)
        return [{"label": network.config.id2label[i], "score": score} for score, i in pairs]

    return classify
