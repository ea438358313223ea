"""The request bodies: fields and defaults of vLLM's OpenAI-compatible protocol (0.33), as far as they are supported.

A field that is not supported is rejected by name.  If it were ignored, `logit_bias` for example would give wrong
numbers.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

Id = Annotated[StrictInt, Field(ge=0)]
Ids = Annotated[list[Id], Field(min_length=1)]


class RequestBody(BaseModel):
    """A request body that rejects unknown fields, and numbers too large for a float (1e400)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SamplingFields(RequestBody):
    """The sampling parameters of vLLM and OpenAI."""

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[Id] | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: Literal[False] | None = None
    user: str | None = None


class Completion(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: Ids | Annotated[list[Ids], Field(min_length=1)] | str | Annotated[list[str], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True


class TextPart(RequestBody):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]

    def text(self) -> str:
        """Return the content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Schema(RequestBody):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, object], Field(alias="schema")]
    strict: bool | None = None


class Format(RequestBody):
    """The response format: only json_schema is supported."""

    type: Literal["json_schema"]
    json_schema: Schema


class Chat(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = {}
    response_format: Format | None = None

    @model_validator(mode="after")
    def check_continuation(self) -> "Chat":
        """Check that the request either opens an answer or continues a partial one."""
        if self.add_generation_prompt == self.continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message: one of them must be true, not both")
        if self.continue_final_message and (len(self.messages) < 2 or self.messages[-1].role != "assistant"):
            raise ValueError("continue_final_message: the last message must be the assistant's, after another")
        return self


class ScoringParameters(RequestBody):
    """The sampling parameters of vLLM's fixed-token scoring."""

    max_tokens: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    prompt_logprob_token_ids: Annotated[list[list[Annotated[StrictInt, Field(ge=-1)]]], Field(min_length=1)]
    prompt_logprob_start: int = Field(0, ge=0)
    detokenize: Literal[False] = False


class DrawingParameters(RequestBody):
    """The sampling parameters of rollouts: token ids in, token ids out."""

    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: Annotated[StrictInt, Field(ge=0, lt=2**53)]
    max_tokens: int = Field(ge=1)
    stop_token_ids: Ids
    ignore_eos: Literal[True]
    detokenize: Literal[False]
    logprobs: int = Field(ge=0)
    logprob_token_ids: Ids | None = None


class Generate(RequestBody):
    """The body of POST /inference/v1/generate, which only scores chosen tokens, or generates rollouts."""

    model: str | None = None
    token_ids: Ids
    sampling_params: ScoringParameters | DrawingParameters


class Files(RequestBody):
    """Weights under their checkpoint names, in files that this machine can read."""

    files: Annotated[list[str], Field(min_length=1)]


class NewWeights(RequestBody):
    """The body of POST /update_weights."""

    update_info: Files


class Version(RequestBody):
    """The body of POST /update_weight_version."""

    new_version: str = Field(max_length=200)  # it is in the answer to every rollout


class HiddenRow(RequestBody):
    """A sequence, and the ascending positions of the tokens whose predicting hidden states are requested."""

    ids: Ids
    at: list[Annotated[StrictInt, Field(ge=1)]]


class HiddenRows(RequestBody):
    """The body of POST /opd/hidden."""

    rows: Annotated[list[HiddenRow], Field(min_length=1)]
