"""DDPO in TRL: weigh a preference data set, swap the trainer.

python examples/trl_ddpo.py --model FOLDER_OR_NAME
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig

from ddpo import weigh_dataset
from ddpo.integrations.trl import DDPOTrainer  # was: from trl import DPOTrainer

ROWS = [
    {"prompt": "Write of a sea. ", "chosen": "The tide kept a diary of the moon.", "rejected": "The sea was big."},
    {"prompt": "Write of a sea. ", "chosen": "Salt remembers every ship.", "rejected": "Waves. More waves."},
    {"prompt": "Write of a door. ", "chosen": "It opened only for those without a key.", "rejected": "A door."},
    {"prompt": "Write of a door. ", "chosen": "Oak, shut, and humming.", "rejected": "It was brown."},
]


def main() -> DDPOTrainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="runs/trl-ddpo")
    args = parser.parse_args()

    data = weigh_dataset(Dataset.from_list(ROWS), measures=("style",))  # adds the column `weight`
    gpu = torch.cuda.is_available()
    short = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": []}
    config = DPOConfig(args.out, beta=0.1, bf16=gpu, use_cpu=not gpu, **short)
    trainer = DDPOTrainer(
        model=args.model,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
