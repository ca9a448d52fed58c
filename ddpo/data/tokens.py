"""From prompt and response to token ids, by the tokenizer's chat template.

A response's tokens are what the template adds after the generation prompt, through the end-of-turn token.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from ddpo.data.groups import Prompt


class ChatTokens:
    """Renders and tokenises prompts and responses with one tokenizer."""

    def __init__(self, tokenizer, chat_template: str | None = None):
        """chat_template: Jinja text to use instead of the tokenizer's own. Raises ValueError where there is neither."""
        if chat_template:
            tokenizer.chat_template = chat_template
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; give one with --chat-template FILE, "
                "a Jinja file, for example that of the instruction-tuned model of the same family"
            )
        self.tokenizer = tokenizer
        special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special_text = sorted(special)
        self._special_ids = set(special.values()) | set(tokenizer.all_special_ids)

    @classmethod
    def load(cls, model: str, template_file: str | None = None, chat_template: str | None = None) -> "ChatTokens":
        """The tokenizer of a model's folder or hub name, with the template of a file, or given as text, if any."""
        from ddpo.loading import load_tokenizer

        if template_file:
            chat_template = Path(template_file).read_text(encoding="utf-8")
        return cls(load_tokenizer(model), chat_template)

    def fingerprint(self) -> str:
        """Hash of what decides the ids: vocabulary and chat template."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())) + self.tokenizer.chat_template
        return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]

    def special_token_in(self, prompt: Prompt) -> str | None:
        """The first special token spelled out in a text (it would end or open a turn), or None."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return next((token for token in self._special_text if any(token in text for text in texts)), None)

    def prompt_text(self, prompt: Prompt) -> str:
        return self._render(_messages(prompt), add_generation_prompt=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self._ids([self.prompt_text(prompt)])[0]

    def group_ids(self, prompt: Prompt, texts: list[str], where: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Token ids (int32) of the prompt and of each response. Raises ValueError for a template that does not fit."""
        prompt_text = self.prompt_text(prompt)
        prompt_ids = self._ids([prompt_text])[0]
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise ValueError(f"{where}: the chat template doubles the BOS token {self.tokenizer.bos_token!r}")
        turns = [[*_messages(prompt), {"role": "assistant", "content": text}] for text in texts]
        wholes = [self._render(messages) for messages in turns]
        if not all(whole.startswith(prompt_text) for whole in wholes):
            raise ValueError(
                f"{where}: the prompt is not the start of prompt and response together; the chat template of "
                f"{self.tokenizer.name_or_path!r} renders the generation prompt differently: give another with "
                "--chat-template FILE"
            )
        encoded = self.tokenizer(wholes, add_special_tokens=False, return_offsets_mapping=True)
        responses = []
        for text, whole, ids, spans in zip(texts, wholes, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            start = len(prompt_text)
            end = whole.find(text.strip(), start) + len(text.strip())
            if end < start:
                raise ValueError(f"{where}: the chat template changes the response's text {text[:40]!r}")
            if ids[: len(prompt_ids)] == prompt_ids:
                ids, spans = ids[len(prompt_ids) :], spans[len(prompt_ids) :]
            else:  # a leading line break merged with the prompt's last: generation goes on from the prompt's own tokens
                rest = self.tokenizer(whole[start:], add_special_tokens=False, return_offsets_mapping=True)
                ids, spans = rest["input_ids"], [(a + start, b + start) for a, b in rest["offset_mapping"]]
            responses.append(self._through_end_of_turn(ids, spans, end))
        return np.array(prompt_ids, np.int32), responses

    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the tokenizer's own and the one that the chat template ends a turn with."""
        _, (response,) = self.group_ids("a prompt", ["a response"], "chat template")
        return sorted({self.tokenizer.eos_token_id, int(response[-1])})

    def _through_end_of_turn(self, ids, spans, end):
        """The ids up to the first special token behind the text, which ends at character `end`."""
        tokens = zip(ids, spans, strict=True)
        last = next((i for i, (token, (at, _)) in enumerate(tokens) if at >= end and token in self._special_ids), None)
        # a template may mark no end of turn: generation must learn to stop all the same
        kept = [*ids, self.tokenizer.eos_token_id] if last is None else ids[: last + 1]
        return np.array(kept, np.int32)

    def _render(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


def _messages(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
