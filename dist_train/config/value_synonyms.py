"""What people type as the value of a setting: the words of other tools, and the one there is here.

Lightning, Hugging Face's Trainer, timm, Keras and torch's own classes.
"""

import difflib
from collections.abc import Iterable
from typing import Any

# {our key: {lower case: our value; a remark after a blank is told with it}}.
VALUES: dict[str, dict[str, str]] = {
    "precision": {
        "16": "fp16",
        "16-mixed": "fp16",
        "16-true": "fp16",
        "float16": "fp16",
        "half": "fp16",
        "mixed_float16": "fp16",
        "bf16-mixed": "bf16",
        "bf16-true": "bf16",
        "bfloat16": "bf16",
        "mixed_bfloat16": "bf16",
        "32": "fp32",
        "32-true": "fp32",
        "float": "fp32",
        "float32": "fp32",
        "full": "fp32",
        "no": "fp32",
        "false": "fp32",
        "tf32": "fp32",
        "amp": "auto",
        "mixed": "auto",
        "true": "auto",
    },
    "optim.name": {
        "adam": "adamw which decays weights apart from the gradient; optim.weight_decay=0 is Adam",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "momentum": "sgd with optim.momentum",
        "nesterov": "sgd with optim.nesterov=true",
    },
    "optim.schedule": {
        "cos": "cosine",
        "cosine_annealing": "cosine",
        "cosineannealinglr": "cosine",
        "cosine_with_warmup": "cosine with optim.warmup_epochs",
        "onecycle": "one_cycle",
        "onecyclelr": "one_cycle",
        "linearlr": "linear",
        "linear_with_warmup": "linear with optim.warmup_epochs",
        "constant_with_warmup": "constant with optim.warmup_epochs",
        "constantlr": "constant",
        "none": "constant",
    },
    "device": {"gpu": "cuda", "cuda:0": "cuda", "nvidia": "cuda"},
    "data.augment": {"true": "standard", "false": "none", "off": "none", "default": "standard"},
    "data.loader": {"ram": "memory", "dataloader": "workers"},
    "model.memory_format": {
        "nhwc": "channels_last",
        "nchw": "contiguous",
        "contiguous_format": "contiguous",
    },
    "parallel.sync": {"distributeddataparallel": "ddp", "bucketed": "ddp"},
    "train.micro_batch_size": {"max": "auto"},
    "tracking.wandb.mode": {
        "true": "auto",
        "on": "auto",
        "false": "disabled",
        "off": "disabled",
    },
}

# {our key: {what earlier versions called a value: what it is called now}}: read as that.
FORMER_VALUES: dict[str, dict[str, str]] = {"parallel.sync": {"overlap": "ddp"}}


def value_for(key: str, typed: Any, choices: Iterable[Any]) -> str:
    """Return `; did you mean key=value?` for what is no choice of `key`, or nothing."""
    word, choices = str(typed).lower(), [str(choice) for choice in choices]
    meant, _, remark = VALUES.get(key, {}).get(word, "").partition(" ")
    if not meant:
        meant = next(iter(difflib.get_close_matches(word, choices, 1)), "")
    told = f"; did you mean {key}={meant}?" if meant else ""
    return told + (f" ({remark})" if remark else "")
