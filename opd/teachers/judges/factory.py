"""Opens the annotator of a method's question, with its teachers and its judge."""

from collections.abc import Callable, Mapping

from opd.config.model_names import ModelName, Verifier
from opd.config.plan import Plan
from opd.core.errors import Refusal
from opd.data.prompt_stream import Prompts
from opd.methods.questions import Continue, Grade, Stages
from opd.teachers.base import BaseTeacher
from opd.teachers.judges.annotator import Annotator, TeacherTexts
from opd.teachers.judges.chunk_annotator import ChunkAnnotator
from opd.teachers.text.text_models import import_extra
from opd.teachers.text.text_teacher import FailureLimit, TextTeacher


def open_annotator(
    plan: Plan,
    prompt_stream: Prompts,
    teachers: Mapping[str, BaseTeacher],
    open_judge: Callable[[ModelName], TextTeacher],
    *,
    main: bool,
) -> Annotator:
    """Return the annotator of the method's question.  `open_judge` opens a judge that is no teacher of the run."""
    config, question = plan.config, plan.method.asks
    if question is None:
        return Annotator(prompt_stream)
    text_teachers = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, TextTeacher)}
    texts = TeacherTexts(
        text_teachers,
        prompt_stream.tokenizer,
        config.sampling.max_new_tokens,
        config.seed,
        main=main,
        think_end=config.data.think_end,
    )
    if isinstance(question, Continue):
        return ChunkAnnotator(prompt_stream, question, texts)

    import_extra("pydantic", f"{question}")  # an optional dependency, which the modules of the judges import
    from opd.teachers.judges import rubric_judge as rubrics
    from opd.teachers.judges import stage_judge as stages
    from opd.teachers.judges.judge_prompts import read_prompts
    from opd.teachers.judges.judge_requests import FormModel
    from opd.teachers.judges.rubric_annotator import RubricAnnotator
    from opd.teachers.judges.stage_annotator import StageAnnotator
    from opd.teachers.judges.verifier_judge import VerifierJudge, VerifierStageJudge

    task, remote, model = prompt_stream.task, config.remote, None
    if remote.judge_prompts and isinstance(plan.judge, Verifier):
        raise Refusal(f"--judge-prompts {remote.judge_prompts}: --judge verifier reads no prompts; leave it out")
    if not isinstance(plan.judge, Verifier):
        embedded = rubrics.PROMPTS if isinstance(question, Grade) else stages.PROMPTS
        own_prompts = read_prompts(remote.judge_prompts, embedded) if remote.judge_prompts else {}
        judge_model = open_judge(plan.judge) if plan.judge else text_teachers[""]
        model = FormModel(judge_model, remote.judge_tokens, schemas=remote.judge_schema, prompts=own_prompts)
    elif not task.scored:
        raise Refusal(f"--judge verifier: nothing scores responses to {task.name}; name a model, or a --verifier")
    traffic = model.traffic if model and plan.judge else dict  # a judge that is also the teacher is counted there
    failure_limit = FailureLimit(f"judge {plan.judge or plan.teachers['']}", remote.judge_failures, "judgements")
    match question:
        case Grade():
            judge = rubrics.ModelJudge(model) if model else VerifierJudge(task.verify)
            return RubricAnnotator(prompt_stream, question, texts, judge, failure_limit, traffic=traffic)
        case Stages():
            stage_judge = stages.ModelStageJudge(model, question.tags) if model else VerifierStageJudge(task.verify)
            return StageAnnotator(prompt_stream, question, texts, stage_judge, failure_limit, traffic=traffic)
    raise AssertionError(f"no annotator for {question}")
