"""MM-Vet's judge: a language model behind OpenAI's API that compares an answer with the truth."""

import re

TEMPERATURES = (0.0, 0.5, 1.0)  # of the tries, when no number comes
SECONDS = 120  # that a judge may take
NUMBER = re.compile(r"\s*([01](?:\.\d+)?)\.?(?:[\s|].*)?", re.DOTALL)  # the first word: not 0,5 nor 1/5


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
                asked = {"model": judge, "messages": messages, "temperature": temperature, "max_tokens": 128}
                said = client.chat.completions.create(**asked).choices[0].message.content or ""
                number = NUMBER.fullmatch(said)
                if number and float(number[1]) <= 1:
                    return float(number[1])
    except openai.OpenAIError as error:
        raise ValueError(f"The judge {judge} cannot be asked ({error}): no score is made up.") from error
    raise ValueError(f"The judge {judge} says {said[:100]!r} of {answer[:100]!r}, expected a number from 0 to 1.")
