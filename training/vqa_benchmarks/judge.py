"""MM-Vet's judge: a language model behind OpenAI's API that compares an answer with the truth."""

import re
from typing import Any

TEMPERATURES = (0.0, 0.5, 1.0)  # of the tries, when no number comes
SECONDS = 120  # that a judge may take
REASONS = re.compile(r"(.*/)?(gpt-5|o[134])\b.*")  # take no temperature, and think before they speak
# The first word: not 0,5 nor 1/5, nor 1 out of 5.
NUMBER = re.compile(r"\s*([01](?:\.\d+)?)\.?(?:[\s|](?!\s*(?:/|-|\d|(?:out|of|to|or)\b)).*)?", re.DOTALL)


def judge_answer(judge: str, question: str, truth: str, answer: str) -> float:
    """Return the score of an answer, 0 to 1, that a judge gives with MM-Vet's prompt.

    Args:
        judge: a model's name; where it is asked, OPENAI_BASE_URL and OPENAI_API_KEY say.

    Raises:
        ValueError: the judge cannot be asked, or does not answer with a number from 0 to 1.
    """
    import openai
    from lmms_eval.tasks.mmvet.utils import MM_VET_PROMPT

    header = MM_VET_PROMPT.replace("gpt_query_prompt |", "Question |")  # as MM-Vet's authors have it
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    messages = [{"role": "user", "content": f"{header}\n{question} | {truth} | {answer} |"}]
    try:
        with openai.OpenAI(timeout=SECONDS) as client:
            for temperature in TEMPERATURES:
                settings = {"temperature": temperature, "max_tokens": 128}
                if REASONS.fullmatch(judge):
                    settings = {"max_completion_tokens": 4096}
                said = _said(client.chat.completions.create(model=judge, messages=messages, **settings))
                number = NUMBER.fullmatch(said)
                if number and float(number[1]) <= 1:
                    return float(number[1])
    except (openai.OpenAIError, ValueError) as error:
        found = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The judge {judge} cannot be asked ({found}): check OPENAI_BASE_URL, which ends with /v1, OPENAI_API_KEY "
            "and --judge. No score is made up."
        ) from error
    raise ValueError(f"The judge {judge} says {said[:100]!r} of {answer[:100]!r}, expected a number from 0 to 1.")


def _said(reply: Any) -> str:
    """Return the text of a reply; `ValueError` if it is none of the API: a page of HTML, say."""
    try:
        return str(reply.choices[0].message.content or "")
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"it answers {str(reply)!r}") from error
