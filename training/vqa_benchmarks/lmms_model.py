"""TinyAlign as a model of lmms-eval: `lmms-eval --model tinyalign`."""

import lmms_eval.evaluator
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm.auto import tqdm

from ..models import load_to_answer
from .answering import answer_chats, batches_by_length

# lmms-eval 0.7.3 patches a part of filelock that version 4 does not have, and then fails whatever the model.
vars(lmms_eval.evaluator)["_enable_reentrant_filelocks"] = lambda: None


class TinyAlignLmms(lmms):
    """Answers of a TinyAlign checkpoint to any task of lmms-eval that generates.

        lmms-eval --model tinyalign --model_args pretrained=CHECKPOINT,memory_bank=BANK --tasks pope --batch_size 8

    Args:
        pretrained, revision: the checkpoint's folder, or its repository and a commit of it.
        memory_bank: a folder or repository, by default what the config names.
        memory: `"off"` answers without retrieval.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        memory_bank: str | None = None,
        memory: str = "on",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = device or self.accelerator.device
        self.model, self.processor = load_to_answer(
            pretrained, revision, memory_bank, memory, str(self.device), writes_captions=True
        )
        self.memory, self.batch_size = memory, int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request: its context, its chat, how to generate, and its row, task and split."""
        answers = [""] * len(requests)
        settings = [request.args[2] for request in requests]
        lengths = [len(request.args[0]) for request in requests]
        with tqdm(total=len(requests), desc="Answers", disable=self.rank != 0) as progress:
            for batch in batches_by_length(lengths, settings, self.batch_size):
                chats = []
                for number in batch:
                    _, to_messages, _, row, task, split = requests[number].args
                    chats.append(to_messages(self.task_dict[task][split][row]))
                for number, text in zip(batch, self._answers(chats, settings[batch[0]]), strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", (requests[number].args[0], settings[number]), text)
                progress.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer requests whose task asks again, knowing what was answered; one text a round."""
        answers = []
        for request in requests:
            _, to_messages, settings, row, task, split = request.args
            row, texts, info = self.task_dict[task][split][row], [], None
            messages, is_over = to_messages(row), False
            while not is_over:
                texts += self._answers([messages], settings)
                state = {"round_idx": len(texts), "previous_output": list(texts), "previous_round_info": info}
                asked = to_messages(row, **state)
                messages, is_over, _, info = asked if isinstance(asked, tuple) else (None, True, None, None)
            answers.append(texts)
        return answers

    def _answers(self, chats: list[list[dict]], settings: dict) -> list[str]:
        chats = [ChatMessages(messages=chat).to_hf_messages() for chat in chats]
        return answer_chats(self.model, self.processor, chats, settings, self.memory)[0]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tinyalign answers tasks that generate; this one asks for likelihoods.")
