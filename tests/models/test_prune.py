"""Depth pruning on tiny random models: the saved folder computes exactly what the kept layers compute."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd.config.commands import Prune, layers
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.models import load as models
from opd.models.prune import layer_list_name, prune, select
from opd.models.source import locate
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from tests.tiny_models import tiny

IDS = torch.arange(1, 13).view(2, 6)


def _load(folder):
    return models.load(
        locate(str(folder), field="model"), field="model", dtype=torch.float32, device=torch.device("cpu")
    )


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _by_hand(model, keep):
    """The decoder written out: embed, the layers named, norm, head."""
    inner = model.model
    with torch.no_grad():
        hidden = inner.embed_tokens(IDS)
        position = torch.arange(IDS.shape[1])[None]
        causal = torch.full((IDS.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for i in keep:
            hidden = inner.layers[i](
                hidden,
                attention_mask=causal,
                position_ids=position,
                position_embeddings=inner.rotary_emb(hidden, position),
            )
        return model.lm_head(inner.norm(hidden))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def whole(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("whole") / "m", seed=1, layers=5, tied=request.param)


def test_keeping_all_layers_changes_nothing(whole, tmp_path):
    out = prune(Prune(model=str(whole), keep=(0, 1, 2, 3, 4), out=tmp_path / "out"))
    assert torch.equal(_logits(_load(out)), _logits(_load(whole)))


@pytest.mark.parametrize("keep", [(0, 1, 4), (2,), (1, 3)])
def test_keeping_some_runs_those_layers(whole, tmp_path, keep):
    before = _load(whole)
    after = _load(prune(Prune(model=str(whole), keep=keep, out=tmp_path / "out")))
    assert after.config.num_hidden_layers == len(after.model.layers) == len(keep)
    torch.testing.assert_close(_logits(after), _by_hand(before, keep), rtol=1e-5, atol=1e-5)
    assert (_logits(after) - _logits(before)).abs().max() > 0.1  # the layers left out mattered


def test_decodes_with_a_cache_and_keeps_tokenizer_and_stops(whole, tmp_path):
    out = prune(Prune(model=str(whole), keep=(0, 3), out=tmp_path / "out"))
    model = _load(out)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    source, old = locate(str(out), field="model"), locate(str(whole), field="model")
    assert models.tokenizer(source, field="model").get_vocab() == models.tokenizer(old, field="model").get_vocab()
    stops = [GenerationConfig.from_pretrained(folder).eos_token_id for folder in (out, whole)]
    assert stops[0] == stops[1]
    # Greedy decoding with the cache says what full passes without one say.
    rows, prompt = model.config.vocab_size, tuple(IDS[0].tolist())
    sampling, stop = Sampling(temperature=0.0, max_new_tokens=6), (model.generation_config.eos_token_id,)
    (drawn,) = HFEngine(model, rows, stop).generate(GenerateRequest([prompt], sampling, seed=0, step=0, index=[0]))
    said: list[int] = []
    with torch.no_grad():
        for _ in drawn.ids:
            logits = model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
    assert len(said) > 2
    assert drawn.ids == tuple(said)


def test_weights_keep_their_type(whole, tmp_path):
    model = _load(whole).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    models.tokenizer(locate(str(whole), field="model"), field="model").save_pretrained(tmp_path / "half")
    out = prune(Prune(model=str(tmp_path / "half"), keep=(0, 1), out=tmp_path / "out"))
    assert LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_settings_by_layer_follow_their_layers():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=kinds,
        eos_token_id=[1, 2, 3, 4],  # as many as layers, and not one for each
    )
    model = Qwen3ForCausalLM(config)
    select(model, (0, 2, 3))
    assert model.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    assert model.config.eos_token_id == [1, 2, 3, 4]
    again = Qwen3ForCausalLM(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(_logits(again.eval()), _logits(model.eval()))


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ((), "no layers"),
        ((0, 5), "no layer 5; the model's layers are 0-4"),
        ((-1, 2), "no layer -1"),
        ((2, 1), "ascending"),
        ((1, 1), "each layer once"),
    ],
)
def test_impossible_layers_are_refused(whole, tmp_path, keep, reason):
    with pytest.raises(Refusal, match=reason) as caught:
        prune(Prune(model=str(whole), keep=keep, out=tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    with pytest.raises(Refusal, match="exists already"):
        prune(Prune(model=str(whole), keep=(0,), out=tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_an_unclear_container_is_refused():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    assert layer_list_name(model) == "model.layers"
    model.add_module("towers", torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]))
    with pytest.raises(Refusal, match="not clear"):
        layer_list_name(model)


def test_layers_are_written_as_numbers_and_ranges():
    assert layers("0-2,5") == (0, 1, 2, 5)
    assert layers("3") == (3,)
    assert layers("") == ()
    for wrong in ("a", "-1", "1-", "1:3"):
        with pytest.raises(Refusal, match="not a layer"):
            layers(wrong)
