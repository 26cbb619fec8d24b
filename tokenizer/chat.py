"""The one chat template: messages to ids, and which of them a model learns to say.

    <|document|> then for each message  <|role|> content <|end|>

Roles are control tokens, so no content can pretend to be one. The loss mask is 1 on the assistant's content and the
<|end|> after it: the model learns to answer and to stop, not to imitate the user.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizer.tokenizer import DOCUMENT, END, ROLES, Tokenizer

JINJA_TEMPLATE = (
    f"{{{{- '{DOCUMENT}' -}}}}"
    "{%- for message in messages -%}"
    f"{{{{- '<|' + message['role'] + '|>' + message['content'] + '{END}' -}}}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The same template in Jinja2, for Hugging Face's `chat_template`: the text of `encode_chat`'s ids, special tokens
spelled out. There, a special token in a message's content becomes that token; `encode_chat` keeps it text."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, reply: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and, for each id, 1 where it is a target and 0 elsewhere; extra keys of a message are ignored.

    With `reply` the ids end with the assistant's header, ready for generation.

    Raises ValueError naming the message for an unknown role, roles out of turn (a system message only at the start,
    then user and assistant in turn), content that is no string, `reply` where it is not the assistant's turn; and for
    a tokenizer without roles (type char, and others' tokenizers).
    """
    _check(messages, reply)
    if "assistant" not in tokenizer.special:
        raise ValueError(
            f"this tokenizer (type {tokenizer.type}) has no chat roles such as <|assistant|>; take a model whose "
            "tokenizer was trained here with type bpe or unigram"
        )
    ids, loss_mask = [tokenizer.document_id], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        ids += [tokenizer.special[message["role"]], *content, tokenizer.end_id]
        loss_mask += [0] + [int(message["role"] == "assistant")] * (len(content) + 1)
    if reply:
        ids.append(tokenizer.special["assistant"])
        loss_mask.append(0)
    return ids, loss_mask


def _check(messages: Sequence[Mapping[str, Any]], reply: bool) -> None:
    if not messages:
        raise ValueError("a chat needs at least one message")
    turn = "user"
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {index} must be an object with the keys role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}; choose system, user or assistant")
        if not isinstance(content, str):
            raise ValueError(f"message {index} has content that is no string: {content!r}")
        if role == "system" and index == 0:
            continue
        if role != turn:
            raise ValueError(
                f"message {index} is the {role}'s, but it is the {turn}'s turn: after an optional system message, "
                "user and assistant take turns, and the user begins"
            )
        turn = "assistant" if turn == "user" else "user"
    if reply and turn != "assistant":
        raise ValueError(f"message {len(messages) - 1} leaves the turn to the user, so there is nothing to reply to")
