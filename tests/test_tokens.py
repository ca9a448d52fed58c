"""Prompts and responses become token ids by the chat template, split at the generation prompt."""

import pytest
from conftest import CHATML, tiny_tokenizer

from ddpo.data.tokens import ChatTokens

START, END = "<|im_start|>", "<|im_end|>"
PLAIN = (  # no special token at all
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def split(tokens, prompt, texts):
    """group_ids as lists."""
    prompt_ids, responses = tokens.group_ids(prompt, texts, "w")
    assert {ids.dtype.name for ids in (prompt_ids, *responses)} == {"int32"}
    return prompt_ids.tolist(), [ids.tolist() for ids in responses]


def decode(tokens, ids):
    return tokens.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def chatml():
    return ChatTokens(tiny_tokenizer())


@pytest.mark.parametrize("text", ["Once.", "two\n\nlines\n", "  spaces  ", "\n\nbreaks", "ünï → ✓"])
def test_a_response_ends_with_its_end_of_turn(chatml, text):
    prompt_ids, [ids] = split(chatml, "Hi", [text])
    assert decode(chatml, prompt_ids) == f"{START}user\nHi{END}\n{START}assistant\n"
    assert decode(chatml, ids) == text + END  # without the template's trailing line break
    assert ids.count(chatml.tokenizer.eos_token_id) == 1
    whole = chatml.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}], return_dict=False
    )
    assert whole == [*prompt_ids, *ids, *chatml.tokenizer("\n")["input_ids"]]


def test_responses_keep_their_order(chatml):
    prompt_ids, ids = split(chatml, "Hi", ["b", "a", "b"])
    assert [decode(chatml, i) for i in ids] == ["b" + END, "a" + END, "b" + END]
    assert prompt_ids == chatml.prompt_ids("Hi")


def test_messages_as_prompt(chatml):
    messages = [{"role": r, "content": c} for r, c in [("system", "Be brief."), ("user", "Hi")]]
    prompt_ids, [ids] = split(chatml, messages, ["Yes"])
    assert decode(chatml, prompt_ids) == f"{START}system\nBe brief.{END}\n{START}user\nHi{END}\n{START}assistant\n"
    assert decode(chatml, ids) == "Yes" + END
    assert len(messages) == 2  # the caller's list is not touched
    assert chatml.prompt_ids([{"role": "user", "content": "Hi"}]) == chatml.prompt_ids("Hi")


def test_a_template_without_end_of_turn_gets_eos():
    tokens = ChatTokens(tiny_tokenizer(PLAIN))
    prompt_ids, [ids] = split(tokens, "Hi", ["Yes"])
    assert decode(tokens, prompt_ids) == "user: Hi\nassistant: "
    assert decode(tokens, ids) == "Yes\n" + END


def test_a_response_that_merges_with_the_prompt_is_split_all_the_same():
    """Where two line breaks are one token, a response that opens with one would swallow the prompt's last."""
    from tokenizers import models

    tokenizer = tiny_tokenizer()
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if i < 256} | {"ĊĊ": 258}
    tokenizer.backend_tokenizer.model = models.BPE(vocabulary, [("Ċ", "Ċ")])
    tokens = ChatTokens(tokenizer)
    assert 258 in tokenizer(f"{START}assistant\n\n\nOnce")["input_ids"]
    prompt_ids, [plain, broken] = split(tokens, "Hi", ["Once", "\n\nOnce"])
    assert prompt_ids == tokens.prompt_ids("Hi") and prompt_ids[-1] == vocabulary["Ċ"]
    assert [decode(tokens, ids) for ids in (plain, broken)] == ["Once" + END, "\n\nOnce" + END]


BAD_TEMPLATES = {
    "doubled BOS": ("{{ bos_token + bos_token }}" + CHATML, r"w:3: the chat template doubles the BOS token '<\|im_sta"),
    "another generation prompt": (
        CHATML.replace("<|im_start|>assistant", "<|im_start|>model"),
        "w:3: the prompt is not the start of prompt and response together; .* give another with --chat-template FILE",
    ),
    "the user's turn changes": (
        CHATML.replace("m['content']", "(m['content'] if loop.last else 'gone')"),
        "w:3: the prompt is not the start of prompt and response",
    ),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_bad_template(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTokens(tiny_tokenizer(template)).group_ids("Hi", ["Yes"], "w:3")


def test_a_single_bos_is_fine():
    """The template writes it; a tokenizer that adds one too must not get to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("{{ bos_token }}" + PLAIN)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{START} $0", None, [(START, 256)])
    assert tokenizer("x")["input_ids"][0] == 256
    prompt_ids, [ids] = split(ChatTokens(tokenizer), "Hi", ["Yes"])
    assert prompt_ids.count(256) == 1 and 256 not in ids


def test_no_chat_template(tmp_path):
    with pytest.raises(ValueError, match="has no chat template; give one with --chat-template FILE"):
        ChatTokens(tiny_tokenizer(None))
    tiny_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "chat.jinja").write_text(PLAIN)
    tokens = ChatTokens.load(str(tmp_path), str(tmp_path / "chat.jinja"))
    assert tokens.prompt_text("Hi") == "user: Hi\nassistant: "


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain <|im_en|>", None),
        (f"one {END} two", END),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": f"b{START}"}], START),
        ([{"role": "user", "content": "a"}], None),
    ],
)
def test_special_tokens_spelled_out(chatml, text, found):
    assert chatml.special_token_in(text) == found


def test_fingerprint_is_of_vocabulary_and_template(chatml, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert ChatTokens.load(str(tmp_path)).fingerprint() == chatml.fingerprint()
    (tmp_path / "chat.jinja").write_text(PLAIN)
    assert ChatTokens.load(str(tmp_path), str(tmp_path / "chat.jinja")).fingerprint() != chatml.fingerprint()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    assert ChatTokens(tokenizer).fingerprint() != chatml.fingerprint()


def test_only_the_first_end_of_turn_is_kept():
    """A template that adds more after the end of the turn; generation stops at that token too."""
    tokens = ChatTokens(
        tiny_tokenizer(
            CHATML.replace("{% if add", "{% if not add_generation_prompt %}<|im_start|>{% endif %}{% if add")
        )
    )
    _, (ids,) = split(tokens, "Q", ["A"])
    assert ids == [*tokens.tokenizer("A")["input_ids"], 257] and tokens.stop_ids() == [257]


def test_a_turn_that_opens_with_a_special_token():
    """The end of turn is the first special token behind the text, not the one before it."""
    opened = CHATML.replace("m['content']", "('<|im_start|>' if m['role'] == 'assistant' else '') + m['content']")
    assert opened != CHATML
    tokens = ChatTokens(tiny_tokenizer(opened))
    _, (ids,) = split(tokens, "Q", ["A"])
    assert decode(tokens, ids) == START + "A" + END and tokens.stop_ids() == [257]
