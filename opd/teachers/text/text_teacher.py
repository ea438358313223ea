"""Teachers and judges that only generate text.

The model is behind an OpenAI-compatible endpoint, or in this process.  A request that fails is counted and returns no
texts; the other answers of its batch are kept, in memory and on disk.  If too many requests fail, the run stops.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import fields

from opd.core.errors import Refusal
from opd.core.types import STUDENT_COLUMNS, Rollout
from opd.losses.hidden_states import Lens
from opd.teachers.base import BaseTeacher
from opd.teachers.text.answer_cache import AnswerCache, cache_key
from opd.teachers.text.text_models import (
    EndpointModel,
    Failure,
    InProcessModel,
    RequestCounters,
    TextRequest,
    TextSampling,
)

MIN_COUNTED, WINDOW = 10, 50  # requests: the fewest after which failures can stop a run, and the most that are counted


class FailureLimit:
    """A limit on failures: it stops the run when more than the share `limit` of the last WINDOW requests failed.

    It waits for MIN_COUNTED requests first.  `flag` and `unit` name the model and what is counted, for the message.
    """

    def __init__(self, flag: str, limit: float, unit: str = "questions") -> None:
        self.flag, self.limit, self.unit = flag, limit, unit
        self.failures: deque[bool] = deque(maxlen=WINDOW)
        self.reason = ""  # of the last failure

    def note(self, result: object) -> None:
        """Count one request, which failed if its result is a `Failure`.  Raises Refusal above the limit."""
        self.failures.append(isinstance(result, Failure))
        self.reason = str(result) if self.failures[-1] else self.reason
        count = len(self.failures)
        share = sum(self.failures) / count
        if count >= MIN_COUNTED and share > self.limit:
            raise Refusal(
                f"--{self.flag}: {share:.0%} of the last {count} {self.unit} failed, and --judge-failures allows "
                f"{self.limit:.0%}; the last: {self.reason}: mend that, then run the same command with --resume"
            )


class TextTeacher(BaseTeacher):
    """A teacher that answers with text only.  It suits methods that need no log-probs of the teacher.

    Only the main process (rank 0) has its model and generates.
    """

    provides = STUDENT_COLUMNS | {"text"}

    def __init__(
        self, model: EndpointModel | InProcessModel | None, cache: AnswerCache, failure_limit: FailureLimit
    ) -> None:
        self.model, self.cache, self.failure_limit = model, cache, failure_limit
        self.counters = RequestCounters()  # since the last call of `traffic`

    def continuations(
        self, prefixes: Sequence[TextRequest], n: int, max_tokens: int, seed: int, temperature: float = 1.0
    ) -> list[list[str]]:
        """Return `n` continuations of each prefix, of at most `max_tokens` tokens of the teacher's tokenizer each."""
        return self.texts(prefixes, TextSampling(n, max_tokens, temperature, "--length"), seed)

    def forget(self, requests: Sequence[TextRequest], sampling: TextSampling, seed: int) -> None:
        """Delete useless answers from the cache, so that the requests are sent again next time."""
        self.cache.drop([self._key(request, sampling, seed) for request in requests])

    def _key(self, request: TextRequest, sampling: TextSampling, seed: int) -> str:
        assert self.model is not None, "only the main process generates"
        model_input = self.model.model_input(request)
        return cache_key(self.model.name, model_input, sampling.n, sampling.max_tokens, sampling.temperature, seed)

    def texts(self, requests: Sequence[TextRequest], sampling: TextSampling, seed: int) -> list[list[str]]:
        """Return the texts of each request, from the cache or the model (equal ones once); none where it failed."""
        assert self.model is not None, "only the main process generates"
        keys = [self._key(request, sampling, seed) for request in requests]
        texts_by_key: dict[str, list[str]] = {}
        to_send: dict[str, tuple[TextRequest, int]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key in texts_by_key or key in to_send:
                continue
            if (cached := self.cache.find(key)) is not None:
                texts_by_key[key] = cached
            else:
                to_send[key] = (request, int(key[:7], 16))  # a request's seed comes from its key: 28 bits
        self.counters.add(calls=len(to_send), cached=len(texts_by_key))
        sent_keys = list(to_send)
        for results in self.model.generate(list(to_send.values()), sampling, self.counters) if to_send else ():
            for i, result in results:  # store all answers before a failure can stop the run
                if not isinstance(result, Failure):
                    self.cache.store(sent_keys[i], result)
                    texts_by_key[sent_keys[i]] = result
            for _, result in results:
                self.counters.add(failed=isinstance(result, Failure))
                self.failure_limit.note(result)
        return [texts_by_key.get(key, []) for key in keys]

    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> None:
        """Return None: a text-only teacher has no hidden states."""

    def traffic(self) -> dict[str, float]:
        counters, self.counters = self.counters, RequestCounters()
        return {f"teacher_{f.name}": float(getattr(counters, f.name)) for f in fields(counters) if f.name != "lock"}
