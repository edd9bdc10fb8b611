"""The form in which an exported model must be asked, for programs that do not have this package's templates."""

from __future__ import annotations

import json
from typing import Any

from pilot_jax.data.conversations import IMAGE, TEMPLATES, TOKENIZER, stop_tokens


def prompt_form(template: str, tokenizer: Any) -> dict[str, Any]:
    """Returns how a question becomes a prompt, and which tokens end the answer, as `pilot_jax.json` has it.

    Returns: "template", its name; "prompt", the text in which "{}" stands for the question, or None for the tokenizer's
        chat template; "stop", the ids of the tokens that end an answer.
    """
    form = TEMPLATES.get(template)
    return {"template": template, "prompt": None if form is None else form.system + form.human,
            "stop": list(stop_tokens(tokenizer, template))}


TEXT_OF = ("{% macro text_of(content) %}{% if content is string %}{{ content }}{% else %}"
           "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}")


def _quoted(text: str) -> str:
    """Returns a text as one in Jinja: as in JSON, but for the escapes of characters beyond 16 bits, which Jinja reads
    as two halves."""
    return json.dumps(text, ensure_ascii=False)


def chat_template(template: str, tokenizer: Any) -> str | None:
    """Returns a template as Jinja text for `apply_chat_template`; None for the tokenizer's own.

    The content of a message is a text, or a list of parts of the types "image" and "text". An image stands first in its
    message, before a line break. The first message may be a system message, if the template has a place for one; the
    Jinja text refuses any other role.
    """
    if template == TOKENIZER:
        return None
    form, quoted = TEMPLATES[template], _quoted
    before, after = form.human.split("{}")
    lead, tail = form.answer.split("{}")
    starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    start, *rest = form.between.split("{bos}")
    between = quoted(start) + "".join(f" ~ (bos_token or '') ~ {quoted(part)}" for part in rest)
    return (
        TEXT_OF + ("{{ bos_token }}" if starts_with_bos else "") + _system(template)
        + "{% for message in turns %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {quoted(before)} }}}}{{% if loop.first %}}{{{{ inside }}}}{{% endif %}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
        f"{{% if pictures %}}{{{{ {quoted(IMAGE + chr(10))} }}}}{{% endif %}}"
        "{{ (text_of(message['content']) | trim) if pictures else text_of(message['content']) }}"
        "{% endif %}"
        f"{{{{ {quoted(after)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {quoted(lead)} ~ (text_of(message['content']) | trim) ~ "
        f"{quoted(tail + (form.end or tokenizer.eos_token))} }}}}"
        f"{{% if not loop.last %}}{{{{ {between} }}}}{{% endif %}}"
        "{% else %}{{ raise_exception('a message of the role ' ~ message['role'] ~ ' has no place here') }}"
        "{% endif %}{% endfor %}")


def _system(template: str) -> str:
    """Returns the Jinja text that writes a system message, and sets `turns`, the other messages, and `inside`, what
    the first of them begins with."""
    form, quoted = TEMPLATES[template], _quoted
    default = f"{{{{ {quoted(form.system)} }}}}{{% set turns, inside = messages, '' %}}"
    if not form.system_turn:
        return default
    before, after = form.system_turn.split("{}")
    own = f"({quoted(before)} ~ (text_of(messages[0]['content']) | trim) ~ {quoted(after)})"
    shown, inside = ("''", own) if form.system_inside else (own, "''")
    return (f"{{% if messages[0]['role'] == 'system' %}}{{{{ {shown} }}}}"
            f"{{% set turns, inside = messages[1:], {inside} %}}{{% else %}}{default}{{% endif %}}")
