"""DDPO in transformers' own Trainer, by a loss function: the model gives hidden states, the loss takes the head.

python examples/transformers_trainer.py --model FOLDER_OR_NAME
"""

import argparse

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ddpo import FusedLinearDDPOLoss

PAIRS = [  # prompt, chosen, rejected, weight; reference log-probs come from the starting model
    ("Write of a sea. ", "The tide kept a diary of the moon.", "The sea was big.", 1.4),
    ("Write of a door. ", "It opened only for those who had no key.", "It was a door.", 0.6),
] * 2


class Body(nn.Module):
    """Gives the last hidden states, so that no logits are made."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, input_ids):
        return {"hidden": self.causal.base_model(input_ids).last_hidden_state}


def main() -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="runs/transformers-ddpo")
    args = parser.parse_args()
    tokenizer, causal = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    head = causal.float().get_output_embeddings().requires_grad_(False)

    def collate(pairs: list[tuple]) -> dict:
        texts = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]  # chosen over rejected
        ids = [tokenizer(prompt + response)["input_ids"] for prompt, response in texts]
        width = max(map(len, ids))
        labels = torch.full((len(ids), width), -100)
        for i, (prompt, _) in enumerate(texts):
            start = len(tokenizer(prompt)["input_ids"])
            labels[i, start : len(ids[i])] = torch.tensor(ids[i][start:])
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        with torch.no_grad():  # before the first step this is the reference; cache it for a real run
            hidden = reference.base_model(input_ids).last_hidden_state[:, :-1]
            its_head = reference.get_output_embeddings()  # on the CPU, as the rows are here
            _, found = FusedLinearDDPOLoss(use_ref_model=False)(its_head, hidden, labels[:, 1:])
        ref = {"ref_chosen_logps": found[0], "ref_rejected_logps": found[1]}
        given = {"targets": labels[:, 1:], "weight": torch.tensor([pair[3] for pair in pairs]), **ref}
        return {"input_ids": input_ids, "labels": given}

    def loss_of(outputs, labels, num_items_in_batch=None):
        labels = dict(labels)
        loss, _ = FusedLinearDDPOLoss(beta=0.1)(head, outputs["hidden"][:, :-1], labels.pop("targets"), **labels)
        return loss

    reference = AutoModelForCausalLM.from_pretrained(args.model).float().eval()
    short = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": []}
    short |= {"save_strategy": "no", "remove_unused_columns": False, "label_names": ["labels"]}
    trainer = Trainer(
        model=Body(causal),
        args=TrainingArguments(args.out, **short, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False),
        train_dataset=PAIRS,
        data_collator=collate,
        compute_loss_func=loss_of,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
