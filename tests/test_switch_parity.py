"""Switch Transformers: our model beside transformers' on the same weights, recorded ones and, with torch, new ones."""

import json

import mlx.core as mx
import numpy as np
import pytest
import switch_reference

from tiny_qmoe_mlx.original import switch_transformers as switch
from tiny_qmoe_mlx.original.t5_attention import buckets

# float32 on both sides, sums in another order; outputs reach 1 to 7, the largest error seen is 5e-6 of that
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def recorded():
    with np.load(switch_reference.FILE) as file:
        return dict(file)


def ours(config, weights):
    model = switch.Model(switch.ModelArgs.from_dict(config))
    arrays = model.sanitize({name: mx.array(array) for name, array in weights.items()})
    model.load_weights(list(arrays.items()))
    return model


def assert_close(got, want):
    error, largest = np.abs(np.array(got) - want).max(), np.abs(want).max()
    assert want.std() > 0.1 and error <= TOLERANCE * largest, f"off by {error:.3g} of {largest:.3g}"


def compare(model, case, want):
    """Encoder, the whole decoder at once, token by token, and both halves in one array."""
    encoder, decoder = (mx.array(part) for part in switch_reference.tokens(case))
    assert_close(model._encode(encoder), want["encoded"])
    assert_close(model(decoder, cache=model.make_cache(encoder)), want["logits"])
    assert_close(model(mx.concatenate([encoder, decoder], axis=1)), want["logits"])
    if "expert_capacity" in switch_reference.CASES[case]:
        return  # what is decoded by itself finds room in its expert
    cache = model.make_cache(encoder)
    steps = [model(decoder[:, i : i + 1], cache=cache) for i in range(decoder.shape[1])]
    assert_close(mx.concatenate(steps, axis=1), want["logits"])


@pytest.mark.parametrize("case", switch_reference.CASES)
def test_logits_are_those_that_transformers_computed(recorded, case):
    assert json.loads(str(recorded[f"{case}/config"])) == switch_reference.config(case)
    model = ours(switch_reference.config(case), switch_reference.recorded_weights(recorded, case))
    compare(model, case, {name: recorded[f"{case}/{name}"] for name in ("logits", "encoded")})


@pytest.mark.parametrize("case", switch_reference.CASES)
def test_logits_are_those_of_the_installed_transformers(recorded, case):
    pytest.importorskip("torch", reason="needs torch: pip install tiny-qmoe-mlx[switch]")
    reference = switch_reference.build(case)
    compare(
        ours(switch_reference.config(case), switch_reference.state(reference)),
        case,
        switch_reference.outputs(reference, case),
    )


def test_the_config_of_the_largest_model_means_blocks_that_are_all_sparse(recorded):
    config = switch_reference.config("full")
    wrong = {"num_decoder_layers": 1, "decoder_sparse_step": 0, "num_sparse_encoder_layers": 3}
    own = {k: v for k, v in config.items() if k != "tie_word_embeddings"} | wrong | {"is_full_sparse": True}
    weights = switch_reference.recorded_weights(recorded, "full")
    assert "shared.weight" in weights and "encoder.embed_tokens.weight" not in weights
    weights["decoder.lm_head.weight"] = weights.pop("lm_head.weight")
    compare(ours(own, weights), "full", {name: recorded[f"full/{name}"] for name in ("logits", "encoded")})


def test_an_output_layer_beside_tied_embeddings_is_refused(recorded):
    weights = switch_reference.recorded_weights(recorded, "tied")
    with pytest.raises(ValueError, match="should not lie beside tied embeddings, decoder.lm_head.weight does"):
        ours(switch_reference.config("tied"), {**weights, "decoder.lm_head.weight": weights["shared.weight"]})


def test_repeated_embeddings_of_old_checkpoints_are_left_out(recorded):
    weights = switch_reference.recorded_weights(recorded, "tied")
    names = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    ours(switch_reference.config("tied"), {**weights, **dict.fromkeys(names, weights["shared.weight"])})


@pytest.mark.parametrize("both", [True, False])
def test_buckets_of_relative_positions(recorded, both):
    got = buckets(np.arange(-300, 301), both, 32, 128)
    np.testing.assert_array_equal(got, recorded[f"buckets/{both}"])
