"""Scores of a sequence classifier of Hugging Face, with whatever tokenizer it has."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_instruct.models.classifier import choose_output, classify, load_classifier
from lit_instruct.models.classifier_input import ClassifierReader
from lit_instruct.models.reward_folder import score_constant
from lit_instruct.rewards.base import Scorer, texts_of
from lit_instruct.types import ConfigError, PromptBatch, Responses

Form = Literal["auto", "chat", "pair", "joined", "response"]


class ClassifierScorer(Scorer):
    """Scores by any sequence-classification model of Hugging Face. Text is handed over, so its tokenizer is its own."""

    def __init__(
        self,
        model: str,
        *,
        form: Form = "auto",
        separator: str = "\n\n",
        output: int | str | None = None,
        read: Literal["logit", "logprob"] = "logit",
        max_length: int | None = None,
        long_response: Literal["error", "cut"] = "cut",
        batch_rows: int = 32,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
    ):
        """Load the classifier.

        Args:
            model: hub name or folder.
            form: how prompt and response become its input. chat: as a conversation in its chat template; pair: as its
                tokenizer joins two texts; joined: as one text; response: without the prompt; auto: chat if it has a
                template, else pair if it has a separator token, else joined. Chat messages become one text, joined by
                blank lines, in all forms but chat.
            separator: stands between prompt and response; form joined only.
            output: number or label of the output that is the score; null where the model has only one.
            read: logit, or logprob: the log-probability of that output (log-sigmoid where it stands alone).
            max_length: most tokens; null: as many as the model takes. Longer rows lose the beginning of the prompt.
            long_response: what to do where a response alone is too long: cut its end, and say so once, or error, which
                ends the run whenever the first such response is sampled.
            batch_rows: rows a forward pass.
            dtype: what the model computes in.
            trust_remote_code: run the Python code that some models bring along, as yourself. Read it first.
        """
        super().__init__()
        for name, value, choices in (
            ("form", form, get_args(Form)),
            ("read", read, ("logit", "logprob")),
            ("long_response", long_response, ("error", "cut")),
            ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ):
            if value not in choices:
                raise ConfigError(f"ClassifierScorer {name}: got {value!r}; need one of {', '.join(choices)}.")
        for name, number in (("batch_rows", batch_rows), ("max_length", max_length)):
            if number is not None and number < 1:
                raise ConfigError(f"ClassifierScorer {name}: got {number}; need at least 1.")
        self.model, tokenizer = load_classifier(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self.output = choose_output(self.model, output)
        self.read = read
        self.batch_rows = batch_rows
        self.reader = ClassifierReader(
            self.model,
            tokenizer,
            form=form,
            separator=separator,
            max_length=max_length,
            cut_responses=long_response == "cut",
        )
        self.reader.encode(["prompt"], ["response"])  # a template that takes no conversation is found out here

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts with their rows.
            responses: their responses.
            tokenizer: the policy's.

        Returns:
            fp32 ``[B]``.

        Raises:
            ConfigError: a response is too long for the classifier, or its template refuses a prompt.
        """
        texts = texts_of(prompts, responses, tokenizer)
        inputs = self.reader.encode(texts.prompts, texts.responses)
        outputs_BL = classify(self.model, inputs, batch_rows=self.batch_rows)
        scores_B = self._read(outputs_BL)
        return scores_B.to(responses.response_ids_BR.device)

    def identity(self) -> str:
        """How it reads rows and outputs."""
        reader = self.reader
        constant = score_constant(self.model.config)  # no weight, but it shifts every score
        parts = [super().identity(), reader.form, repr(reader.separator), reader.max_length, self.output, self.read]
        return " ".join(str(part) for part in [*parts, *([constant] if constant else [])])

    def _read(self, outputs_BL: Tensor) -> Tensor:
        if self.read == "logprob":
            exclusive = outputs_BL.shape[1] > 1 and self.model.config.problem_type != "multi_label_classification"
            outputs_BL = F.log_softmax(outputs_BL, dim=1) if exclusive else F.logsigmoid(outputs_BL)
        return outputs_BL[:, self.output]
