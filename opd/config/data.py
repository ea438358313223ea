"""The prompts that a run or an evaluation reads: `Data`."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Data:
    """Settings of the data: source of the prompts, columns of their rows, and the verifier."""

    source: Annotated[str, tyro.conf.Suppress] = "embedded:ledger"  # --prompts and --eval-prompts on the command line
    """Source of the prompts: a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file, gzipped or not, a folder of
    such files, a folder written by `Dataset.save_to_disk`, a dataset id of the Hugging Face hub, embedded:ledger,
    embedded:ledger-short, or reasoning-gym:NAME, with options as reasoning-gym:NAME?key=value&key=value."""
    subset: str = ""
    """Configuration name of a hub dataset ("main" for openai/gsm8k).  Empty: the dataset's default."""
    split: str = "train"
    """Split to read.  Procedural sources have train and test.  A single file accepts any split name."""
    prompt_column: str = "prompt,messages,conversations,question,problem,instruction+input,instruction,query,input"
    """Column with the question, as text or as chat messages: the first of these names that contains either.
    A dot selects a nested field.  A plus joins the texts of two columns with a blank line.  A closing assistant message
    becomes the reference response."""
    answer_column: str = "answer,expected_answer,final_answer,ground_truth,reward_model.ground_truth,answerKey,label"
    """Column with the expected answer: the first of these names that is not empty in the first row.
    A list contains acceptable answers: a response is right if it matches any of them."""
    response_column: str = "response,completion,solution,reference_solution,output"
    """Column with a reference response, for methods that train on data: the first of these names that exists."""
    choices_column: str = ""
    """Column with the options of a multiple-choice question: a list of up to 26 texts, {"label": [...], "text": [...]},
    {"A": text, ...}, or a list of {"label", "text"}, or the JSON text of one of these; or several columns, as A+B+C+D.
    They are added under the question as "A. ...", and the answer, a number from 0, a label or a text, becomes a letter.
    A list of zeros and ones marks the right options.  Empty: no options."""
    verifier: str = "math"
    """Verifier that compares a response with the expected answer: math (LaTeX and expressions), numeric (last number,
    as for GSM8K), exact (same text), choice (a letter), none (no answers; nothing is scored), or module:function for a
    Python function `(response, answer) -> score from 0 to 1`.  Procedural sources always use their built-in
    verifier."""
    think_end: str = ""
    """Text of the token that ends the thinking of a response, such as "<|done|>".  The verifier and the judges do not
    read what stands before it.  Empty: the marks of all model families that opd knows, such as </think> and [/THINK].
    Set it for another family."""
    chat: bool = True
    """Turn a question given as text into a user message.  Off: use it as plain text without a chat template."""
    system: str = ""
    """System message for every conversation; it replaces the row's system message.  Empty: do not change the rows."""
    instruction: str = ""
    r"""Text to add on a new line after the question, such as
    "Please reason step by step, and put your final answer within \boxed{}."."""
    template_args: str = ""
    """Arguments of the chat templates, as JSON, such as '{"enable_thinking": false}'.  The teacher's template gets only
    the arguments that it reads."""
    limit: int = 0
    """Number of prompts to keep.  0: all rows, or 50000 (train) and 1000 (test) prompts of a procedural source.  Rows
    are selected at random and keep the order of the file; a larger limit keeps the same rows and adds more."""
    seed: Annotated[int, tyro.conf.Suppress] = 0  # the run's --seed on the command line
    """Seed of the rows that `limit` selects, and of procedural problems.  Train and test differ at every seed."""
