"""Chat templates with images, and with `{% generation %}` around answers so that only they are trained on."""

from collections.abc import Sequence

_CONTENT = """
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# SmolLM2, Qwen2, Qwen2.5: their own turns; no system prompt unless one is given.
CHATML_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

# Every other language model: the turns of LLaVA 1.5, which TinyLLaVA uses with TinyLlama and Phi-2. The space before
# the answer is part of it, because byte-level tokenizers merge it with the first word.
PLAIN_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + render(message['content']) + ' ' -}}
{%- else -%}
{{- render(message['content']) + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)


def add_captions(messages: list[dict], captions: Sequence[str]) -> list[dict]:
    """
    Text-only retrieval: the captions of the neighbours, written before the text of the first question.

        messages = add_captions(messages, model.retrieve(pixel_values, top_k=5).captions[0])
    """
    if not captions:
        return messages
    asked = next(index for index, message in enumerate(messages) if message["role"] == "user")
    content, hint = messages[asked]["content"], f"Similar: {'; '.join(captions)}\n"
    if isinstance(content, str):
        content = hint + content
    else:
        first = next((index for index, part in enumerate(content) if part["type"] == "text"), len(content))
        content = [*content[:first], {"type": "text", "text": hint}, *content[first:]]
    return [*messages[:asked], {**messages[asked], "content": content}, *messages[asked + 1 :]]
