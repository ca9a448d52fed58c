"""The weighted loss in a training loop of one's own.

python examples/plain_pytorch.py --model FOLDER_OR_NAME   # any causal model of transformers
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddpo import FusedLinearDDPOLoss

PAIRS = [  # prompt, chosen, rejected, weight
    ("Write of a sea. ", "The tide kept a diary of the moon.", "The sea was big.", 1.4),
    ("Write of a door. ", "It opened only for those who had no key.", "It was a door.", 0.6),
]


def main() -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    name = parser.parse_args().model
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
    texts = [(pair[0], pair[side]) for side in (1, 2) for pair in PAIRS]  # chosen over rejected
    ids = [tokenizer(prompt + response)["input_ids"] for prompt, response in texts]
    width, lengths = max(map(len, ids)), [len(tokenizer(prompt)["input_ids"]) for prompt, _ in texts]
    input_ids, labels = torch.zeros(len(ids), width, dtype=torch.long), torch.full((len(ids), width), -100)
    for i, (row, start) in enumerate(zip(ids, lengths, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])

    model.get_output_embeddings().requires_grad_(False)  # a frozen head: two GEMMs instead of four
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    loss_of, weight, reference, told = FusedLinearDDPOLoss(beta=0.1), torch.tensor([p[3] for p in PAIRS]), None, []
    for _ in range(3):
        hidden = model.base_model(input_ids).last_hidden_state[:, :-1]
        if reference is None:  # the starting model's, once
            _, (chosen, rejected, *_) = FusedLinearDDPOLoss(use_ref_model=False)(
                model.get_output_embeddings(), hidden, labels[:, 1:]
            )
            reference = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss, _ = loss_of(model.get_output_embeddings(), hidden, labels[:, 1:], weight=weight, **reference)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
        print(f"loss {told[-1]:.4f}")
    return told


if __name__ == "__main__":
    main()
