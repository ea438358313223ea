"""Access to the servers of teachers and judges: keys, retries and time limits, `Remote`."""

import os
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from opd.config.model_names import ModelName
from opd.core.errors import Refusal, positive


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Settings of server teachers, text-only teachers and judges."""

    teacher_token_env: str = "OPD_TOKEN"
    """Environment variable that holds the token or API key of --teacher's host.  If it is unset, no token is sent."""
    route_token_env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Environment variable that holds the key of a --route's host, as NAME=VARIABLE.  Repeat for more routes.  Default:
    --teacher's key where the host is the same, else no key."""
    judge_token_env: str = ""
    """Environment variable that holds the key of --judge's host.  Empty: --teacher's key where the host is the same,
    else no key."""
    teacher_timeout: float = 300.0
    """Seconds after which a request to a server teacher, a text-only teacher or a judge counts as failed."""
    teacher_retries: int = 8
    """Retries of a failed request.  The waits are 0.5, 1, 2, ... 30 s, with jitter.  For text-only teachers and judges,
    OpenAI's client chooses the waits: at most 8 s, or what Retry-After says."""
    teacher_concurrency: int = 8
    """Requests in flight at once to a server teacher, a text-only teacher or a judge."""
    teacher_tokenizer: str = ""
    """Tokenizer of a server other than `opd serve`.  Hub id or folder.  Empty: the student's tokenizer."""
    teacher_local: str = ""
    """Local copy of the model behind --teacher.  Its log-probs are compared with the server's before the first step."""
    teacher_prefix: Literal["continue", "ask"] = "continue"
    """Way in which a text-only teacher (openai:) continues a partial response.  continue: by continue_final_message,
    which vLLM and `opd serve` support.  ask: by an instruction in the conversation, for any other endpoint."""
    teacher_cache: str = ""
    """Folder that caches the answers of text-only teachers and judges.  Several runs may share it.  Empty: the run
    folder."""
    judge_tokens: int = 4096
    """Longest answer of a judge, in tokens."""
    judge_schema: bool = False
    """Constrain a judge's answer to the JSON schema of its form.  Works with vLLM, SGLang, OpenAI, `opd serve` and
    local models.  Leave it off for a judge that reasons in its answer, because the schema leaves no room for that."""
    judge_prompts: str = ""
    """Folder with prompts of the judge that replace the embedded ones: rubric.txt and grade.txt for ropd; evolve.txt,
    mark.txt and weigh.txt for rubricem."""
    judge_failures: float = 0.4
    """Largest share of failures, in [0, 1], above which the run stops.  It applies to the last questions to a text-only
    teacher or judge, and to the last groups or rollouts that need a judgement."""

    def check(self) -> None:
        """Raise Refusal for invalid settings."""
        positive(self, "teacher_timeout", "teacher_concurrency", "judge_tokens")
        if self.teacher_retries < 0:
            raise Refusal(f"--teacher-retries {self.teacher_retries}: must be 0 or more")
        if not 0 <= self.judge_failures <= 1:
            raise Refusal(f"--judge-failures {self.judge_failures}: a share lies in [0, 1]")

    def towards(self, field: str, model: ModelName, teacher: ModelName | None) -> "Remote":
        """Return these settings with the key for the model of flag `field`.

        `field` is "teacher", "judge" or "route NAME".  The key of --teacher is sent only to the host of --teacher.
        """
        named = {f"route {name}": variable for name, _, variable in (x.partition("=") for x in self.route_token_env)}
        named |= {"judge": self.judge_token_env}
        own = self.teacher_token_env if teacher is not None and model.host() == teacher.host() else ""
        return replace(self, teacher_token_env=named.get(field, "") or own)

    def keep(self, field: str) -> str:
        """Return a hint for error messages: which variable should hold the key for the model of flag `field`."""
        kind, _, name = field.partition(" ")
        flag = f"--{kind}-token-env {name}=VARIABLE" if name else f"--{kind}-token-env VARIABLE"
        known = self.teacher_token_env
        return f"{known}, or name another variable by {flag}" if known else f"a variable, and name it by {flag}"


def secret(variable: str) -> str:
    """Return the token in an environment variable, stripped of white space; empty if the variable is unset.

    Raises Refusal for a token that no HTTP header can hold.  The message does not show the token.
    """
    token = os.environ.get(variable, "").strip() if variable else ""
    if not (token.isascii() and token.isprintable()):
        raise Refusal(f"{variable}: its token holds a line break, or another sign that no header can: export it anew")
    return token
