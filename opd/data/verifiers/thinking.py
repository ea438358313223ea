"""Marks around the thinking of a response, of all model families."""

# Where the thinking opens and closes, as the reasoning parsers of vLLM and SGLang read them.
MARKS = (
    ("<think>", "</think>"),  # most families: DeepSeek, Qwen, GLM, Kimi K2, Hunyuan, EXAONE 4, ERNIE, Nemotron, Olmo
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep, Marco-o1
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("<longcat_think>", "</longcat_think>"),  # LongCat
    ("[THINK]", "[/THINK]"),  # Mistral: Magistral and later
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("<|close|>response<|sep|>", "<|open|>response<|sep|>"),  # Kimi K3, around what is not the response
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|THINK_START|>", "<|THINK_END|>"),  # Step-Audio
    ("<|think:start|>", "<|think:end|>"),  # Solar Open 2
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>"),  # PLaMo 3
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<unused94>", "<unused95>"),  # MedGemma
    ("[unused16]", "[unused17]"),  # openPangu
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss (harmony)
    ("<|channel|>commentary", "<|channel|>final<|message|>"),  # gpt-oss, tool calls
    ("<|content_thinking|>", "<|content_text|>"),  # Inkling
    ("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),  # CWM
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    ("Here is my thought process:", "Here is my response:"),  # Granite 3
    ("Here's my thought process:", "Here's my response:"),
)
