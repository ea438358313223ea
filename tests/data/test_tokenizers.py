"""What two models must share before one scores the other's tokens, on real tokenizers built here."""

import random
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data import prompts
from opd.data import tokenizers as tokens
from opd.data.tokenizers import Severity
from opd.models.source import EMBEDDED

TEXT = [
    "What is 2 + 3? The answer is five.",
    "Be brief. I don't know what the question is, and the answer is no.",
    "  f(x):\n\treturn x**2\n\n",
    "the student speaks, the teacher scores every token of the answer",
] * 4
END, STOP, BOS, PAD, UNK = "<end>", "<stop>", "<bos>", "<pad>", "<unk>"
SPECIAL = (END, STOP, BOS, PAD, UNK)
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nturns') }}{% endif %}" + CHAT
PREAMBLE = CHAT.replace("{{ bos_token }}", "{{ bos_token }}<system>You are a teacher.{{ eos_token }}")


@cache
def core() -> str:
    """A byte-level BPE trained on a few lines, as json."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXT, trainer)
    return trained.to_str()


def wrap(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    named = {"bos_token": BOS, "eos_token": END, "pad_token": PAD, "unk_token": UNK, "chat_template": CHAT}
    given = {k: v for k, v in (named | options).items() if v is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def byte_level(**options) -> PreTrainedTokenizerFast:
    return wrap(Tokenizer.from_str(core()), **options)


def with_bos(suffix: str = "", **options) -> PreTrainedTokenizerFast:
    """One that puts BOS before plain text, as Llama's does (and EOS behind it, where asked)."""
    backend = Tokenizer.from_str(core())
    ids = [(token, backend.token_to_id(token)) for token in (BOS, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A{suffix}", special_tokens=ids)
    return wrap(backend, **options)


def words(order: list[str], **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(order)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(backend, **options)


SIZE = len(byte_level())
ENDS = (byte_level().convert_tokens_to_ids(END),)


def compare(student, teacher, **changed) -> tokens.TokenizerAgreement:
    given = {"student_rows": SIZE, "teacher_rows": SIZE, "student_eos": ENDS, "teacher_eos": ENDS} | changed
    return tokens.compare_tokenizers(student, teacher, **given)


def only(agreed: tokens.TokenizerAgreement, field: str, severity: Severity) -> tokens.Difference:
    """The one finding about a field; one line, as everything a user is told."""
    (found,) = [d for d in agreed.differences if d.field == field]
    assert found.severity is severity
    assert "\n" not in str(found)
    return found


def ask(*turns: str) -> Prompt:
    """Chat turns written as 'role: content'."""
    return Prompt(messages=tuple(dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns))


def read(tokenizer, prompt: Prompt, **template) -> str:
    return tokenizer.decode(prompts.render(tokenizer, prompt, chat_template_kwargs=template))


# The vocabulary


def test_a_model_agrees_with_itself():
    agreed = compare(byte_level(), byte_level())
    assert (agreed.vocabulary, agreed.stop, agreed.differences) == (SIZE, ENDS, ())
    assert tokens.require(agreed) is agreed


@pytest.mark.parametrize(("student", "teacher"), [(7, 135), (135, 7), (0, 64), (64, 64)])
def test_padded_heads_are_one_vocabulary_cut_at_the_last_token(student, teacher):
    agreed = compare(byte_level(), byte_level(), student_rows=SIZE + student, teacher_rows=SIZE + teacher)
    assert agreed.vocabulary == SIZE
    found = only(agreed, "rows", Severity.NOTE)
    assert f"{SIZE + student} rows (student) and {SIZE + teacher} (teacher)" in found.text
    assert f"the first {SIZE} ids" in found.text
    tokens.require(agreed)


def test_shuffled_ids_are_refused_with_the_tokens_named():
    order = [*SPECIAL, "two", "plus", "three", "is", "five"]
    other = [*SPECIAL, "three", "plus", "two", "five", "is"]
    agreed = compare(words(order), words(other), student_rows=10, teacher_rows=10)
    found = only(agreed, "tokens", Severity.REFUSE)
    assert "4 tokens have another id, 0 only the student has, 0 only the teacher" in found.text
    assert "'two' is 5 to the student, 7 to the teacher; 'three' is 7 to the student, 5" in found.text
    assert "take a teacher with the student's tokenizer" in found.text
    assert "replace the tokenizer files" not in found.text
    with pytest.raises(Refusal, match=r"^tokens: 4 tokens have another id") as refusal:
        tokens.require(agreed)
    assert "\n" not in str(refusal.value)


def test_a_whole_shuffled_vocabulary_is_counted_not_listed():
    order = sorted(byte_level().get_vocab())
    random.Random(0).shuffle(order)
    agreed = compare(byte_level(), words(order))
    assert len(only(agreed, "tokens", Severity.REFUSE).text) < 700
    assert "segmentation" not in [d.field for d in agreed.differences]  # it says no more than the map does


def test_extra_tokens_are_refused_with_the_way_out():
    teacher = byte_level()
    teacher.add_tokens(["<think>", "</think>"])
    agreed = compare(byte_level(), teacher, teacher_rows=SIZE + 2)
    found = only(agreed, "tokens", Severity.REFUSE)
    assert f"'<think>' ({SIZE}) only the teacher has" in found.text
    assert f"ids below {SIZE} agree" in found.text
    assert "replace the tokenizer files of the model that has more" in found.text
    assert agreed.vocabulary == SIZE


def test_tokens_of_each_side_are_refused_without_the_copy():
    student, teacher = byte_level(), byte_level()
    student.add_tokens(["<a>"])
    teacher.add_tokens(["<b>"])
    agreed = compare(student, teacher, student_rows=SIZE + 1, teacher_rows=SIZE + 1)
    text = only(agreed, "tokens", Severity.REFUSE).text
    assert f"'<a>' ({SIZE}) only the student has; '<b>' ({SIZE}) only the teacher has" in text
    assert "replace the tokenizer files" not in text


def test_a_head_too_small_for_its_own_words_is_refused():
    agreed = compare(byte_level(), byte_level(), teacher_rows=SIZE - 1)
    (found,) = agreed.refusals
    assert f"the teacher's head has {SIZE - 1} rows, and 1 of its tokens none" in found.text
    assert f"resize_token_embeddings({SIZE})" in found.text
    assert agreed.vocabulary == SIZE - 1


def test_an_added_token_without_a_row_is_a_warning_until_the_template_writes_it():
    # as a text-only Gemma 3: one image token past the last row, named in the map of special tokens
    both = [byte_level(extra_special_tokens={"image_token": "<image>"}) for _ in range(2)]
    assert both[0].special_tokens_map["image_token"] == "<image>"
    agreed = compare(*both)
    assert [d.severity for d in agreed.differences] == [Severity.WARNING, Severity.WARNING]
    assert f"'<image>' ({SIZE})" in agreed.differences[0].text
    assert tokens.require(agreed).vocabulary == SIZE
    both[0].chat_template = "<image>" + CHAT
    with pytest.raises(Refusal, match="the student's head"):
        tokens.require(compare(*both))


def test_a_named_token_without_a_row_is_refused():
    padded = byte_level(pad_token="[PAD]")  # added, and the model not resized
    with pytest.raises(Refusal, match=rf"^rows: the student's head .* '\[PAD\]' \({SIZE}\); .*and 1 more: rows"):
        tokens.require(compare(padded, padded))
    agreed = compare(byte_level(), byte_level(), student_rows=SIZE - 1, student_eos=(*ENDS, SIZE - 1))
    assert agreed.stop == ENDS


def test_ids_with_a_row_and_no_token_are_noted():
    vocab = {token: i for i, token in enumerate((*SPECIAL, "two"))} | {"five": 9}
    tokenizer = wrap(Tokenizer(models.WordLevel(vocab, unk_token=UNK)))
    agreed = compare(tokenizer, tokenizer, student_rows=10, teacher_rows=10)
    assert "3 ids below 10 have a row but no token (first 6)" in only(agreed, "holes", Severity.NOTE).text


# Where responses end


def test_the_stop_set_is_the_union_with_the_students_own_first():
    tokenizer = byte_level()
    end, stop, bos = tokenizer.convert_tokens_to_ids([END, STOP, BOS])
    agreed = compare(tokenizer, tokenizer, student_eos=(bos, stop), teacher_eos=(end, stop))
    assert agreed.stop == (stop, bos, end)
    found = [d for d in agreed.differences if d.field == "eos"]
    assert f"the student stops at '<bos>' ({bos}), '<stop>' ({stop}), the teacher at '<end>' ({end})" in found[0].text
    assert "canonical" in found[0].text
    assert f"add {end} to its eos_token_id" in found[1].text  # the student's tokenizer ends with <end>
    tokens.require(agreed)


def test_a_stop_id_nobody_can_say_is_dropped_and_named():
    agreed = compare(byte_level(), byte_level(), teacher_eos=(*ENDS, 10_000))
    assert agreed.stop == ENDS
    assert any("no token (10000) in the teacher's generation config" in d.text for d in agreed.differences)


def test_no_stop_at_all_is_refused():
    with pytest.raises(Refusal, match=r"^eos: no stop id .* correct eos_token_id in generation_config.json$"):
        tokens.require(compare(byte_level(), byte_level(), student_eos=(9999,), teacher_eos=()))


@pytest.mark.parametrize(("eos", "ids"), [(3, (3,)), (0, (0,)), ([5, 3, 5], (3, 5)), (None, ENDS), ([], ENDS)])
def test_stop_ids_are_the_generation_configs_else_the_tokenizers(eos, ids):
    assert prompts.stop_ids(eos, byte_level(), 7) == ids
    # A config.json may keep the stop ids of another vocabulary beside a generation config that is right.
    assert prompts.stop_ids(eos, byte_level(), [10**6]) == ids


def test_a_model_that_never_stops_is_refused():
    with pytest.raises(Refusal, match=r"eos_token_id: this model has none.*set eos_token_id in generation_config.json"):
        prompts.stop_ids(None, byte_level(eos_token=None))
    assert prompts.stop_ids(None, byte_level(eos_token=None), [7]) == (7,)


@pytest.mark.parametrize("eos", ["</s>", [[3]], 3.0, [3, None], True, 9999, -1, {"id": 3}])
def test_stop_ids_that_are_no_tokens_are_refused(eos):
    with pytest.raises(Refusal, match=r"^eos_token_id .*(no token ids there|no token of this model)[^\n]*$"):
        prompts.stop_ids(eos, byte_level())


# Special tokens, spelling, templates


@pytest.mark.parametrize(
    ("change", "field", "severity", "said"),
    [
        ({"bos_token": None}, "bos_token", Severity.WARNING, "'<bos>' (student) and 'none' (teacher): a teacher that"),
        ({"eos_token": STOP}, "eos_token", Severity.NOTE, "'<end>' (student) and '<stop>' (teacher)"),
        ({"pad_token": END}, "pad_token", Severity.NOTE, "padding is masked"),
        ({"unk_token": None}, "unk_token", Severity.NOTE, "neither can spell"),
        ({"extra_special_tokens": [STOP]}, "special tokens", Severity.NOTE, "special to one model only: '<stop>'"),
    ],
)
def test_special_tokens_that_differ_are_told(change, field, severity, said):
    agreed = compare(byte_level(), byte_level(**change))
    assert said in only(agreed, field, severity).text
    tokens.require(agreed)


def test_one_map_that_spells_differently_is_a_warning():
    backend = Tokenizer.from_str(core())
    backend.normalizer = normalizers.NFC()
    found = only(compare(byte_level(), wrap(backend)), "segmentation", Severity.WARNING)
    assert "naïve" in found.text
    assert "tokenizer.json is the student's" in found.text


def test_templates_are_compared_by_what_they_write():
    assert not compare(byte_level(), byte_level()).differences
    same = compare(byte_level(), byte_level(chat_template="{# tools #}" + CHAT))
    assert "alike" in only(same, "chat template", Severity.NOTE).text
    other = compare(byte_level(), byte_level(chat_template=PREAMBLE))
    text = only(other, "chat template", Severity.WARNING).text
    assert "one question: the student reads ...'user>What is 2 + 3?" in text
    assert "the teacher ...'system>You are a teacher." in text
    strict = compare(byte_level(), byte_level(chat_template=STRICT))
    assert only(strict, "chat template", Severity.WARNING).text.startswith("a system turn: ")
    both = compare(byte_level(chat_template=STRICT), byte_level(chat_template=STRICT.replace("turns", "turn")))
    assert "alike" in only(both, "chat template", Severity.NOTE).text


def test_a_model_without_template_is_told_once():
    base, chat = byte_level(chat_template=None), byte_level()
    text = only(compare(base, chat), "chat template", Severity.WARNING).text
    assert text.startswith("the student has none and reads the plain text of the messages")
    assert only(compare(chat, base), "chat template", Severity.WARNING).text.startswith("the teacher has none")
    assert "neither model has one" in only(compare(base, base), "chat template", Severity.NOTE).text


def test_the_template_difference_is_a_diff_people_read():
    assert tokens.template_difference(byte_level(), byte_level(chat_template="{# tools #}" + CHAT)) == ""
    lines = CHAT.replace("<{{ m.role }}>", "<{{ m.role }}>\n")
    diff = tokens.template_difference(byte_level(), byte_level(chat_template=lines))
    assert "--- student, one question\n+++ teacher, one question\n" in diff
    assert "\n+<bos><user>⏎\n" in diff
    assert "(refused: messages:" in tokens.template_difference(byte_level(), byte_level(chat_template=STRICT))


def test_one_text_in_other_ids_is_shown_token_by_token():
    shuffled = [UNK, END, STOP, BOS, PAD, *"?+23", "What", "is", "<", ">", "user", "assistant"]
    template = CHAT.replace("{{ eos_token }}", "").replace("{{ bos_token }}", "")
    pair = [words(order, chat_template=template) for order in (shuffled, shuffled[:5] + shuffled[:4:-1])]
    assert "-What (9)" in tokens.template_difference(*pair)


# Prompts


def test_messages_go_through_the_models_own_template():
    tokenizer = with_bos()  # would add a second BOS
    prompt = ask("user: What is 2?", "assistant: two", "user: and 3?")
    ids = prompts.render(tokenizer, prompt, chat_template_kwargs={})
    assert tokenizer.decode(ids) == "<bos><user>What is 2?<end><assistant>two<end><user>and 3?<end><assistant>"
    theirs = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)
    assert list(ids) == theirs["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert all(type(i) is int for i in ids)


def test_template_arguments():
    tokenizer, asked = byte_level(), ask("user: 2?")
    assert read(tokenizer, asked, enable_thinking=False).endswith("<assistant><think></think>")
    assert read(tokenizer, asked, enable_thinking=True).endswith("<assistant>")


def test_a_template_decides_about_bos_and_eos():
    silent = CHAT.replace("{{ bos_token }}", "")
    assert read(with_bos(f" {END}", chat_template=silent), ask("user: 2?")) == "<user>2?<end><assistant>"
    assert read(byte_level(chat_template=silent + "{{ eos_token }}"), ask("user: 2?")).endswith(f"<assistant>{END}")


def test_a_template_that_writes_bos_twice_is_read_once():
    assert read(byte_level(chat_template="{{ bos_token }}" + CHAT), ask("user: 2?")).count(BOS) == 1


def test_without_template_messages_are_their_text():
    base = with_bos(chat_template=None)
    assert read(base, ask("user: What is 2?")) == "<bos>What is 2?"
    assert read(base, ask("system: Be brief.", "user: What is 2?")) == "<bos>Be brief.\n\nWhat is 2?"


def test_text_is_used_as_it_is():
    assert read(with_bos(), Prompt(text="What is 2?")) == "<bos>What is 2?"  # not through the template
    assert read(byte_level(), Prompt(text="What is 2?")) == "What is 2?"
    assert read(with_bos(), Prompt(text="<bos><bos>What is 2?")) == "<bos>What is 2?"
    assert read(with_bos(f" {END}"), Prompt(text="What is 2?")) == "<bos>What is 2?"  # an EOS would end the prompt
    assert read(with_bos(f" {END}"), Prompt(text=f"2?{END}")) == f"<bos>2?{END}"  # the user's own stays
    assert read(with_bos(), Prompt(text=f"2?{END}")) == f"<bos>2?{END}"


@pytest.mark.parametrize(
    ("prompt", "template", "said"),
    [
        (Prompt(), {}, "prompt: neither messages nor text that gives a token: name the column"),
        (Prompt(text="2?"), {"enable_thinking": False}, "a plain-text row uses none; drop it"),
        (ask("user: 2?"), {"enable_thinkng": False}, "enable_thinkng: .* never reads it.*correct the name"),
        (ask("user: 2?", "assistant: 2"), {}, "the last turn is the assistant's"),
        (ask("user: 2?"), {"messages": ()}, "refuses turns .user.: TypeError"),
        (Prompt(messages=({"role": "user"},)), {}, r"messages\[0\]: {'role': 'user'} needs a `role` and a `con"),
        (Prompt(messages=({"role": "user", "content": None},)), {}, r"messages\[0\]: .* both text"),
    ],
)
def test_prompts_that_cannot_be_rendered_are_refused(prompt, template, said):
    with pytest.raises(Refusal, match=said) as refusal:
        prompts.render(byte_level(), prompt, chat_template_kwargs=template)
    assert "\n" not in str(refusal.value)


def test_what_a_template_refuses_is_said_in_one_line():
    with pytest.raises(Refusal, match=r"refuses turns \(system, user\): TemplateError: no system turns: ") as refusal:
        read(byte_level(chat_template=STRICT), ask("system: Be brief.", "user: 2?"))
    assert "\n" not in str(refusal.value)
    with pytest.raises(Refusal, match="multiple chat templates with no default"):
        read(byte_level(chat_template={"rag": CHAT, "tool_use": CHAT}), ask("user: 2?"))
    with pytest.raises(Refusal, match="nor text that gives a token"):
        read(byte_level(chat_template="{% if false %}{% endif %}"), ask("user: 2?"))
    with pytest.raises(Refusal, match="has no template; drop it"):
        read(byte_level(chat_template=None), ask("user: 2?"), enable_thinking=False)


@pytest.mark.parametrize("text", ["  two\n\n three", "naïve e\u0301 数学 🙂", "\\boxed{1}", f"2{END}"])
def test_byte_level_text_decodes_to_itself(text):
    assert prompts.decodes_to_itself(byte_level(), text)


def test_a_sentencepiece_like_tokenizer_reads_and_decodes():
    backend = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = wrap(backend)
    assert prompts.decodes_to_itself(tokenizer, "What is 数 + 3?")
    assert "What is 2 + 3?<end><assistant>" in read(tokenizer, ask("user: What is 2 + 3?"))
    assert only(compare(byte_level(), tokenizer), "tokens", Severity.REFUSE)


def test_lossy_tokenizers_are_caught():
    assert not prompts.decodes_to_itself(words([*SPECIAL, "two", "three"]), "two four")
    backend = Tokenizer.from_str(core())
    backend.normalizer = normalizers.Lowercase()
    assert not prompts.decodes_to_itself(wrap(backend), "The answer")


def test_the_agreement_prints_for_people():
    printed = str(compare(byte_level(), byte_level(pad_token=END), student_rows=SIZE + 9)).splitlines()
    assert printed[0] == f"{SIZE} ids in common; a response stops at {ENDS[0]}"
    assert [line.split(":")[0] for line in printed[1:]] == ["note", "note"]


def test_refusals_beyond_the_first_are_counted():
    teacher = byte_level()
    teacher.add_tokens(["<think>"])
    with pytest.raises(Refusal, match=r"^tokens: .* \(and 1 more: eos\)$"):
        tokens.require(compare(byte_level(), teacher, teacher_rows=SIZE + 1, student_eos=(), teacher_eos=()))


EMBEDDED_TOKENIZERS = sorted(EMBEDDED.glob("**/tokenizer.json"))


@pytest.mark.skipif(not EMBEDDED_TOKENIZERS, reason="opd/models/embedded holds no tokenizer")
def test_the_embedded_models_share_one_tokenizer():
    loaded = [AutoTokenizer.from_pretrained(path.parent) for path in EMBEDDED_TOKENIZERS]
    for other in loaded:
        rows, eos = len(other), prompts.stop_ids(None, other)
        agreed = tokens.compare_tokenizers(
            loaded[0], other, student_rows=rows, teacher_rows=rows, student_eos=eos, teacher_eos=eos
        )
        assert tokens.require(agreed).vocabulary == rows
        assert agreed.differences == ()
        assert read(other, ask("user: How many apples?")).count(other.bos_token) == 1
