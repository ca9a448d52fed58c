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
        responses = []
        for whole, ids in zip(wholes, self._ids(wholes), strict=True):
            if ids[: len(prompt_ids)] == prompt_ids:
                rest = ids[len(prompt_ids) :]
            else:  # a leading line break merged with the prompt's last: generation goes on from the prompt's own tokens
                rest = self._ids([whole[len(prompt_text) :]])[0]
            responses.append(self._through_end_of_turn(rest))
        return prompt_ids, responses

    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the tokenizer's own and the one that the chat template ends a turn with."""
        _, (response,) = self.group_ids("a prompt", ["a response"], "chat template")
        return sorted({self.tokenizer.eos_token_id, response[-1]})

    def _through_end_of_turn(self, ids):
        end = next((i for i, token in enumerate(ids) if token in self._special_ids), None)
        # a template may mark no end of turn: generation must learn to stop all the same
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def _render(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


def _messages(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
