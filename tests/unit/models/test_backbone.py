"""Loading language models: folders, configurations, checkpoints, GGUF, and what is said when none of them works."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_instruct.models.backbone import (
    _NOISES,
    _config_from_fields,
    context_length,
    fit_to_tokenizer,
    load_language_model,
)
from lit_instruct.models.handover import write_handover
from lit_instruct.models.packing import admission
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import tiny_tokenizer
from tests.unit.models.networks import EOS, FAMILIES, VOCABULARY, tiny_config, tiny_model

ROW = torch.tensor([[5, 6, 7, 8, 9]])


def save_checkpoint(path, model, *, stage="sft", network="policy.", ema=None, **changes):
    checkpoint = {"state_dict": {f"{network}{name}": tensor for name, tensor in model.state_dict().items()}}
    checkpoint["state_dict"]["another.weight"] = torch.zeros(3)
    if ema is not None:
        checkpoint["ema_state_dict"] = {f"{network}{name}": tensor for name, tensor in ema.items()}
    write_handover(checkpoint, stage=stage, network=network, config=model.config, tokenizer=tiny_tokenizer())
    checkpoint["lit_instruct"] |= changes
    torch.save(checkpoint, path)
    return path


def assert_same_weights(model, other):
    weights = other.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def assert_ready(model):
    assert model.training
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_a_folder(tmp_path, family):
    model = tiny_model(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    assert_ready(loaded)
    assert_same_weights(loaded, model.float())
    assert_same_weights(load_language_model(str(tmp_path)), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_bare_configuration(family):
    fields = {"model_type": family, "vocab_size": VOCABULARY, "eos_token_id": EOS, **FAMILIES[family]}
    before = dict(fields)
    torch.manual_seed(0)
    model = load_language_model(fields)
    assert_ready(model)
    assert fields == before
    assert model.config.model_type == family
    assert model(ROW).logits.shape == (1, 5, VOCABULARY)
    torch.manual_seed(0)
    assert_same_weights(load_language_model(AutoConfig.for_model(**fields)), model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("way", ["folder", "configuration", "checkpoint"])
def test_every_dropout_is_off(tmp_path, family, way):
    """Ratio 1 at the first minibatch needs one and the same network in rollout and update, in training mode."""
    drops = {
        "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
        "gpt_neox": ["hidden_dropout", "attention_dropout"],
        "opt": ["dropout", "attention_dropout", "activation_dropout", "layerdrop"],
    }[family]
    config = tiny_config(family, **dict.fromkeys(drops, 0.5))
    torch.manual_seed(0)
    if way == "configuration":
        model = load_language_model(config)
    else:
        made = tiny_model(family, **dict.fromkeys(drops, 0.5))
        if way == "folder":
            made.save_pretrained(tmp_path)
            model = load_language_model(tmp_path)
        else:
            model = load_language_model(save_checkpoint(tmp_path / "x.ckpt", made))
    assert model.training
    first = model(ROW).logits
    for _ in range(4):
        assert torch.equal(model(ROW).logits, first)
    assert_close(model.eval()(ROW).logits, first)


def test_any_dropout_of_a_decoder_in_transformers_is_known():
    """Decoders name their dropouts as they please: a new name shows here, and not as noise in a ratio."""
    others = ("classifier", "summary", "encoder", "feat", "projector", "final_dropout")  # not on a decoder's way
    decoders = ["bloom", "codegen", "falcon", "gemma", "gemma2", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj"]
    decoders += ["llama", "mistral", "mixtral", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3"]
    decoders += ["stablelm", "starcoder2", "xglm", "biogpt", "cohere", "granite", "smollm3", "glm"]
    assert set(decoders) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in decoders:
        names = [name for name in AutoConfig.for_model(kind).to_dict() if "drop" in name]
        unknown = [name for name in names if name not in _NOISES and not name.startswith(others)]
        assert not unknown, (kind, unknown)


# -- checkpoints


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_from_a_checkpoint(tmp_path, family):
    model = tiny_model(family)
    loaded = load_language_model(save_checkpoint(tmp_path / "x.ckpt", model))
    assert_ready(loaded)
    assert_same_weights(loaded, model)
    assert_close(loaded(ROW).logits, model(ROW).logits)
    fields = {name: value for name, value in model.config.to_dict().items() if "drop" not in name and name != "dtype"}
    assert fields.items() <= loaded.config.to_dict().items()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_untied_ones_apart(tmp_path, tied):
    path = save_checkpoint(tmp_path / "x.ckpt", tiny_model("llama", tie_word_embeddings=tied))
    for ema in (False, True):
        if ema:
            average = dict(tiny_model("llama", tie_word_embeddings=tied, seed=9).named_parameters())
            path = save_checkpoint(tmp_path / "y.ckpt", tiny_model("llama", tie_word_embeddings=tied), ema=average)
        model = load_language_model(path, ema=ema)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embeddings is head) == tied
        assert torch.equal(embeddings, head) == tied


def test_averaged_weights(tmp_path):
    model, average = tiny_model("gpt2"), tiny_model("gpt2", seed=9)
    weights = {name: parameter.detach() for name, parameter in average.named_parameters()}
    path = save_checkpoint(tmp_path / "x.ckpt", model, ema=weights)
    assert_same_weights(load_language_model(path, ema=True), average)
    assert_same_weights(load_language_model(path), model)


def test_a_loaded_model_does_not_change_its_file(tmp_path):
    path = save_checkpoint(tmp_path / "x.ckpt", tiny_model("llama"))
    first = load_language_model(path)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert_same_weights(load_language_model(path), tiny_model("llama"))


def test_averaged_weights_that_are_not_there(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no averaged weights; train with the WeightEMA callback"):
        load_language_model(save_checkpoint(tmp_path / "x.ckpt", tiny_model("llama")), ema=True)
    with pytest.raises(ConfigError, match=r"averaged weights were asked for.*no \.ckpt"):
        load_language_model(tmp_path, ema=True)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("lacks one", "model.norm.weight is missing"),
        ("lacks all", "model.embed_tokens.weight is missing"),
        ("another shape", "model.norm.weight has the shape [5] instead of [16]"),
        ("one too many", "model.extra belongs nowhere"),
    ],
)
@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_whose_weights_do_not_fit(tmp_path, damage, text, ema):
    path, model = tmp_path / "x.ckpt", tiny_model("llama")
    save_checkpoint(path, model, ema=dict(model.named_parameters()))
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["ema_state_dict" if ema else "state_dict"]
    if damage == "lacks one":
        del weights["policy.model.norm.weight"]
    elif damage == "lacks all":
        for name in list(weights):
            if name != "policy.lm_head.weight":
                del weights[name]
    elif damage == "another shape":
        weights["policy.model.norm.weight"] = torch.ones(5)
    else:
        weights["policy.model.extra"] = torch.ones(5)
    torch.save(checkpoint, tmp_path / "y.ckpt")
    with pytest.raises(ConfigError) as error:
        load_language_model(tmp_path / "y.ckpt", ema=ema)
    assert_usable(error, "y.ckpt", text, "Need exactly", "Do: give the file")


def test_a_reward_model_is_no_language_model(tmp_path):
    path = save_checkpoint(tmp_path / "x.ckpt", tiny_model("llama"), stage="rm")
    with pytest.raises(ConfigError, match=r"is a reward model; a language model is needed: give an SFT or PPO"):
        load_language_model(path)


# -- errors


def assert_usable(error, *parts):
    """One paragraph, without the terminal codes and pages that libraries append; names what was got."""
    text = str(error.value)
    assert len(text) < 900
    assert "\n" not in text
    assert "\033" not in text
    for part in parts:
        assert part in text
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing", "no/such/thing", "nowhere.gguf"])
def test_nothing_there(tmp_path, name):
    for base in (name, tmp_path / name):
        with pytest.raises(ConfigError, match="no language model could be loaded") as error:
            load_language_model(base)
        assert_usable(error, name, "Give a hub name, a folder", ".ckpt")


@pytest.mark.parametrize("damage", ["empty", "no weights", "cut", "other shape", "gguf"])
def test_a_damaged_folder(tmp_path, damage):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    base = folder
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:700])
    elif damage == "other shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 32}))
    else:
        base = folder / "x.gguf"
        base.write_bytes(b"GGUF nonsense")
    with pytest.raises(ConfigError, match="no language model could be loaded") as error:
        load_language_model(base)
    assert_usable(error, str(base))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", "Should have a `model_type`"),
        ('{"model_type": "llama", "hidden_size": "16"}', "its config.json: Field 'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "num_attention_heads": 3}', "its config.json: The hidden size"),
    ],
)
def test_a_configuration_that_cannot_be_read(tmp_path, content, text):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(content)
    with pytest.raises(ConfigError, match="no language model could be loaded") as error:
        load_language_model(tmp_path / "model")
    assert_usable(error, text, "Give a hub name")


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".0.self_attn.q_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_language_model, ScalarModel.from_base):
        with pytest.raises(ConfigError, match=r"brings no weights for model.layers.0.self_attn.q_proj") as error:
            load(tmp_path)
        assert_usable(error, str(tmp_path), "Do: check that config.json and weights are of one model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"weights that are not finite \(model.norm.weight\)") as error:
        load_language_model(tmp_path)
    assert_usable(error, "Do: give another checkpoint")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden_size": 8}, "without model_type; add for example"),
        ({"model_type": "nonsense"}, "no configuration of type 'nonsense'"),
        ({"model_type": "clip"}, "no language model can be built from a configuration of type 'clip'"),
        ({"model_type": "llama", **FAMILIES["llama"], "num_attention_heads": 3}, "multiple of the number of attention"),
        ({"model_type": "llama", **FAMILIES["llama"], "hidden_size": "16"}, "hidden_size"),
    ],
)
def test_a_configuration_that_cannot_be(fields, text):
    with pytest.raises(ConfigError) as error:
        load_language_model(fields)
    assert_usable(error, text)


# -- fields that a configuration does not have


@pytest.mark.parametrize(
    ("family", "field", "hint"),
    [
        ("llama", "hiden_size", "did you mean hidden_size?"),
        ("llama", "num_hidden_layer", "did you mean num_hidden_layers?"),
        ("llama", "tie_word_embedings", "did you mean tie_word_embeddings?"),
        ("llama", "rope_thet", "did you mean rope_theta?"),
        ("llama", "atn_implementation", "did you mean attn_implementation?"),
        ("gpt2", "hiden_size", "did you mean hidden_size?"),  # its own name is n_embd
        ("gpt2", "n_layers", "did you mean n_layer?"),
        ("gpt2", "rope_theta", "leave it out"),
        ("gpt2", "num_key_value_heads", "leave it out"),
        ("llama", "favourite_colour", "leave it out"),
        ("llama", "n_ctx", "leave it out"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(family, field, hint):
    with pytest.raises(ConfigError) as error:
        load_language_model({"model_type": family, **FAMILIES[family], field: 3})
    assert_usable(error, f"got the field '{field}'", f"type '{family}'", "Need ", f"Do: {hint}")


@pytest.mark.parametrize(
    ("family", "field", "value", "read"),
    [
        ("llama", "rope_theta", 500.0, lambda config: config.rope_parameters["rope_theta"]),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, lambda config: config.rope_parameters),
        ("llama", "torch_dtype", "bfloat16", lambda config: str(config.dtype).removeprefix("torch.")),
        ("llama", "attn_implementation", "eager", lambda config: config._attn_implementation),
        ("llama", "num_labels", 5, lambda config: config.num_labels),
        ("gpt_neox", "rotary_emb_base", 300.0, lambda config: config.rope_parameters["rope_theta"]),
        ("gpt2", "num_hidden_layers", 3, lambda config: config.n_layer),
        ("bloom", "seq_length", 77, context_length),
        ("gemma3", "eos_token_id", 3, lambda config: config.eos_token_id),
    ],
)
def test_names_of_old_keep_working(family, field, value, read):
    config = _config_from_fields({"model_type": family, field: value})
    found = read(config)
    assert found.items() >= value.items() if isinstance(value, dict) else found == value


def test_every_field_of_a_configuration_is_accepted():
    for kind in ("llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen2", "gemma2", "mistral", "falcon", "phi"):
        fields = AutoConfig.for_model(kind).to_dict()
        assert _config_from_fields(fields).to_dict() == fields


# -- fitting to a tokenizer


def test_a_bare_configuration_takes_what_its_tokenizer_says():
    tokenizer, base = tiny_tokenizer(), {"model_type": "llama", **FAMILIES["llama"]}
    before = dict(base)
    fitted = fit_to_tokenizer(base, tokenizer)
    assert base == before
    assert fitted["vocab_size"] == len(tokenizer)
    assert fitted["eos_token_id"] == tokenizer.eos_token_id
    assert fitted["pad_token_id"] == tokenizer.pad_token_id
    model = load_language_model(fitted)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert fit_to_tokenizer({**base, "vocab_size": 64, "eos_token_id": 5}, tokenizer)["vocab_size"] == 64
    assert fit_to_tokenizer({**base, "eos_token_id": 5}, tokenizer)["eos_token_id"] == 5


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=rf"vocab_size 7 for a tokenizer of {len(tokenizer)} tokens; leave it out"):
        fit_to_tokenizer({"model_type": "llama", "vocab_size": 7}, tokenizer)


def test_other_bases_are_left_as_they_are(tmp_path):
    assert fit_to_tokenizer("some/name", tiny_tokenizer()) == "some/name"
    assert fit_to_tokenizer(tmp_path, tiny_tokenizer()) is tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_context_length(family):
    assert context_length(tiny_config(family)) == 64


def test_no_context_length_where_the_configuration_sets_none():
    assert context_length(AutoConfig.for_model("bloom")) is None


# -- GGUF


def write_gguf(path, model):
    """A GGUF file of a Qwen2: of all that transformers reads, the one whose projections are not permuted."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<eos>", "a", "b", "c", "ab", *(f"<{index}>" for index in range(5, config.vocab_size))])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (config.vocab_size - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_from_a_gguf_file_and_out_again(tmp_path):
    pytest.importorskip("accelerate", reason="the extra gguf is not installed")
    model = tiny_model("qwen2")
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_language_model(tmp_path / "tiny.gguf")
    assert_ready(loaded)
    assert_close(loaded(ROW).logits, model(ROW).logits)
    loaded.save_pretrained(tmp_path / "folder")  # a quantised model would refuse
    assert_same_weights(load_language_model(tmp_path / "folder"), loaded)
    assert_same_weights(load_language_model(save_checkpoint(tmp_path / "x.ckpt", loaded)), loaded)


def test_dropout_is_off_in_a_gguf_model(tmp_path, monkeypatch):
    """No GGUF file names a dropout, but a configuration class may have one as its default."""
    pytest.importorskip("accelerate", reason="the extra gguf is not installed")
    write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    read = AutoConfig.from_pretrained

    def with_dropout(*arguments, **more):
        config = read(*arguments, **more)
        config.attention_dropout = 0.5
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", with_dropout)
    loaded = load_language_model(tmp_path / "tiny.gguf")
    assert loaded.config.attention_dropout == 0.0
    first = loaded.train()(ROW).logits
    for _ in range(4):
        assert torch.equal(loaded(ROW).logits, first)


def test_a_tokenizer_from_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf", template="verbatim")
    assert tokenizer("abca", add_special_tokens=False)["input_ids"] == [4, 3, 1]
    assert tokenizer.eos_token_id == 0
    assert load_tokenizer(tmp_path / "tiny.gguf").chat_template != tokenizer.chat_template  # plain


def test_a_router_does_not_jitter_and_a_configuration_serves_twice():
    """Noise in the routing would give the policy another ratio than 1 in every pass."""
    fields = {"num_local_experts": 4, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5}
    config = AutoConfig.for_model("phimoe", vocab_size=VOCABULARY, **FAMILIES["llama"] | fields)
    models = [load_language_model(config) for _ in range(2)]
    assert [admission(model).packs for model in models] == [True, True]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        first, again = (models[0](ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, again)
