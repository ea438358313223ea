"""The annotator of `Continue`: a teacher continues the response before each chunk.  OmniOPD, arXiv:2606.01476."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.core.types import Batch, Rollout
from opd.methods.questions import Continue
from opd.methods.rollout_policies.base import Memory
from opd.teachers.judges.annotator import Annotator, TeacherTexts, TrainingStep
from opd.teachers.text.text_models import TextRequest, import_extra


@dataclass(frozen=True)
class ChunkAnnotator(Annotator):
    """Compares the teacher's continuations with the student's text, chunk by chunk."""

    question: Continue
    texts: TeacherTexts

    def annotate(
        self, batch: Batch, rollouts: Sequence[Rollout], memory: Memory, step: TrainingStep
    ) -> tuple[Batch, Memory]:
        with step.clock("ask"):
            columns = self.texts.on_main(lambda: self.columns(batch, rollouts))
        return replace(batch, **columns), memory

    def columns(self, batch: Batch, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Return `chunk` [B, T], the chunk number of each token, and `agreement` [B, T], the summed similarity.

        A chunk without an answer is removed: its number becomes 0.
        """
        similarity = import_extra("rapidfuzz.distance", "omniopd").Levenshtein.normalized_similarity
        question, texts = self.question, self.texts
        assert batch.student_entropy is not None, "a method that asks for continuations is measured before"
        chunk = question.chunk_numbers(batch.student_entropy, batch.mask)
        agreement = torch.zeros(chunk.shape)
        for name, teacher in texts.teachers.items():
            spans = [(row, tokens) for row, tokens in chunk_spans(chunk) if rollouts[row].teacher == name]
            prefixes = [
                TextRequest(rollouts[i].prompt, texts.span(rollouts[i], 0, tokens.start)) for i, tokens in spans
            ]
            answers = teacher.continuations(prefixes, question.texts, question.length, texts.seed, question.temperature)
            for (row, tokens), continuations in zip(spans, answers, strict=True):
                student_text = texts.span(rollouts[row], tokens.start, tokens.stop)
                if continuations:
                    agreement[row, tokens] = sum(similarity(student_text, text) for text in continuations)
                else:
                    chunk[row, tokens] = 0
        return {"chunk": chunk, "agreement": agreement}

    def metrics(self, batch: Batch, extra: Batch) -> dict[str, float]:
        """Return the share of audited tokens, and the mean similarity of the texts."""
        if batch.chunk is None or batch.agreement is None:
            return {}
        audited = batch.mask & (batch.chunk > 0)
        metrics = {"audited": float(audited.sum() / batch.mask.sum().clamp(min=1))}  # share of trained tokens
        if audited.any():
            metrics["agreement"] = float(batch.agreement[audited].mean() / self.question.texts)  # from 0 to 1
        return metrics


def chunk_spans(chunk: Tensor) -> list[tuple[int, slice]]:
    """Return the row and the tokens of each chunk of a batch [B, T], ordered by row and number."""
    spans = []
    for row, numbers in enumerate(chunk):
        for number in range(1, int(numbers.max()) + 1):
            tokens = (numbers == number).nonzero()[:, 0]
            spans.append((row, slice(int(tokens[0]), int(tokens[-1]) + 1)))
    return spans
