"""The table of tasks: what differs between them; everything else loops over it.

A further task is a row here and, where the graph's tensor is not yet an answer, a module in serving/models/answers/.
"""

from dataclasses import dataclass, field

from core.tables import (
    ANSWER,
    CONTEXT,
    EMBEDDING,
    END,
    ENTITIES,
    INPUT_IDS,
    INT8_TARGET,
    LABEL,
    LOGITS,
    QUESTION,
    REFERENCE,
    SCORE,
    SERVED,
    SPANS,
    START,
    TEXT,
    TOKEN,
    WORDS,
)


@dataclass(frozen=True)
class Task:
    """One task. Dims are those of a row: the batch comes before them; -1 is dynamic, a name is an entry of the config."""

    auto_model: str  # class of transformers that loads the checkpoint
    module: str  # that makes the graph's module of it: load(args) -> (module, tokenizer, card)
    output: str  # the graph's output that precisions are compared on
    dims: tuple  # of that output
    takes: tuple = (TEXT,)  # what a request has, strings all
    graph: str = "logits"  # function of tasks/graphs.py: what of the model's output becomes that of the graph
    labelled: bool = False  # whether the checkpoint has to name its classes
    also: tuple = ()  # what the answer needs of the tokens beside the graph's output
    answers: str | None = None  # module in serving/models/answers/ that makes an answer of the output
    results: dict = field(default_factory=dict)  # name -> (Triton's type, dims) of what that module answers
    hands_on: bool = True  # whether a request gets the graph's output too
    windows: bool = False  # whether a long text is read in several windows, by one model instead of an ensemble
    target: dict = field(default_factory=lambda: LOGITS_TARGET)  # what the search for INT8 keeps
    gate: dict | None = field(default_factory=lambda: LOGITS_GATE)  # what --check allows; None: that of the precision

    @property
    def per_token(self):
        """Whether the output has a row per token: deviations are then means over texts, of real tokens."""
        return self.dims[0] == -1

    @property
    def suffix(self):
        """How the architectures end that have the task's head; "" where no head is needed."""
        return self.auto_model.removeprefix("AutoModel")


# the direction of two logits says little, so their cosine may be low: the relative error decides
LOGITS_TARGET = {"relative_l2_error": 0.05, "mean_cosine": 0.9}
LOGITS_GATE = {"relative_l2_error": 0.06, "mean_cosine": 0.9}

TASKS = {
    "embedding": Task(
        "AutoModel", "tasks.embedding", EMBEDDING, (-1, "num_outputs"), target=INT8_TARGET, gate=None,
    ),
    "sentence-embedding": Task(
        "AutoModel", "tasks.heads", EMBEDDING, ("hidden_size",), graph="pooled", target=INT8_TARGET, gate=None,
    ),
    "classification": Task(
        "AutoModelForSequenceClassification", "tasks.heads", LOGITS, ("num_labels",), labelled=True,
        answers="classification", results={LABEL: ("STRING", [-1]), SCORE: ("FP32", [-1])},
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification", "tasks.heads", LOGITS, (-1, "num_labels"), labelled=True,
        also=(SPANS, WORDS, TEXT), answers="token_classification", results={ENTITIES: ("STRING", [1])}, hands_on=False,
    ),
    "question-answering": Task(
        "AutoModelForQuestionAnswering", "tasks.heads", LOGITS, (-1, 2), takes=(QUESTION, CONTEXT), graph="span_logits",
        answers="question_answering", windows=True, hands_on=False,
        results={
            ANSWER: ("STRING", [-1]), SCORE: ("FP32", [-1]), START: ("INT64", [-1]), END: ("INT64", [-1]),
            "START_LOGITS": ("FP32", [-1, -1]), "END_LOGITS": ("FP32", [-1, -1]),
        },
    ),
    "fill-mask": Task(
        "AutoModelForMaskedLM", "tasks.heads", LOGITS, ("vocab_size",), graph="masked_logits", also=(INPUT_IDS,),
        answers="fill_mask", results={TOKEN: ("STRING", [-1]), SCORE: ("FP32", [-1])}, hands_on=False,
    ),
}  # fmt: skip
ALIASES = {"text-classification": "classification", "ner": "token-classification"}  # transformers' other names
OWN = "embedding"  # the task of model_repository/: a request gets the answers of all its models


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

GENERATION_PRECISIONS = (REFERENCE, "FP16")


def served_precisions(task):
    """What a service of a task may be served in."""
    return GENERATION_PRECISIONS if task in GENERATION else (REFERENCE, *SERVED)


FITTING_TASKS = {  # end of an architecture's name -> the task that its head fits
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "text2text-generation",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


def fitting_task(architectures):
    """The task that a checkpoint's head is for, or None."""
    return next((task for name in architectures for end, task in FITTING_TASKS.items() if name.endswith(end)), None)
