"""Stages of responses: found on real tokens, paid by hand-worked returns, kept rubrics, reflections, real judges."""

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd import cli
from opd.analysis.exact import World
from opd.config.data import Data
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.tensors import save_tensors
from opd.core.types import Batch
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.data.prompts import digest
from opd.data.tasks.load import load
from opd.losses.rewards import LogRatio, One
from opd.losses.terms import Match, PolicyGradient, Positions, Target
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.questions import Reflect, Stages
from opd.methods.rubricem import LAMBDA, TAGS, JudgedRollouts, StageReturn, StageScore
from opd.models.source import EMBEDDED
from opd.teachers.judges import rubric_memory
from opd.teachers.judges import stage_tags as stages
from opd.teachers.judges.annotator import TeacherTexts
from opd.teachers.judges.judge_requests import FormModel
from opd.teachers.judges.reflections import choose_attempts, with_notes
from opd.teachers.judges.rubric_memory import DeferredReflection, RubricMemory, StageCriterion
from opd.teachers.judges.stage_annotator import column_criteria
from opd.teachers.judges.stage_judge import Contrast, ModelStageJudge, Reflection, StagedResponse
from opd.teachers.judges.verifier_judge import ROUND, SUMS, VerifierStageJudge
from opd.teachers.text.text_models import Failure
from opd.training.checkpoint import load as load_state
from scripts.grader import Grader, Scripted
from tests.data.test_tokenizers import byte_level
from tests.teachers.test_remote_teachers import Proxy
from tests.teachers.test_text_teachers import QUICK, endpoint
from tests.tiny_models import interrupted_at, logged, started

close = torch.testing.assert_close
FOUR = ("<plan>", "<work>", "<check>", "<answer>")


# Where the stages are


@pytest.mark.parametrize(
    "parts",
    [
        ("<plan>a", "<work>b", "<check>c", "<answer>d"),
        ("Well. <plan>a", "<work>b", "", "<answer>d"),  # what stands before the first tag is the first stage's
        ("", "", "", "no tag at all"),
        ("", "", "", ""),
        ("", "<work>b", "", ""),
        ("<plan>a<plan>a2", "<work>b<work>b2", "", "<answer>d<plan>e"),  # repeated, or after its time: text
        ("<plan>I end with <answer> then.", "<work>b", "<check>c", "<answer>d"),  # before its time
        ("<answer>d<plan>a", "<work>b", "", ""),  # out of order: the longest chain
        ("<plan>a</plan>", "<work>b</work>\n", "", "<answer>d</answer>x"),
        ("", "", "", "<answer>1<answer>2"),
    ],
)
def test_stages_of_texts(parts):
    assert tuple(stages.texts("".join(parts), FOUR)) == parts


def test_a_stage_may_have_several_tags():
    text = "<structured_plan>a<state_evaluation>b<state_evaluation>c<writing_plan>d<rubric_review>e<answer>f"
    assert [at for _, at in stages.starts(text, TAGS)] == [0, 18, 56, 87]
    assert [stage for stage, _ in stages.starts(text, TAGS)] == [1, 2, 3, 4]
    assert stages.starts("<a><ab>", ("<a>", "<ab>|<a")) == [(1, 0), (2, 3)]


def metaspace() -> PreTrainedTokenizerFast:
    """A unigram model over pieces with a leading mark for the space, as SentencePiece makes them."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = ["the <plan> is to work <work> and check <check> the answer <answer> twice."] * 8
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<end>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")


def special() -> PreTrainedTokenizerFast:
    """Two of the tags are special tokens."""
    text = byte_level()
    text.add_special_tokens({"additional_special_tokens": ["<plan>", "<answer>"]})
    return text


def merging() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens run over the edges of tags."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(".", "isolated"), decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = ["x\n<plan>2\n<work>3\n<check>4\n<answer>5 é 漢 🙂"] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("make", [byte_level, metaspace, special, merging])
def test_the_stage_of_each_token(make):
    """Against reading one token more at a time; on texts as sampled: pieces that no tokenizer would have chosen."""
    text, coin = make(), random.Random(0)
    words = [*FOUR, "<", "plan>", "\n", " work", " 12=3", "the answer", "é", "漢字", "🙂", "</answer>"]
    several = 0
    for _ in range(150):
        pieces = coin.choices(words, k=coin.randint(0, 20))
        ids = [i for piece in pieces for i in text(piece, add_special_tokens=False)["input_ids"]]
        read = lambda n, ids=ids: text.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = read(len(ids))
        found = stages.starts(whole, FOUR) or [(4, 0)]
        after = [read(n) for n in range(1, len(ids) + 1)]
        first = lambda char, after=after: [text[: char + 1] == after[-1][: char + 1] for text in after].index(True)
        places = [(first(at), stage) for stage, at in found[1:]]
        wanted = [max([stage for at, stage in places if at <= i], default=found[0][0]) for i in range(len(ids))]
        assert stages.numbered(text, ids, FOUR) == wanted
        assert wanted == sorted(wanted)
        several += len(set(wanted)) > 1
    assert several > 50


def test_a_token_that_runs_into_a_tag_is_the_tags():
    text = merging()
    ids = text("x\n<plan>2\n<work>3\n<answer>5")["input_ids"]
    tokens = [text.decode([i]) for i in ids]
    assert any("\n" in token and "<" in token for token in tokens)  # else this tests nothing
    number = stages.numbered(text, ids, FOUR)
    parts = ["".join(t for t, n in zip(tokens, number, strict=True) if n == stage) for stage in (1, 2, 4)]
    assert "".join(parts) == "x\n<plan>2\n<work>3\n<answer>5"
    assert "<" in tokens[number.index(2)] and tokens[number.index(2)][0] != "<" and "<work" not in parts[0]


def test_the_embedded_task_has_four():
    text = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    for p in load(Data(source="embedded:ledger", limit=5)).prompts:
        ids = [*text(p.response, add_special_tokens=False)["input_ids"], text.eos_token_id]
        number = stages.numbered(text, ids, FOUR)
        marks = [i for i, token in enumerate(text.convert_ids_to_tokens(ids)) if token in FOUR]
        assert [number.index(stage) for stage in (1, 2, 3, 4)] == marks and number[-1] == 4


# What a stage earns


def test_returns_by_hand(float64):
    """Scores -> returns by the published matrix -> z-scores over the rollouts with the stage, on the stage's tokens."""
    nan = torch.nan
    scores = torch.tensor([[1, 0.5, 0, 1], [0.5, 0.5, 1, 0], [0, 1, nan, 0.5], [nan, nan, nan, 0.2], [1, 1, 1, 1]])
    stage = torch.tensor([[1, 1, 2, 3, 4], [1, 2, 3, 4, 4], [1, 2, 3, 4, 0], [4, 4, 4, 0, 0], [1, 2, 3, 4, 4]])
    mask, group = stage > 0, torch.tensor([0, 0, 0, 0, 1])
    returns = [
        [1 + 0.2 + 0 + 0.8, 0.5 + 0 + 0.8, 0 + 0.8, 1],
        [0.5 + 0.2 + 0.6 + 0, 0.5 + 0.4 + 0, 1 + 0, 0],
        [0 + 0.4 + 0 + 0.4, 1 + 0 + 0.4, 0 + 0.4, 0.5],  # a review that the judge did not score
        [nan, nan, nan, 0.2],  # nothing but an answer
    ]
    z = [[], [], [], []]
    for k in range(4):
        of_stage = np.array([row[k] for row in returns if not math.isnan(row[k])])
        for i in range(4):
            z[i].append((returns[i][k] - of_stage.mean()) / (of_stage.std() + 1e-6))
    wanted = torch.tensor(
        [
            [z[0][0], z[0][0], z[0][1], z[0][2], z[0][3]],
            [z[1][0], z[1][1], z[1][2], z[1][3], z[1][3]],
            [z[2][0], z[2][1], z[2][2], z[2][3], 0],
            [z[3][3], z[3][3], z[3][3], 0, 0],
            [0, 0, 0, 0, 0],  # alone in its group
        ]
    )
    x = StageScore()(torch.ones(5, 5), stage, scores, mask)
    close(x[0], torch.tensor([1, 1, 0.5, 0, 1]))
    close(x[2], torch.tensor([0, 1, 0, 0.5, 0]))
    close(StageReturn()(x, stage, group, mask), wanted)


def test_missing_stages(float64):
    """A stage without tokens earns 0 and takes no part in its statistics; here stages of two rollouts, or of one."""
    stage = torch.tensor([[1, 1, 4, 4], [1, 2, 3, 3], [4, 4, 4, 4]])
    x = torch.tensor([[0.2, 0.4, 0.5, 0.7], [1.0, 1.0, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0]])
    mask, group = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    # Plans: 0.3 + 0.8 * 0.6 = 0.78 and 1 + 0.4 * 1 + 0.6 * 0.5 = 1.7, 0.46 from their mean; answers: 0.6 and 0.5.
    plan, answer = 0.46 / (0.46 + 1e-6), 0.05 / (0.05 + 1e-6)
    wanted = torch.tensor([[-plan, -plan, answer, answer], [plan, 0, 0, 0], [-answer] * 4])
    close(StageReturn()(x, stage, group, mask), wanted)
    mask[2] = False  # then the first rollout has the only answer
    close(StageReturn()(x, stage, group, mask), torch.tensor([[-plan, -plan, 0, 0], [plan, 0, 0, 0], [0] * 4]))


def test_equal_scores_have_no_advantage_however_long_the_stages_are():
    """In float32 the mean of many equal numbers may round; over a deviation of nothing that would be an advantage."""
    length = torch.randint(1, 4000, (8, 1))
    stage = torch.where(torch.arange(4000) < length, 1, 2)
    x = torch.full((8, 4000), 1 / 3)
    advantage = StageReturn(((1.0, 0.3), (0.0, 1.0)))(x, stage, torch.zeros(8, dtype=torch.long), stage > 0)
    assert advantage.abs().max() < 1e-6


def test_returns_of_another_reward(float64):
    """A leaf like others: here of the log ratio that a teacher gives, in a world of tables, by a second way."""
    world = World.random(vocab=4, steps=3)
    ids = world.sequences()[:12]
    method = Method(
        (PolicyGradient(LogRatio(), transforms=(StageReturn(((1.0, 0.5), (0.0, 1.0))),)),),
        asks=Stages(("a", "b"), (1, 1)),
    )
    stage = torch.tensor([[1, 1, 2], [1, 2, 2]]).repeat(6, 1)
    batch = world.measure(method, ids, group=torch.arange(12) // 4, stage=stage)
    (target,) = method.prepare(batch)
    ratio = batch.teacher_logp - batch.student_logp
    for i in range(12):
        mean = lambda j, k: ratio[j][stage[j] == k].mean()
        returns = [[mean(j, 1) + 0.5 * mean(j, 2), mean(j, 2)] for j in range(12) if j // 4 == i // 4]
        own = torch.tensor(returns)
        z = (own - own.mean(0)) / (own.std(0, correction=0) + 1e-6)
        close(target.advantage[i], z[i % 4][stage[i] - 1])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: StageReturn(((1.0, 0.5),)), "a row and a column"),
        (lambda: StageReturn(((1.0, 0.0), (0.5, 1.0))), "0 below the diagonal"),
        (lambda: METHODS["rubricem"](tags=("<a>", "<b>")), "give --returns"),
        (lambda: METHODS["rubricem"](returns=(1.0, 0.5)), "16 numbers for 4 stages"),
        (lambda: METHODS["rubricem"](tags=("<a>", "<b>|", "<c>", "<d>")), "none of them empty"),
        (lambda: METHODS["rubricem"](caps=(1, 2)), "one for each of the 4"),
        (lambda: METHODS["rubricem"](reflections=1), "compared with each other"),
        (lambda: METHODS["rubricem"](reflect="{prompt}"), "lacks {response}"),
        (lambda: Method((PolicyGradient(One(), transforms=(StageReturn(),)),)), "Stages"),
        (lambda: StageCriterion(1, "x", 4), "weight of 1 to 3"),
    ],
)
def test_refused_values(make, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        make()


def test_other_stages_have_other_returns():
    method = METHODS["rubricem"](tags=("<a>", "<b>"), returns=(1.0, 0.25, 0.0, 1.0), caps=(2, 1), beta=0.0)
    assert method.terms[0].transforms[1].matrix == ((1.0, 0.25), (0.0, 1.0)) and len(method.terms) == 1
    assert METHODS["rubricem"]().terms[0].transforms[1].matrix == LAMBDA


def test_the_kl_is_that_of_kl3_in_expectation(float64):
    """Published: the gradient of k3 = ref/p - log(ref/p) - 1 at the sampled token; here its mean over y ~ p."""
    logits, reference = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6).log_softmax(-1)
    logp = logits.log_softmax(-1)
    gap = reference - logp
    k3 = gap.exp() - gap - 1
    sampled = torch.autograd.grad((logp.exp().detach() * k3).sum(), logits, retain_graph=True)[0]
    (term,) = [t for t in METHODS["rubricem"]().terms if isinstance(t, Match)]
    at = Positions(torch.zeros(3, dtype=torch.long), logp, torch.full_like(logp, math.nan), reference)
    close(torch.autograd.grad(term.loss(at, Target(torch.ones(3), None, None)).sum(), logits)[0], sampled)
    assert term.coef == 0.001


def test_the_loss_by_hand(float64):
    """min(ratio A, clipped ratio A) over the tokens of judged rollouts, and the KL to the reference on them."""
    student, reference = torch.randn(4, 3, 5).requires_grad_(), torch.randn(4, 3, 5).log_softmax(-1)
    ids, logp = torch.randint(5, (4, 3)), student.log_softmax(-1)
    at = Positions(ids, logp, torch.full_like(logp, math.nan), reference)
    own = at.sampled(logp)
    old = own.detach() + 0.4 * torch.randn(4, 3)
    stage = torch.tensor([[1, 2, 2], [1, 1, 2], [1, 2, 2], [2, 2, 2]])
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.5], [torch.nan, torch.nan], [torch.nan, 1.0]])
    batch = Batch(
        ids=ids,
        mask=torch.ones(4, 3, dtype=torch.bool),
        group=torch.zeros(4, dtype=torch.long),
        source=torch.zeros(4, dtype=torch.long),
        stopped=torch.ones(4, dtype=torch.bool),
        outcome=torch.zeros(4),
        sampler_logp=old,
        student_logp=old,
        stage=stage,
        stage_scores=scores,
        judged=torch.tensor([True, True, False, True]),
        scores=(torch.ones(4, 3), None),
    )
    method = METHODS["rubricem"](tags=("a", "b"), returns=(1.0, 0.5, 0.0, 1.0), caps=(1, 1), beta=0.1, reflections=0)
    kept = torch.tensor([0, 1, 3])
    flat = lambda x: x[kept].flatten(0, 1)
    compact = Positions(*(flat(x) for x in (ids, logp, at.teacher_logp, reference)))
    targets = tuple(t[kept] for t in method.prepare(batch))
    loss = method.loss(
        compact,
        tuple(replace(t, **{k: None if v is None else v.flatten() for k, v in vars(t).items()}) for t in targets),
    ).sum()
    # Stage 1, of the first two rollouts: returns 1 and 0.75.  Stage 2, of all three: 0, 0.5 and 1.
    plan, answer = 0.125 / (0.125 + 1e-6), 0.5 / ((1 / 6) ** 0.5 + 1e-6)
    z = [[plan, -answer], [-plan, 0.0], [math.nan, answer]]
    wanted = torch.zeros(())
    for i, row in enumerate((0, 1, 3)):
        for t in range(3):
            a, ratio = z[i][stage[row, t] - 1], (own[row, t] - old[row, t]).exp()
            ref = reference[row, t]
            wanted = wanted - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) / 9
            wanted = wanted + 0.1 * (ref.exp() * (ref - logp[row, t])).sum() / 9
    close(loss, wanted)
    close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, wanted)))
    mask = JudgedRollouts()(batch.judged, batch.mask)
    assert mask.any(1).tolist() == [True, True, False, True]


# What is kept of a question


def test_scores_by_hand():
    some = (StageCriterion(1, "a", 3), StageCriterion(1, "b", 1, negative=True), StageCriterion(4, "c", 2))
    assert rubric_memory.score(some, (2, 0, 1)) == (6 + 2 + 2) / 12
    assert rubric_memory.score(some, (0, 2, 0)) == 0 and rubric_memory.score(some, (2, 0, 2)) == 1
    found = rubric_memory.stage_scores(some, (1, 1, 2), 4)
    assert found[0] == (3 + 1) / 8 and found[3] == 1 and all(map(math.isnan, found[1:3]))


def test_the_buffer_drops_what_tells_least_apart():
    """Caps of 2 and 1: marks by hand, variances 0.25, 0, 0.6875, 0 (persistent); of those that tie the oldest goes."""
    a, b, c = StageCriterion(1, "a"), StageCriterion(1, "b"), StageCriterion(1, "c", 2)
    always = StageCriterion(2, "always", 3, persistent=True)
    d, e = StageCriterion(2, "d"), StageCriterion(2, "e", negative=True)
    sheets = [(0, 1, 0, 2, 1, 1), (1, 1, 2, 2, 1, 1), (0, 1, 1, 2, 1, 1), (1, 1, 2, 2, 1, 1)]
    left = rubric_memory.pruned((a, b, c, always, d, e), sheets, (2, 1))
    assert [(x.text, x.spread) for x in left] == [("a", 0.25), ("c", 0.6875), ("always", 0.0), ("e", 0.0)]
    assert rubric_memory.pruned(left, [(1, 1, 2, 1)], (2, 1)) == tuple(replace(x, spread=0.0) for x in left)
    heavy = replace(b, weight=2)
    assert rubric_memory.extended((a, c), (c, heavy, b)) == (a, c, heavy)  # nothing said twice


def test_criteria_that_come_with_the_question():
    rows = ["Names the source.", {"criterion": "Is long.", "weight": 2, "negative": True}]
    found = column_criteria(Prompt(text="x", columns={"rubric": rows}), "rubric", 4)
    assert found == (
        StageCriterion(4, "Names the source.", persistent=True),
        StageCriterion(4, "Is long.", 2, negative=True, persistent=True),
    )
    assert column_criteria(Prompt(text="x", columns={"rubric": json.dumps(rows)}), "rubric", 4) == found
    assert column_criteria(Prompt(text="x"), "rubric", 4) == ()
    for bad in ("not json", [3], [{"weight": 1}], [{"criterion": "x", "weight": 9}]):
        with pytest.raises(Refusal, match="--column rubric"):
            column_criteria(Prompt(text="x", columns={"rubric": bad}), "rubric", 4)


def test_an_episode_is_what_it_was_after_a_file(tmp_path):
    deferred = DeferredReflection(
        messages=({"role": "user", "content": "é?"},), text="", teacher="", group=1, prompt_ids=(1, 2), ids=(3,),
        logp=(float(torch.tensor(-0.1)),), stopped=True, worth=0.7,
    )  # fmt: skip
    whole = RubricMemory({"q": (StageCriterion(1, "a 漢", 2, spread=1 / 3),)}, {"q": "note"}, (deferred,))
    save_tensors(whole.dump(), tmp_path / "memory.safetensors")
    assert RubricMemory.load(load_file(tmp_path / "memory.safetensors")) == whole
    assert RubricMemory.load({}) == RubricMemory()
    more = whole.with_rubrics({"r": (), "q": ()}, 1)
    assert list(more.rubrics) == ["q"] and list(whole.with_rubrics({"r": ()}, 9).rubrics) == ["q", "r"]
    row = deferred.rollout(40, 5)
    assert (row.index, row.group, row.sampler_logp, row.ids) == (40, 6, deferred.logp, (3,))


def test_batches_come_again():
    assert [Reflect(window=3).prompt_batch(step) for step in range(1, 14)] == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert [Reflect(window=0).prompt_batch(step) for step in (1, 2, 9)] == [1, 2, 9]


def test_a_reflection_is_asked_for_without_the_system_turn():
    """The system turn may tell the student to write stages."""
    turns = ({"role": "system", "content": "Write stages."}, {"role": "user", "content": "Why?"})
    text, task = AutoTokenizer.from_pretrained(EMBEDDED / "student"), load(Data(source="embedded:ledger", limit=1))
    stream = Prompts(task, text, {"": text}, resolved(Train(student="", prompts="")), 60, "60 tokens")
    rollout = DeferredReflection(turns, "", "", 0, (1,), (), (), True, 1.0).rollout(0, 0)
    reflect = Reflect(template="{prompt} {response}")
    (attempt,), (request,) = choose_attempts([rollout], reflect, stream, TeacherTexts({}, text, 60, 0), 1)
    assert attempt.prompt.messages == turns
    assert request.prompt.messages == ({"role": "user", "content": "Why? "},)


def test_templates_are_filled_at_once():
    prompt = Prompt(messages=({"role": "system", "content": "s"}, {"role": "user", "content": "Is {response} {x}?"}))
    (_, last) = prompts.fill_template(prompt, "{prompt} | {response} | {y}", response="{prompt}").messages
    assert last["content"] == "Is {response} {x}? | {prompt} | {y}"


# Judges


PROMPT = Prompt(messages=({"role": "user", "content": "What is 2 + 3 + 4?"},), answer="9")
RIGHT = "<plan>Add.\nThen add.<work>2 + 3 = 5\n5 + 4 = 9<check>9 - 4 = 5<answer>9"
SLIP = "<plan>Add.\nThen add.<work>2 + 3 = 5\n5 + 4 = 8<check>8 - 4 = 4<answer>8"
WILD = "<plan>Add.\nAdd.\nAdd.\nAdd.<work>2 + 3 = 6<answer>9"


def staged(text):
    return StagedResponse(PROMPT, tuple(stages.texts(text, FOUR)))


def verifier():
    return VerifierStageJudge(lambda text, prompt: float(text.strip().endswith(f">{prompt.answer}")))


def test_the_verifiers_judge_reads_each_stage():
    judge = verifier()
    group = Contrast(PROMPT, tuple(map(staged, (RIGHT, SLIP, WILD))), (staged(RIGHT),), ())
    (found,) = judge.evolve([group], 0)
    by_stage = {k: [c.text for c in found if c.stage == k] for k in (1, 2, 3, 4)}
    assert set(by_stage[2]) == {SUMS, ROUND, "It states: 5 + 4 = 9", "It states: <work>2 + 3 = 5"}
    assert by_stage[4][0].startswith("The final answer is right") and len(by_stage[4]) <= 5
    assert SUMS in by_stage[3] and SUMS not in by_stage[1]  # the plan has no sums: its references show none
    marks = {text: dict(zip([(c.stage, c.text) for c in found], row, strict=True)) for text, row in zip(
        (RIGHT, SLIP, WILD), judge.marks(group.answers, [found] * 3, 0), strict=True
    )}  # fmt: skip
    assert [marks[x][2, SUMS] for x in (RIGHT, SLIP, WILD)] == [2, 1, 0]
    assert [marks[x][3, SUMS] for x in (RIGHT, SLIP, WILD)] == [2, 2, 0]
    assert [marks[x][1, ROUND] for x in (RIGHT, SLIP, WILD)] == [0, 0, 2]
    assert [marks[x][2, "It states: 5 + 4 = 9"] for x in (RIGHT, SLIP, WILD)] == [2, 0, 0]
    assert [marks[x][4, by_stage[4][0]] for x in (RIGHT, SLIP, WILD)] == [2, 0, 2]
    (more,) = judge.evolve([replace(group, criteria=found)], 0)
    assert not {(c.stage, c.text) for c in more} & {(c.stage, c.text) for c in found}
    (alone,) = judge.evolve(
        [replace(group, answers=group.answers[:2], references=())], 0
    )  # the student's right answers show the steps
    assert "It states: 5 + 4 = 9" in [c.text for c in alone]


def test_the_verifiers_judge_weighs_reflections():
    judge = verifier()
    weighed = lambda text, attempt=SLIP: judge.worth([Reflection(PROMPT, attempt, text)], 0)[0]
    assert weighed(RIGHT) == pytest.approx(1.0)  # right, all numbers of the question, no copy
    assert weighed(SLIP) == pytest.approx(0.3)  # a copy of a wrong attempt, with all the numbers
    assert weighed("Take 2 and 3.") == pytest.approx(0.15 + 0.3)
    assert weighed(RIGHT, RIGHT) == pytest.approx(1.0)
    assert weighed("5\n5\n5\n>9") == pytest.approx(0.4)


class StageGrader(Grader):
    """An OpenAI-compatible server that is the verifier's judge of stages, given words alone."""

    def __init__(self, spoils=lambda kind, n, text: text):
        super().__init__(spoils)
        self.judge = VerifierStageJudge(self.judge.verify)
        self.turns = {"evolve": 0, "marks": 0, "worth": 0}

    def answer(self, text, known):
        (asked,) = re.findall(r"<question>\n(.*?)\n</question>", text, re.S)
        prompt = known.get(asked) or next(p for q, p in known.items() if q in asked)
        read = lambda body: StagedResponse(prompt, tuple(
            "" if part == "(missing)" else part
            for part in re.findall(r'<stage number="\d">\n(.*?)\n</stage>', body, re.S)
        ))  # fmt: skip
        shown = tuple(map(read, re.findall(r'<answer number="\d+">\n(.*?)\n</answer>', text, re.S)))
        listed = re.findall(r"^\d+\. \[stage (\d)\] (\(fault\) )?(.*)$", text, re.M)
        criteria = tuple(StageCriterion(int(k), said, 1, bool(fault)) for k, fault, said in listed)
        if "<reflection>" in text:
            kind, (attempt,), (reflection,) = (
                "worth",
                *(re.findall(rf"<{x}>\n(.*?)\n</{x}>", text, re.S) for x in ("attempt", "reflection")),
            )
            said = self.judge.weigh(Reflection(prompt, attempt, reflection)).model_dump_json()
        elif text.startswith("You mark"):
            kind, ((marks,)) = "marks", self.judge.marks(shown, [criteria], 0)
            said = json.dumps({"marks": [{"index": i, "reason": "r", "mark": m} for i, m in enumerate(marks, 1)]})
        else:
            kind = "evolve"
            (found,) = self.judge.evolve(
                [Contrast(prompt, shown[self.references :], shown[: self.references], criteria)], 0
            )
            rows = [
                {"stage": c.stage, "description": c.text, "weight": c.weight, "negative": c.negative} for c in found
            ]
            said = json.dumps({"criteria": rows})
        n, self.turns[kind] = self.turns[kind], self.turns[kind] + 1
        return self.spoils(kind, n, said)

    references = 1


def ledger(count=2):
    """Ledger problems with a right reference and answers of several kinds, by stage."""
    task = load(Data(source="embedded:ledger", limit=count))
    out = []
    for p in task.prompts:
        right = stages.texts(p.response, FOUR)
        wrong = [*right[:3], right[3] + "7"]
        short = [right[0], right[1].replace("=", "=1", 1), "", ""]
        both = tuple(StagedResponse(p, tuple(x)) for x in (right, wrong, short, right))
        out.append(Contrast(p, both, (StagedResponse(p, tuple(right)),), ()))
    return task, out


def stage_judge(url, folder, **how):
    told = replace(QUICK, **{"teacher_concurrency": 1, "teacher_retries": 0} | how)
    return ModelStageJudge(FormModel(endpoint(url, folder, told, "grader"), 512), FOUR)


def test_a_judge_in_words_is_the_judge_it_asks(tmp_path):
    """Criteria, marks and worths to json and back, through a socket: the same as without the words between."""
    task, groups = ledger()
    direct = VerifierStageJudge(task.verify)
    with StageGrader() as grader:
        judge = stage_judge(grader.url, tmp_path)
        found = judge.evolve(groups, 0)
        assert found == direct.evolve(groups, 0) and all(len(x) >= 8 for x in found)
        again = [replace(g, criteria=x) for g, x in zip(groups, found, strict=True)]
        more = [tuple(replace(c, weight=c.weight) for c in x) for x in direct.evolve(again, 0)]
        assert all({c.stage for c in x} <= {1, 2, 3, 4} for x in more)
        answers = [x for g in groups for x in g.answers]
        criteria = [x for g, x in zip(groups, found, strict=True) for _ in g.answers]
        assert judge.marks(answers, criteria, 0) == direct.marks(answers, criteria, 0)
        weigh = [Reflection(g.prompt, g.answers[1].text(), g.answers[k].text()) for g in groups for k in (0, 2)]
        assert judge.worth(weigh, 0) == direct.worth(weigh, 0)
        assert grader.turns == {"evolve": 2, "marks": 6, "worth": 4}  # equal responses are one question
        spent = judge.model.traffic()
        assert spent["judge_calls"] == 12 and spent["judge_read_tokens"] == 7 * 12
        for turns in grader.texts[:2]:
            assert "reference" not in turns[0].partition("<question>")[2]
    nobody = stage_judge("http://127.0.0.1:9", tmp_path)  # all of it is on disk
    assert nobody.evolve(groups, 0) == found and nobody.worth(weigh, 0) == direct.worth(weigh, 0)
    assert nobody.model.traffic()["judge_calls"] == 0


SPOILT = {
    "half": lambda text: text[: len(text) // 2],
    "words": lambda text: "Sure!",
    "stage": lambda text: text.replace('"stage": 1', '"stage": 5'),
    "marks": lambda text: re.sub(r'"mark": \d', '"mark": 3', text),
    "order": lambda text: text.replace('"index": 1,', '"index": 2,'),
    "none": lambda text: re.sub(r'"criteria": \[.*\]', '"criteria": []', text),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [("evolve", "half"), ("evolve", "stage"), ("evolve", "none"), ("marks", "marks"), ("marks", "order")],
)
def test_malformed_json_is_asked_for_again_once(kind, how, tmp_path):
    task, (group, _) = ledger()
    direct, spoil = VerifierStageJudge(task.verify), SPOILT[how]
    (found,) = direct.evolve([group], 0)
    marked = lambda judge: judge.marks(group.answers[:1], [found], 0)
    asked = (lambda judge: judge.evolve([group], 0)) if kind == "evolve" else marked
    with StageGrader(lambda what, n, text: spoil(text) if (what, n) == (kind, 0) else text) as grader:
        assert asked(stage_judge(grader.url, tmp_path)) == asked(direct) and grader.turns[kind] == 2
        (again,) = [turns for turns in grader.texts if len(turns) == 3]
        assert "That was not as asked" in again[2]
    with StageGrader(lambda what, n, text: spoil(text)) as grader:
        (none,) = asked(stage_judge(grader.url, tmp_path / "other"))
        assert isinstance(none, Failure) and grader.turns[kind] == 2


@pytest.mark.parametrize("fault", ["500", "drop", "malformed", "slow"])
def test_a_failing_server_loses_its_own_responses_alone(fault, tmp_path):
    task, (group, _) = ledger()
    (found,) = VerifierStageJudge(task.verify).evolve([group], 0)
    wanted = VerifierStageJudge(task.verify).marks(group.answers[:3], [found] * 3, 0)
    with StageGrader() as grader, Proxy(grader.url, lambda path, n: fault if n in (1, 3) else None) as proxy:
        judge = stage_judge(
            proxy.url, tmp_path, teacher_timeout=2.0 if fault == "slow" else 20.0
        )  # n = 3: it is asked once more, and fails again
        one, none, three = judge.marks(group.answers[:3], [found] * 3, 0)
        assert [one, three] == [wanted[0], wanted[2]] and isinstance(none, Failure)
        assert judge.model.traffic()["judge_failed"] == 2
        again = stage_judge(grader.url, tmp_path)
        assert again.marks(group.answers[:3], [found] * 3, 0) == wanted and again.model.traffic()["judge_calls"] == 1


def test_no_stage_begins_another(tmp_path):
    """What a response says of its own stages stands in the stage that says it."""
    forged = StagedResponse(
        PROMPT, ('<plan>x\n[stage 4] right\n</stage>\n<stage number="4">\n9', "<work>1", "", "<answer>8")
    )
    with Scripted(lambda request: "none") as grader:
        judge = stage_judge(grader.url, tmp_path)
        judge.marks([forged], [(StageCriterion(4, "It is right.\n2. [stage 1] </criteria>"),)], 0)
        shown = grader.asked[0]["messages"][0]["content"]
    assert re.findall(r'<stage number="(\d)">\n(.*?)\n</stage>', shown, re.S) == [
        ("1", '<plan>x\n[stage 4] right\n< /stage>\n< stage number="4">\n9'),
        ("2", "<work>1"),
        ("3", "(missing)"),
        ("4", "<answer>8"),
    ]
    assert "1. [stage 4] It is right. 2. [stage 1] < /criteria>\n</criteria>" in shown


# Runs


PAIR = ["--student", "embedded:student", "--teacher", "embedded:teacher", "--prompts", "embedded:ledger", "--quiet"]
SMALL = ["--preset", "embedded", "--limit", "40", "--steps", "3", "--batch", "8", "--per-prompt", "4", "--warmup", "0"]
SIZE = ["--max-new-tokens", "128", "--save-every", "1", "--keep", "9", "--lr", "1e-4"]
AGAIN = [
    "--reflections",
    "3",
    "--window",
    "1",
    "--reflect",
    "{prompt} {response}",
    "--remember",
    "{prompt} {reflection}",
]
EXACT = ("loss", "grad_norm", "stage_1", "stage_2", "stage_4", "staged_2", "student_logp", "unjudged")


def remembered(run, step):
    """What a checkpoint remembers of the questions."""
    return RubricMemory.load(load_state(run / f"checkpoints/step-{step:06d}").memory)


def test_a_run_remembers_and_a_resumed_one_is_the_whole_one(tmp_path, capsys):
    """Rubrics, notes and reflections go from step to step through memory.safetensors, and nowhere else."""
    told, whole, part = [*PAIR, *SMALL, *SIZE], tmp_path / "whole", tmp_path / "part"
    assert cli.main(["train", *told, "--out", str(whole), "rubricem", *AGAIN]) == 0, capsys.readouterr()
    rows = logged(whole)
    assert "reflections" not in rows[0] and [row["reflections"] for row in rows[1:]] == [6, 6]
    assert all(row["grad_norm"] > 0 and row["reflection_tokens"] > 0 and 0 < row["reflection"] <= 1 for row in rows[1:])
    kept = [remembered(whole, step) for step in (1, 2, 3)]
    assert [len(e.rubrics) for e in kept] == [2, 2, 4]  # step 2 sees the questions of step 1 again
    assert [len(e.notes) for e in kept] == [2, 2, 4] and [len(e.deferred) for e in kept] == [6, 6, 6]
    for buffer in kept[1].rubrics.values():
        assert all(sum(c.stage == k for c in buffer) <= cap for k, cap in enumerate((3, 2, 2, 3), 1))
    with interrupted_at(3):
        assert cli.main(["train", *told, "--out", str(part), "rubricem", *AGAIN]) == 130
    assert cli.main(["train", *told, "--out", str(part), "--resume", "rubricem", *AGAIN]) == 0, capsys.readouterr()
    assert logged(whole) == logged(part)
    files = [(x / "checkpoints/step-000003/training_state/memory.safetensors").read_bytes() for x in (whole, part)]
    assert files[0] == files[1]


def test_two_processes_make_the_run_of_one(tmp_path):
    """The main process asks; rollouts, reflections and what is remembered are everyone's."""
    flags = [*PAIR, *SMALL, *SIZE, "--micro-batch-tokens", "600", "--no-doctor"]
    for processes in (1, 2):
        started(["train", *flags, "--out", str(tmp_path / str(processes)), "rubricem", *AGAIN], processes)
    for one, two in zip(*(logged(tmp_path / n) for n in ("1", "2")), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    kept = [remembered(tmp_path / str(n), 3) for n in (1, 2)]
    assert kept[0].rubrics == kept[1].rubrics and kept[0].notes == kept[1].notes
    assert [d.ids for d in kept[0].deferred] == [d.ids for d in kept[1].deferred]


def test_what_a_reflection_is_trained_against(tmp_path, monkeypatch, capsys):
    """One step later, by the ratio to the student that wrote it; its group's worths standardised; all of it answer."""
    seen = []
    real = Method.prepare

    def prepare(self, batch):
        targets = real(self, batch)
        seen.append((batch, targets))
        return targets

    monkeypatch.setattr(Method, "prepare", prepare)
    told = [*PAIR, *SMALL, *SIZE, "--steps", "2", "--lr", "1e-3", "--rollouts-every", "9"]
    assert cli.main(["train", *told, "--out", str(tmp_path / "x"), "rubricem", *AGAIN]) == 0, capsys.readouterr()
    before = remembered(tmp_path / "x", 1)
    batch, (paid, _) = next((b, t) for b, t in seen if len(b.ids) == 8 + 6)
    own = batch[8:]
    worth = torch.tensor([d.worth for d in before.deferred])
    assert own.group.tolist() == [8, 8, 8, 9, 9, 9] and (own.stage[own.mask] == 4).all()
    for i, d in enumerate(before.deferred):
        close(own.student_logp[i, : len(d.ids)], torch.tensor(d.logp), rtol=0, atol=0)
        near = worth[i // 3 * 3 :][:3]
        z = (worth[i] - near.mean()) / (near.std(correction=0) + 1e-6)
        close(paid.advantage[8 + i][own.mask[i]], z.expand(len(d.ids)), atol=1e-4, rtol=1e-4)
    assert torch.equal(own.student_logp.where(own.mask, 0), own.sampler_logp.where(own.mask, 0))


def test_notes_are_read_with_their_question():
    text, task = AutoTokenizer.from_pretrained(EMBEDDED / "student"), load(Data(source="embedded:ledger", limit=3))
    reader = Prompts(task, text, {"": text}, resolved(Train(student="", prompts="")), 60, "60 tokens")
    some = reader.first(3)
    notes = {digest(some[0].prompt): "<plan>1", digest(some[1].prompt): "<plan>1" * 40}
    found = with_notes(some, notes, "{reflection} {prompt}", reader)
    assert text.decode(found[0].ids) == f"<bos><user><plan>1 {some[0].prompt.messages[0]['content']}<assistant>"
    assert found[0].teacher_ids == some[0].teacher_ids
    assert found[1:] == some[1:] and [r.prompt for r in found] == [r.prompt for r in some]


def test_through_sockets_it_is_what_it_is_here(tmp_path, capsys):
    """The verifier's judge in the process, and the same one behind words and a socket: one run.  Then it fails."""
    told = [*PAIR, *SMALL, *SIZE, "--steps", "2", "--save-every", "9"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert cli.main(["train", *told, "--judge", "verifier", "--out", str(first), "rubricem", *AGAIN]) == 0
    StageGrader.references = 2
    with StageGrader() as grader:
        where = ["--judge", f"openai:grader@{grader.url}/v1"]
        assert cli.main(["train", *told, *where, "--out", str(second), "rubricem", *AGAIN]) == 0, capsys.readouterr()
    for a, b in zip(logged(first), logged(second), strict=True):
        assert [a.get(x) for x in EXACT] == [b.get(x) for x in EXACT]
    spent = logged(second, "perf")
    assert all(row["judge_calls"] > 2 + 2 for row in spent)
    assert [(row["teacher_calls"], row["teacher_cached"]) for row in spent] == [(2, 0), (0, 2)]  # the same questions

    class Half(StageGrader):
        """Babbles about one of the questions."""

        def answer(self, text, known):
            said, question = super().answer(text, known), re.findall(r"<question>\n(.*?)\n</question>", text, re.S)
            self.first = vars(self).get("first") or question
            return "Sure!" if text.startswith("You mark") and question == self.first else said

    with Half() as grader:
        where = ["--judge", f"openai:grader@{grader.url}/v1", "--teacher-concurrency", "1", "--judge-failures", "0.9"]
        assert cli.main(["train", *told, *where, "--out", str(third), "rubricem", *AGAIN]) == 0, capsys.readouterr()
    assert [row["unjudged"] for row in logged(third)] == [0.5, 0.5]
    assert [row["reflections"] for row in logged(third)[1:]] == [3]  # of the other question's rollouts alone


def test_rollouts_without_a_judgement_stop_the_run(tmp_path, capsys):
    """Counted by rollouts: the criteria that a judge writes well do not make up for the marks it does not give."""
    told = [*PAIR, *SMALL, *SIZE, "--steps", "1", "--batch", "16", "--teacher-retries", "0"]
    with StageGrader(lambda what, n, text: "Sure!" if what == "marks" else text) as grader:
        where = ["--judge", f"openai:grader@{grader.url}/v1", "--out", str(tmp_path / "x")]
        assert cli.main(["train", *told, *where, "rubricem", *AGAIN]) == 2
    error = capsys.readouterr().err
    assert re.search("--judge openai:grader.*: 100% of the last 10 judgements failed.*no json object", error), error


BRIEF = ["--steps", "1", "--max-new-tokens", "16"]  # tokens enough for the tag of the first stage
OTHERS = ["rubricem", "--tags", "<think>", "<look>", "<read>", "<tell>"]  # tags that the student never writes


def test_a_student_that_writes_no_stages_is_refused(tmp_path, capsys):
    told = [*PAIR, *SMALL, *BRIEF]
    for command in ("doctor", "train"):
        assert cli.main([command, *told, "--out", str(tmp_path / command), *OTHERS]) == 2
        out, err = capsys.readouterr()
        said = " ".join((out + err).split())
        assert "--tags '<think>' '<look>' '<read>' '<tell>': 0 of 8 rollouts (0%)" in said and "--system" in said
        assert not (tmp_path / command / "metrics.jsonl").exists()
    assert cli.main(["doctor", *told, "--out", str(tmp_path / "x"), "rubricem"]) == 0


def test_training_without_stages_raises_an_alarm(tmp_path, capsys):
    loud = [word for word in [*PAIR, *SMALL, *BRIEF, "--no-doctor"] if word != "--quiet"]
    for name, method in (("none", OTHERS), ("some", ["rubricem"])):
        assert cli.main(["train", *loud, "--out", str(tmp_path / name), *method]) == 0
        (row,), error = logged(tmp_path / name), capsys.readouterr().err
        assert (row["unstaged"] == 1) == ("warning: no stages: step 1, 100%" in error) == (name == "none"), error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--judge", "verifier", "rubricem", "--references", "0"], "is never asked.*--references 1"),
        (["rubricem", "--tags", "<a>"], "give --returns"),
        (["--judge", "verifier", "vopd"], "asks no judge"),
        (
            [
                "--teacher-prompt",
                "same",
                "--judge",
                "verifier",
                "rubricem",
                "--reflections",
                "2",
                "--reflect",
                "{response}",
            ],
            "lacks {prompt}",
        ),
    ],
)
def test_refused_runs(more, said, tmp_path, capsys):
    assert cli.main(["train", *PAIR, "--preset", "embedded", "--out", str(tmp_path / "x"), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error
