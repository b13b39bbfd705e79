"""Train a model: an encoder with a new head, steps, the epochs of a classifier, accuracy, checkpoint."""

import sys

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from core.checkpoint import check_checkpoint, find_checkpoint, load_config, load_tokenizer, weights_sha256
from core.files import replace_folder_when_done, write_json

BUCKET_BATCHES = 20  # texts are sorted by length within so many batches: little padding, still shuffled
WARMUP_SHARE = 0.1  # of the steps
WEIGHT_DECAY = 0.01


def load_model(args, names):
    """(encoder with a new head for the classes, tokenizer, card)."""
    return load_encoder(
        args,
        AutoModelForSequenceClassification,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="single_label_classification",
    )


def load_encoder(args, auto_model, **head):
    """(encoder with a new head, tokenizer, card); the embeddings stay as they are. head: settings of its config."""
    folder, card = find_checkpoint(args)
    check_checkpoint(folder, tokenizer=folder)
    load_config(folder)
    tokenizer = load_tokenizer(folder, args.max_length)
    transformers_logging.set_verbosity_error()  # it reports the new head as missing
    torch.manual_seed(args.seed)
    model = auto_model.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **head
    )
    # half of MiniLM's parameters: most words of a small file are seen too seldom to move theirs well
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad = False
    return model, tokenizer, card


def make_batches(texts, batch_size, generator):
    """Shuffled batches of indices, texts of like length together."""
    order = generator.permutation(len(texts))
    step = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), step):
        bucket = sorted(order[start : start + step], key=lambda i: len(texts[i]))
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    generator.shuffle(batches)
    return batches


def tokenize(tokenizer, texts, args):
    """A batch of texts as the model takes it, cut at --max-length."""
    return tokenizer(texts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")


def make_optimizer(model, learning_rate, steps):
    """(AdamW over what is trained, its schedule: a linear rise, then a linear fall to zero)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    warmup = max(1, int(steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    return optimizer, schedule


def take_step(model, tensors, optimizer, schedule):
    """One step down the gradient of one batch, targets included; returns its loss."""
    loss = model(**tensors).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return loss.item()


def train_epoch(model, tokenizer, optimizer, schedule, data, args, generator, name):
    """One pass over the texts; returns the mean loss."""
    texts, classes = data
    model.train()
    losses = []
    batches = make_batches(texts, args.batch_size, generator)
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1, file=sys.stderr):
        tokens = tokenize(tokenizer, [texts[i] for i in batch], args)
        labels = torch.tensor([classes[i] for i in batch])
        losses.append(take_step(model, {**tokens, "labels": labels}, optimizer, schedule))
    return float(np.mean(losses))


@torch.inference_mode()
def measure_accuracy(model, tokenizer, data, args):
    """Share of texts whose largest logit is that of their class."""
    texts, classes = data
    model.eval()
    right = 0
    for start in range(0, len(texts), args.batch_size):
        tokens = tokenize(tokenizer, texts[start : start + args.batch_size], args)
        expected = torch.tensor(classes[start : start + args.batch_size])
        right += int((model(**tokens).logits.argmax(dim=1) == expected).sum())
    return right / len(texts)


def train(model, tokenizer, data, evaluation, args):
    """All epochs; the model ends with the weights of the best one. Returns a record per epoch."""
    steps = args.epochs * -(-len(data[0]) // args.batch_size)
    optimizer, schedule = make_optimizer(model, args.learning_rate, steps)
    generator = np.random.default_rng(args.seed)
    epochs, best = [], None
    for epoch in range(1, args.epochs + 1):
        loss = train_epoch(model, tokenizer, optimizer, schedule, data, args, generator, f"epoch {epoch}/{args.epochs}")
        accuracy = measure_accuracy(model, tokenizer, evaluation, args)
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.4f} on {len(evaluation[0])} texts", flush=True)
        if best is None or accuracy > max(e["accuracy"] for e in epochs):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        epochs.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
    model.load_state_dict(best)
    return epochs


def save_checkpoint(folder, model, tokenizer, record):
    """Put the checkpoint with its training.json in the place of the old one; returns the record as it is there.

    weights_sha256 ties the record to what is exported and studied: a folder can be renamed.
    """
    # else the cut and the padding of the last batch are saved with it
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    with replace_folder_when_done(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        record = record | {"weights_sha256": weights_sha256(temporary)}
        write_json(temporary / "training.json", record)
    return record
