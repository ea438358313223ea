"""Rollout collection: generate responses with student or teacher, and verify them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal
from opd.core.sampling import Prompt, Sampling
from opd.core.types import DATA, STUDENT, TEACHER, Rollout
from opd.data.prompts import Rendered
from opd.data.verifiers import response_text
from opd.head.inputs import Hidden
from opd.head.vocabulary import Head, Vocabulary
from opd.methods.rollout_policies.base import Memory, RolloutPolicy, RunState
from opd.models.batching import FORWARD_TOKENS, micro_batches, rows
from opd.models.forward import cross_entropies, final_states, unprompted
from opd.models.load import head
from opd.rollouts.engines.base import Engine, GenerateRequest, ResponseGenerator, Sample, TeacherDecoding
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.prefix_cache import Prefix, PrefixCache

AS_IS = Head(torch.empty(0, 0))  # no scale or softcap: the model has applied them to the logits


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """A request to generate `policy.per_prompt` rollouts for each prompt."""

    prompts: Sequence[Rendered]  # this process's share of the prompts
    policy: RolloutPolicy
    sampling: Sampling
    seed: int  # the run's seed
    step: int  # the batch number, which keys the noise
    first: int = 0  # batch index of the first rollout
    total: int = 1  # number of steps in the run
    memory: Memory = field(default_factory=dict)  # what the run carries from step to step
    unprompted: bool = False  # also note the student's cross entropy of each response without its prompt

    def run_state(self) -> RunState:
        """Return the values that the policy's answers depend on."""
        return RunState(self.step, self.total, self.sampling.max_new_tokens, self.memory)


@dataclass(frozen=True)
class SampledResponse:
    """A response before it is verified."""

    prompt: Rendered
    source: int  # a value of the `source` column
    prefix: Prefix
    sample: Sample


@dataclass(frozen=True)
class Collector:
    """A collector that turns prompts into finished rollouts, for a single process."""

    student: Engine
    teachers: Mapping[str, ResponseGenerator]  # by route name; "" is --teacher
    tokenizer: Tokenizer
    vocabulary: Vocabulary  # common ids, temperature and stop class for comparing student and teacher
    prefix_cache: PrefixCache = field(default_factory=PrefixCache)
    think_end: str = ""  # --think-end

    def collect(self, request: RolloutRequest, verify: Callable[[str, Prompt], float]) -> list[Rollout]:
        """Generate rollouts and score them with the verifier, (response, prompt) -> score from 0 to 1."""
        return self.finish(request, self.sample(request), verify)

    def sample(self, request: RolloutRequest) -> list[SampledResponse]:
        """Generate responses.  A thread may call it while the student trains, if a server generates them."""
        policy, first = request.policy, request.first
        prompts = [prompt for prompt in request.prompts for _ in range(policy.per_prompt)]
        sources = [policy.source(request.step, first + i, request.seed) for i in range(len(prompts))]
        prefix_sampling = replace(request.sampling, max_new_tokens=policy.prefix_limit(request.run_state()))
        prefixes = self.prefix_cache.get(self.teachers, prompts, prefix_sampling, request.seed)
        samples = self._samples(request, prompts, sources, prefixes)
        rows = zip(prompts, sources, prefixes, strict=True)
        return [SampledResponse(*row, samples[i]) for i, row in enumerate(rows)]

    def finish(
        self, request: RolloutRequest, responses: Sequence[SampledResponse], verify: Callable[[str, Prompt], float]
    ) -> list[Rollout]:
        """Score the responses to a request with the verifier, and add what the student measures on them."""
        policy, first = request.policy, request.first
        notes, rollouts = policy.notes(request.run_state()), list[Rollout]()
        for i, response in enumerate(responses):
            prompt, prefix, sample = response.prompt, response.prefix, response.sample
            ids = (*prefix.ids, *sample.ids)
            rollouts.append(
                Rollout(
                    prompt_ids=prompt.ids,
                    teacher_prompt_ids=prompt.teacher_ids,
                    ids=ids,
                    sampler_logp=(*(0.0,) * len(prefix.ids), *sample.logp),
                    index=first + i,
                    group=first // policy.per_prompt + i // policy.per_prompt,
                    stopped=sample.stopped,
                    source=response.source,
                    version=sample.version,
                    outcome=verify(self.text(ids), prompt.prompt),
                    prefix=len(prefix.ids),
                    others=sample.others,
                    notes={**sample.notes, **notes},
                    teacher=prompt.teacher,
                    prompt=prompt.prompt,
                )
            )
        return self._unprompted(rollouts) if request.unprompted else rollouts

    def _samples(
        self, request: RolloutRequest, prompts: Sequence[Rendered], sources: Sequence[int], prefixes: Sequence[Prefix]
    ) -> dict[int, Sample]:
        """Return the responses after their prefixes, by position, each generated by its source."""
        sampling = request.sampling
        # A prefix that is complete or reaches the length limit needs no continuation by the student.
        complete = [prefix.reaches(sampling.max_new_tokens) for prefix in prefixes]
        samples = {i: Sample((), (), p.stopped) for i, p in enumerate(prefixes) if complete[i]}
        hook = request.policy.decode_hook(request.run_state(), partial(self.vocabulary.logp, head=AS_IS))
        groups = [[name] for name in self.teachers] if hook else [list(self.teachers)]
        for source, names in (*((STUDENT, names) for names in groups), *((TEACHER, [name]) for name in self.teachers)):
            places = [i for i, p in enumerate(prompts) if sources[i] == source and p.teacher in names]
            places = [i for i in places if not complete[i]]
            if not places:
                continue
            chosen, index = [prompts[i] for i in places], [request.first + i for i in places]
            numbers = [i // request.policy.per_prompt for i in index]
            request_of = partial(
                GenerateRequest, sampling=sampling, seed=request.seed, step=request.step, index=index, groups=numbers
            )
            if source == TEACHER:
                generated = self.teachers[names[0]].generate(request_of([p.teacher_ids for p in chosen]))
            else:
                teacher = None
                if hook is not None:
                    engine = self.teachers[names[0]]
                    assert isinstance(engine, HFEngine), "a session refuses teachers that cannot read along"
                    teacher = TeacherDecoding(engine.model, [p.teacher_ids for p in chosen], hook)
                prefix_ids = [prefixes[i].ids for i in places]
                generate = request_of([p.ids for p in chosen], prefixes=prefix_ids, teacher=teacher)
                if isinstance(self.student, HFEngine):  # with other engines, see `with_others`
                    generate = replace(generate, samples=request.policy.samples)
                generated = self.student.generate(generate)
            samples |= zip(places, generated, strict=True)
        for i, source in enumerate(sources):
            if source == DATA:
                samples[i] = self._reference(prompts[i], sampling.max_new_tokens)
        return samples

    @torch.no_grad()
    def _unprompted(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Add the note `student_alone`: the current student's cross entropy without the prompt, in nats per token."""
        model, values = self.student.model, dict[int, float]()
        for indices in micro_batches({i: len(r.ids) for i, r in enumerate(rollouts)}, FORWARD_TOKENS):
            part = [rollouts[i] for i in indices]
            plain, masks = unprompted(part)
            hidden = Hidden(final_states(model, rows(plain, masks, teacher=False, device=model.device)), head(model))
            values |= zip(indices, cross_entropies(hidden, part, self.vocabulary), strict=True)
        return [replace(r, notes={**r.notes, "student_alone": values[i]}) for i, r in enumerate(rollouts)]

    def text(self, ids: Sequence[int]) -> str:
        """Decode a response to text, without special tokens except the marks of thinking."""
        return response_text.decode(self.tokenizer, ids, self.think_end)

    def _reference(self, rendered: Rendered, max_tokens: int) -> Sample:
        """Return the data's response as a sample.  Raises Refusal if the data has none."""
        prompt = rendered.prompt
        if not prompt.response:
            raise Refusal(
                "--response-column: this method trains on the data's responses, and a prompt has none "
                f"({self.tokenizer.decode(list(rendered.ids))[-60:]!r}); name the column, or --other teacher"
            )
        ids = [*self.tokenizer(prompt.response, add_special_tokens=False)["input_ids"], self.student.stop[0]]
        return Sample(tuple(ids[:max_tokens]), (0.0,) * min(len(ids), max_tokens), len(ids) <= max_tokens)
