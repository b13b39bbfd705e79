"""The table of tasks: what differs between them; everything else loops over it.

A further task is a row here, its module in tasks/ (the head, checks of a checkpoint, settings of its answers) and,
where the graph's tensors are not yet an answer, a module in serving/models/answers/.
"""

from dataclasses import dataclass

from core.tables import EMBEDDING, INT8_TARGET, LABEL, LOGITS, SCORE


@dataclass(frozen=True)
class Task:
    """One task. Dims are those of a row: the batch comes before them; -1 is dynamic."""

    auto_model: str  # class of transformers that loads the checkpoint
    module: str  # that makes the graph's module of it: load(args) -> (module, tokenizer, card)
    output: str  # the graph's output that precisions are compared on
    per_token: bool  # whether it has a row per token: deviations are then means over texts, of real tokens
    fixed_length: bool  # whether texts are padded to one length, else to the longest of a batch
    token_types: bool  # whether the graph takes TOKEN_TYPE_IDS where the model has them
    answers: str | None  # module in serving/models/answers/ that makes an answer of the output
    results: dict  # name -> (Triton's type, dims) of what that module answers
    every_model: bool  # whether a request gets the answer of every model, else that of the chosen precision
    target: dict  # what the search for INT8 keeps
    gate: dict | None  # what --check allows, where it is not that of the precision


TASKS = {
    "embedding": Task(
        "AutoModel", "tasks.embedding", EMBEDDING, True, True, False, None, {}, True, INT8_TARGET, None
    ),
    # the direction of two logits says little, so their cosine may be low: the relative error decides
    "classification": Task(
        "AutoModelForSequenceClassification", "tasks.classification", LOGITS, False, False, True, "classification",
        {LABEL: ("STRING", [-1]), SCORE: ("FP32", [-1])}, False,
        {"relative_l2_error": 0.05, "mean_cosine": 0.9}, {"relative_l2_error": 0.06, "mean_cosine": 0.9},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """A task that answers token by token, through a service that runs its graphs in a loop; FP32 and FP16 only."""

    auto_model: str  # class of transformers that loads the checkpoint
    mapping: str  # of transformers, from model types to the classes that have the head
    inputs: tuple  # of the service; where there are several, a request has one of them
    graphs: tuple  # folders of a repository


GENERATION = {
    "text2text-generation": Generation(
        "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", ("TEXT",), ("encoder", "decoder")
    ),
    "text-generation": Generation(
        "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ("TEXT", "MESSAGES"), ("decoder",)
    ),
}
