"""Rendering of prompts for a model: `render(tokenizer, prompt, ...)` returns token ids, `stop_ids` its stop tokens."""

import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core import json_text
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.verifiers import sandbox

# Chat templates that write the date get this one, that of Llama 3.1's template, so that a resumed run renders the
# prompts of the first run.
DATE = datetime(2024, 7, 26)
TRIED_CHARACTERS = 10_000  # of a turn, as a template is tried: a long prompt is no fault of the template
_TRIED: set[str] = set()  # chat templates that stay within the limits of time and memory


@dataclass(frozen=True)
class Rendered:
    """A prompt with its token ids for the student and for the teacher."""

    prompt: Prompt
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher: str = ""  # name of the teacher that scores the responses: a --route, or "" for --teacher


def stop_ids(eos: object, tokenizer: Tokenizer, fallback: object = None) -> tuple[int, ...]:
    """Return stop ids: `eos` of the generation config, else the tokenizer's EOS, else `fallback`; at least one."""
    own = tokenizer.eos_token_id if "eos_token" in tokenizer.special_tokens_map else None
    ids = next((ids for value in (eos, own, fallback) if (ids := _ids(value, tokenizer))), ())
    if not ids:
        raise Refusal(
            f"eos_token_id: {model_name(tokenizer)} has none, in its generation config or its tokenizer, so it would "
            "never stop: set eos_token_id in generation_config.json, or eos_token in tokenizer_config.json"
        )
    return tuple(sorted(set(ids)))


def _ids(eos: object, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids in a value of eos_token_id.  Raises Refusal unless it is an id, a list of ids, or nothing."""
    ids = [] if eos is None else eos if isinstance(eos, list | tuple) else [eos]
    if not all(type(i) is int for i in ids):
        raise Refusal(
            f"eos_token_id {short(eos)}: {model_name(tokenizer)} has no token ids there; write a number, or a list of "
            "numbers, into its generation_config.json"
        )
    tokens = set(tokenizer.get_vocab().values())
    if ids and not tokens.intersection(ids):
        raise Refusal(
            f"eos_token_id {short(eos)}: no token of {model_name(tokenizer)}, so it would never stop; correct it in "
            "generation_config.json"
        )
    return tuple(ids)


def render(tokenizer: Tokenizer, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a prompt's token ids for a model, up to where its response begins; at most a single BOS, no closing EOS.

    Messages go through the model's chat template.  Without a template, their contents are joined by blank lines.  A
    prompt without messages is used as plain text.  Raises Refusal for an empty prompt or unused template arguments.
    """
    if prompt.messages:
        turns, tools = _turns(prompt.messages), _tools(prompt)
        template = tokenizer.chat_template
        text = _template_text(tokenizer, turns, tools, chat_template_kwargs) if template else ""
        _check_unread(tokenizer, turns, tools, text, chat_template_kwargs)
        if template:
            return _token_ids(tokenizer, text, add_special=False)
        text = "\n\n".join(turn["content"] for turn in turns)
    else:
        text = prompt.text
    if chat_template_kwargs:
        reason = f"{model_name(tokenizer)} has no template" if prompt.messages else "a plain-text row uses none"
        raise Refusal(f"--template-args {short(dict(chat_template_kwargs))}: has no effect: {reason}; drop it")
    return _token_ids(tokenizer, text, add_special=True)


def fill_template(prompt: Prompt, template: str, **parts: str) -> Prompt:
    """Return the prompt with its last turn inserted into a template as {prompt}, beside other parts by name."""

    def fill(question: str) -> str:
        values_by_name = {"prompt": question, **parts}
        names = "|".join(map(re.escape, values_by_name))
        # Replace all parts in a single pass, because a part may itself contain text such as {context}.
        return re.sub(rf"\{{({names})\}}", lambda match: values_by_name[match[1]], template)

    if not prompt.messages:
        return replace(prompt, text=fill(prompt.text))
    *earlier_turns, last = prompt.messages
    return replace(prompt, messages=(*earlier_turns, {**last, "content": fill(last["content"])}))


def prefilled_ids(
    tokenizer: Tokenizer, prompt: Prompt, text: str, chat_template_kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return a prompt's token ids followed by the beginning of its response, for a model to continue."""
    ids = render(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs)
    return (*ids, *tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ids


def continuation_text(tokenizer: Tokenizer, context_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that `ids` add behind `context_ids`; decoded without context, many tokens lose their space."""
    decode = lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    last_context_ids = list(context_ids)[-8:]
    text, context = decode([*last_context_ids, *ids]), decode(last_context_ids)
    return text[len(context) :] if text.startswith(context) else decode(ids)


def decodes_to_itself(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether text survives tokenizing and decoding; else verifiers and judges read another text."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def loses_text(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether tokenizing and decoding changes more of a text than its blanks and its Unicode composition."""
    bare = lambda x: "".join(unicodedata.normalize("NFKC", x).split())
    return bare(str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))) != bare(text)


def parse_template_arguments(text: str) -> Mapping[str, Any]:
    """Parse the JSON object of --template-args.  Raises Refusal if the text is not a JSON object."""
    try:
        arguments = json_text.parse(text or "{}")
    except ValueError as error:
        raise Refusal(f"--template-args {text}: not json ({error}); write '{{\"enable_thinking\": false}}'") from error
    if not isinstance(arguments, dict):
        raise Refusal(f"--template-args {text}: must be a json object such as '{{\"enable_thinking\": false}}'")
    return arguments


def used_arguments(tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments that the model's chat template reads."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return {name: value for name, value in arguments.items() if re.search(rf"\b{re.escape(name)}\b", template)}


def _turns(messages: tuple[Mapping[str, Any], ...]) -> list[dict[str, Any]]:
    """Return the chat turns as dicts, in the form that chat templates read: arguments of tool calls are mappings.

    Raises Refusal for malformed turns and for a closing assistant turn.
    """
    for i, turn in enumerate(messages):
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise Refusal(f"messages[{i}]: {short(dict(turn))} needs a `role` and a `content`, both text")
    if messages[-1]["role"] == "assistant":
        raise Refusal(
            "messages: the last turn is the assistant's, which shows the model an answer instead of asking for one: "
            "take that turn off (keep it in the `response` column if a method needs it)"
        )
    return [
        {**turn, "tool_calls": list(map(_tool_call, turn["tool_calls"]))} if turn.get("tool_calls") else dict(turn)
        for turn in messages
    ]


def _tool_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool call whose arguments are a mapping; APIs write them as JSON text, which a template would quote."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        function = {**function, "arguments": json_text.parse(function["arguments"])}
    except ValueError:
        return call
    return {**call, "function": function} if "function" in call else function


def _tools(prompt: Prompt) -> list[Any]:
    """Return the tool descriptions in a row's column `tools`, a list of mappings or its JSON text; [] for others."""
    tools = prompt.columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json_text.parse(tools)
        except ValueError:
            return []
    return tools if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools) else []


def _check_unread(
    tokenizer: Tokenizer, turns: list[dict[str, Any]], tools: list[Any], text: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse tool calls that do not appear in the rendered text, and warn of other content that does not.

    A key does not appear if the text is the same without it.
    """
    keys = dict.fromkeys(key for turn in turns for key, value in turn.items() if value not in (None, "", [], {}))
    reader = f"{'the chat template of ' if tokenizer.chat_template else ''}{model_name(tokenizer)}"
    for name in [*(key for key in keys if key not in ("role", "content")), *["tools"] * bool(tools)]:
        try:
            other_turns = [{key: value for key, value in turn.items() if key != name} for turn in turns]
            other_tools = [] if name == "tools" else tools
            if tokenizer.chat_template and text != _template_text(tokenizer, other_turns, other_tools, arguments):
                continue
        except Refusal:  # the template needs the key
            continue
        if name == "tool_calls":
            raise Refusal(
                f"messages: turns have tool_calls, which {reader} does not read, so the calls would be missing: use a "
                "model whose chat template reads them, or remove these rows"
            )
        where = "the column tools" if name == "tools" else f"{name} of chat turns"
        warnings.warn(f"{where} is not used: {reader} does not read it", stacklevel=2)


def _template_text(
    tokenizer: Tokenizer, turns: list[dict[str, Any]], tools: list[Any], chat_template_kwargs: Mapping[str, Any]
) -> str:
    """Apply the chat template to the conversation and return the text, up to where the response begins."""
    # Render to text first: the return type of tokenize=True changed between versions, and a BOS in the template must
    # not be doubled.
    arguments = {"tools": tools or None, **chat_template_kwargs}
    try:
        template = _dated(tokenizer.get_chat_template(tools=arguments["tools"]))
        _check_limits(tokenizer, template, turns, arguments)
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
        )
    except Refusal:
        raise
    except Exception as error:  # a template is a program by the model's author and may raise any exception
        roles = ", ".join(turn["role"] for turn in turns)
        raise Refusal(
            f"messages: the chat template of {model_name(tokenizer)} refuses turns ({roles}): {type(error).__name__}: "
            f"{' '.join(str(error).split())}: change the turns (a template without system turns wants that text in the "
            "user's), or set another chat_template"
        ) from error
    used = used_arguments(tokenizer, chat_template_kwargs)
    if unread := [name for name in chat_template_kwargs if name not in used]:
        raise Refusal(
            f"--template-args {', '.join(unread)}: the template of {model_name(tokenizer)} never reads it, so "
            "it would be ignored: correct the name, or give it only to the model that knows it"
        )
    return str(text)


def _check_limits(
    tokenizer: Tokenizer, template: str, turns: list[dict[str, Any]], arguments: Mapping[str, Any]
) -> None:
    """Refuse a chat template that needs too much time or memory; a child process tries each template once."""
    if template in _TRIED:
        return
    common = {**tokenizer.special_tokens_map, **arguments, "add_generation_prompt": True}
    question = {"role": "user", "content": "What is 2 + 3?"}
    asked = [turn | {"content": turn["content"][:TRIED_CHARACTERS]} for turn in turns]
    conversations = (asked, [question], [question, {"role": "assistant", "content": "5"}, question])
    if not sandbox.score("template", template, [common | {"messages": messages} for messages in conversations]):
        raise Refusal(
            f"messages: the chat template of {model_name(tokenizer)} takes more than {sandbox.CPU_LIMIT:g} s or "
            f"{sandbox.TEMPLATE_MEMORY >> 20} MB for a conversation: it is broken, or meant to do harm: set another "
            "chat_template"
        )
    _TRIED.add(template)


def _dated(template: str) -> str:
    """Return a chat template that writes DATE in place of today's date; warn if a call of strftime_now is left."""
    dated = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(DATE.strftime(call[2])), template)
    if "strftime_now(" in dated:
        warnings.warn("the chat template writes today's date: a run resumed on another day differs", stacklevel=2)
    return dated


def _token_ids(tokenizer: Tokenizer, text: str, *, add_special: bool) -> tuple[int, ...]:
    """Tokenize a text; with `add_special`, the tokenizer adds its leading special tokens."""
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=True)["input_ids"] if add_special else list(text_ids)
    if not text_ids:
        raise Refusal("prompt: neither messages nor text that gives a token: name the column of the question")
    named = tokenizer.special_tokens_map
    if "eos_token" in named and ids[-1 - len(text_ids) :] == [*text_ids, tokenizer.eos_token_id]:
        ids = ids[:-1]  # remove the EOS that the tokenizer appended: a prompt must not end the text
    while "bos_token" in named and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]  # remove the second BOS: the text and the tokenizer each added a BOS
    return tuple(ids)


def model_name(tokenizer: Tokenizer) -> str:
    """Return the model's name for messages."""
    return tokenizer.name_or_path or "this model"


def short(value: object) -> str:
    """Return the repr of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest(prompt: Prompt) -> str:
    """Return a hash of the prompt's question and answer, which identifies the prompt in all runs."""
    text = json.dumps([list(map(dict, prompt.messages)), prompt.text, prompt.answer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
