"""From prompt and response to token ids, by the tokenizer's chat template.

A response's tokens are what the template adds after the generation prompt, through the end-of-turn token.
"""

import hashlib
import json
from pathlib import Path

from ddpo.data.groups import Prompt


class ChatTokens:
    """Renders and tokenises prompts and responses with one tokenizer."""

    def __init__(self, tokenizer, chat_template: str | None = None):
        """chat_template: a file to use instead of the tokenizer's own. Raises ValueError where there is neither."""
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
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
    def load(cls, model: str, chat_template: str | None = None) -> "ChatTokens":
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(model), chat_template)

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

    def group_ids(self, prompt: Prompt, texts: list[str], where: str) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each response. Raises ValueError for a template that cannot be split."""
        prompt_ids = self.prompt_ids(prompt)
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise ValueError(f"{where}: the chat template doubles the BOS token {self.tokenizer.bos_token!r}")
        turns = [[*_messages(prompt), {"role": "assistant", "content": text}] for text in texts]
        whole = self._ids([self._render(messages) for messages in turns])
        return prompt_ids, [self._after(prompt_ids, ids, where) for ids in whole]

    def _after(self, prompt_ids, ids, where):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                f"{where}: the prompt's tokens are not the start of prompt and response together; the chat template "
                f"of {self.tokenizer.name_or_path!r} renders the generation prompt differently: give another with "
                "--chat-template FILE"
            )
        end = len(ids)
        while end > len(prompt_ids) and ids[end - 1] not in self._special_ids:
            end -= 1
        if end == len(prompt_ids):  # the template marks no end of turn: generation must learn to stop all the same
            return [*ids[len(prompt_ids) :], self.tokenizer.eos_token_id]
        return ids[len(prompt_ids) : end]

    def _render(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


def _messages(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
