"""Sampling: right tokens by right probabilities, the same draws in any batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import STORIES, tiny_model, tiny_tokenizer, write_groups

from ddpo.config import GenerateConfig
from ddpo.data.groups import read_jsonl
from ddpo.data.tokens import ChatTokens
from ddpo.files import read_json
from ddpo.generate import Draw, each_batch, generate
from ddpo.ledger import Ledger
from ddpo.loading import load_model
from ddpo.train import train

PROMPTS = [prompt for prompt, _ in STORIES] + ["A much longer prompt, so that the others are padded beside it."]


def sample(*given):
    return {job: response for batch in each_batch(*given, {}) for job, response in batch.items()}


def sampling(**changes):
    return GenerateConfig(**{"prompts": "", "out": "", "num_samples": 3, "max_new_tokens": 12, **changes})


@pytest.mark.parametrize("changes", [{}, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, {"temperature": 0.5}])
def test_batch_size_does_not_change_the_text(changes):
    model, tokens = tiny_model().eval(), ChatTokens(tiny_tokenizer())
    one, many = (sample(model, tokens, PROMPTS, sampling(batch_size=b, **changes)) for b in (1, 64))
    assert one == many and one.keys() == {(i, k) for i in range(5) for k in range(3)}
    assert len({r["text"] for r in one.values()}) > 10 and all(r["text"] for r in one.values())
    assert sample(model, tokens, PROMPTS, sampling(seed=1, **changes)) != one


def draws(scores, n=4000, **changes):
    draw = Draw([(i, 0) for i in range(n)], sampling(**changes), [3], tiny_tokenizer())
    draw._blank = [False] * n
    picked = draw(torch.zeros(n, 1), torch.tensor(scores).expand(n, -1).clone())
    assert (picked.isfinite().sum(1) == 1).all()
    return torch.bincount(picked.argmax(1), minlength=len(scores)) / n


def test_probabilities_of_draws():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(p).tolist()
    torch.testing.assert_close(draws(logits, top_k=0, top_p=1.0).numpy(), p.astype(np.float32), atol=0.03, rtol=0)
    torch.testing.assert_close(
        draws(logits, top_k=2, top_p=1.0).numpy(), np.float32([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    torch.testing.assert_close(
        draws(logits, top_k=0, top_p=0.81).numpy(), np.float32([10 / 19, 6 / 19, 3 / 19, 0]), atol=0.03, rtol=0
    )
    cold = p**2 / (p**2).sum()
    torch.testing.assert_close(
        draws(logits, top_k=0, top_p=1.0, temperature=0.5).numpy(), cold.astype(np.float32), atol=0.03, rtol=0
    )
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        draws(logits, temperature=0)


def test_file_of_samples(model_folder, tmp_path):
    """In the groups contract; not written over."""
    prompts = write_groups(tmp_path / "prompts.jsonl")
    cfg = sampling(prompts=str(prompts), out=str(tmp_path / "out.jsonl"), model=model_folder)
    generate(cfg)
    rows = [row for _, row in read_jsonl(cfg.out)]
    assert [r["prompt"] for r in rows] == PROMPTS[:4] and {len(r["responses"]) for r in rows} == {3}
    with pytest.raises(FileExistsError, match="--overwrite"):
        generate(cfg)


def test_a_row_does_not_stop_while_it_is_blank():
    """Where the end of turn and a line break hold nearly all probability, there is a letter all the same."""
    tokenizer = tiny_tokenizer()
    (newline,), (letter,) = (tokenizer(text)["input_ids"] for text in ("\n", "a"))
    scores = torch.full((2, 258), -50.0)
    scores[:, 257], scores[:, newline], scores[:, letter] = 9.0, 8.0, 0.0
    draw = Draw([(0, 0), (0, 1)], sampling(top_p=1.0, temperature=3.0), [257], tokenizer)
    drawn = [draw(None, scores.clone()).argmax(1).tolist() for _ in range(60)]
    for row in zip(*drawn, strict=True):
        assert 257 in row and letter in row and row.index(letter) < row.index(257)
        assert set(row[: row.index(letter)]) <= {newline}


def files_config(tmp_path, model_folder, **changes):
    prompts = write_groups(tmp_path / "prompts.jsonl")
    usual = {"prompts": str(prompts), "out": str(tmp_path / "out.jsonl"), "model": model_folder, "dtype": "float64"}
    return sampling(**{**usual, **changes})


def test_goes_on_after_a_kill(model_folder, tmp_path, monkeypatch, capsys):
    """Of 12 samples the first batches' are taken up, the text is that of a run that was not stopped; a finished file
    is kept, and one made from something else is not taken for it."""
    straight = files_config(tmp_path, model_folder, out=str(tmp_path / "straight.jsonl"))
    generate(straight)
    stopped = files_config(tmp_path, model_folder, batch_size=5)
    batches, add = [], Ledger.add

    def killed_in_the_third(self, results):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(results))
        add(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", killed_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            generate(stopped)
    assert batches == [5, 5] and not (tmp_path / "out.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", lambda self, results: (batches.append(len(results)), add(self, results)))
        generate(replace(stopped, batch_size=64))
    assert batches == [5, 5, 2]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out.card.json", "out.jsonl"]  # nothing left over

    made_from = read_json(tmp_path / "out.card.json")["made_from"]
    assert made_from["num_samples"] == 3 and made_from["weights"]["adapter"] is None
    generate(replace(stopped, resume=True))
    assert batches == [5, 5, 2] and "is there, made from the same" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"made from something else \(\['seed'\]\)"):
        generate(replace(stopped, resume=True, seed=1))


def test_temperatures(model_folder, tmp_path):
    """A file for each; each is what a run of that temperature alone writes."""
    out = generate(files_config(tmp_path, model_folder, temperatures=(0.5, 2.0), max_new_tokens=6))
    assert [p.name for p in out] == ["out-t0.5.jsonl", "out-t2.jsonl"]
    generate(files_config(tmp_path, model_folder, temperature=2.0, max_new_tokens=6, out=str(tmp_path / "hot.jsonl")))
    assert (tmp_path / "hot.jsonl").read_bytes() == out[1].read_bytes() != out[0].read_bytes()
    with pytest.raises(ValueError, match="temperatures must be greater than 0, got -1"):
        sampling(temperatures=(1.0, -1.0))


def test_adapter_beside_weights_of_a_half_type(model_folder, config, tmp_path):
    """In bfloat16 an adapter too small to move a weight is not rounded away: it stays beside the weights."""
    from safetensors.torch import load_file, save_file

    run = train(config(max_steps=1))
    path = run / "adapter" / "adapter_model.safetensors"
    small = {k: torch.full_like(v, 1e-2 if "lora_A" in k else 1e-3) for k, v in load_file(path).items()}
    save_file(small, path, metadata={"format": "pt"})
    ids = torch.arange(3, 40)[None]
    plain, half, whole = (
        load_model(model_folder, adapter, dtype, torch.device("cpu"))
        for adapter, dtype in ((None, "float32"), (str(run / "adapter"), "bfloat16"), (str(run / "adapter"), "float32"))
    )
    names = [name for name, _ in half.named_modules() if "lora_" in name]
    assert names and not [name for name, _ in whole.named_modules() if "lora_" in name]
    assert not torch.equal(plain(ids).logits, whole(ids).logits)
    prompts = write_groups(tmp_path / "prompts.jsonl")
    options = {"prompts": str(prompts), "model": model_folder, "adapter": str(run / "adapter"), "dtype": "bfloat16"}
    (out,) = generate(GenerateConfig(out=str(tmp_path / "o.jsonl"), num_samples=1, max_new_tokens=4, **options))
    assert len(list(read_jsonl(out))) == 4
