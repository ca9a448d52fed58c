"""What every command's settings have in common."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float64"]


class Checked:
    """Numbers that only make sense above zero are checked wherever a config is made."""

    _POSITIVE = (
        "max_pairs max_length epochs batch_size micro_tokens lr beta alpha lora_r lora_alpha eval_every "
        "keep_checkpoints max_steps num_samples num_responses num_prompts rouge_pairs rows max_new_tokens temperature "
        "top_p repetition_penalty gpu_memory flops efficiency tokens_per_prompt tokens_per_response responses_per_group"
    ).split()

    def __post_init__(self):
        for name in self._POSITIVE:
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise ValueError(f"config: {name} must be greater than 0, got {value}")
        for value in getattr(self, "temperatures", ()):
            if not value > 0:
                raise ValueError(f"config: temperatures must be greater than 0, got {value}")
