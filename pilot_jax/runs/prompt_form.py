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


def chat_template(template: str, tokenizer: Any) -> str | None:
    """Returns a template as Jinja text for `apply_chat_template`; None for the tokenizer's own.

    The content of a message is a text, or a list of parts of the types "image" and "text". An image stands first in its
    message, before a line break.
    """
    if template == TOKENIZER:
        return None
    form, quoted = TEMPLATES[template], json.dumps  # a JSON text is a Jinja text
    before, after = form.human.split("{}")
    lead, tail = form.answer.split("{}")
    starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    start, *rest = form.between.split("{bos}")
    between = quoted(start) + "".join(f" ~ (bos_token or '') ~ {quoted(part)}" for part in rest)
    return (
        ("{{ bos_token }}" if starts_with_bos else "") + f"{{{{ {quoted(form.system)} }}}}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {quoted(before)} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
        f"{{% if pictures %}}{{{{ {quoted(IMAGE + chr(10))} }}}}{{% endif %}}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ (part['text'] | trim) if pictures else part['text'] }}{% endfor %}"
        "{% endif %}"
        f"{{{{ {quoted(after)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        "{% if message['content'] is string %}{% set answer = message['content'] %}"
        "{% else %}{% set answer = message['content'][0]['text'] %}{% endif %}"
        f"{{{{ {quoted(lead)} ~ (answer | trim) ~ {quoted(tail + (form.end or tokenizer.eos_token))} }}}}"
        f"{{% if not loop.last %}}{{{{ {between} }}}}{{% endif %}}"
        "{% endif %}{% endfor %}")
