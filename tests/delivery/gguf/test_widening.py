"""OLMo 2 made wider by zeros: the same function in a stock model whose heads × head size is its hidden size."""

from typing import Any

import pytest
import torch

from efficientllm.delivery.gguf import widening
from efficientllm.delivery.gguf.widening import widened, widened_config, widened_shape, widens
from helpers.families import HEAD_DIM, logits, make_config, make_model

SHAPES = [  # hidden size, heads, key-value heads; heads of 8
    (24, 6, 2),  # as of the other tests: fewer hidden dimensions than queries
    (72, 6, 2),
    (50, 6, 3),
    (33, 4, 4),
    (96, 3, 1),
    (40, 1, 1),
]


def olmo(hidden: int, heads: int, kv: int, **changes: Any) -> Any:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv}
    return make_model("olmo2", **sizes, **changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_the_same(shape: tuple[int, int, int], tied: bool) -> None:
    model = olmo(*shape, tie_word_embeddings=tied, attention_bias=False)
    wide = widened(model)
    config = wide.config
    assert config.num_attention_heads * HEAD_DIM == config.hidden_size and not widens(config)
    torch.testing.assert_close(logits(wide), logits(model), rtol=1e-5, atol=1e-5)  # norms compute in float32


@pytest.mark.parametrize("name", ["norm", "q_proj", "k_proj", "q_norm", "k_norm"])
def test_every_factor_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, factors = olmo(50, 6, 3), widening._factors
    monkeypatch.setattr(widening, "_factors", lambda *configs: factors(*configs) | {name: 1.0})
    assert float((logits(widened(model)) - logits(model)).abs().max()) > 1e-4


def test_nothing_is_wider_than_it_must_be() -> None:
    def widths(hidden: int, kv: int, query: int) -> tuple[int, ...]:
        shape = widened_shape({"hidden": hidden, "ffn": 7, "kv": kv, "query": query}, 8)
        assert shape["ffn"] == 7
        return shape["hidden"], shape["kv"], shape["query"]

    assert widths(48, 2, 3) == (48, 2, 3)  # as it is
    assert widths(24, 2, 3) == (48, 2, 3)  # queries are wider
    assert widths(50, 2, 3) == (64, 2, 4)
    assert widths(72, 2, 3) == (72, 3, 3)
    assert widths(64, 1, 4) == (64, 1, 8)  # keys and values stay as few as they are
    assert widths(96, 2, 2) == (96, 2, 6)
    assert widths(64, 3, 4) == (96, 3, 4)  # a multiple of 32, as both were


def test_others_are_not_touched() -> None:
    assert not widens(make_config("llama")) and not widens(make_config("qwen3")) and widens(make_config("olmo2"))
    assert not widens(make_config("olmo2", hidden_size=48))
    assert widened_config(make_config("olmo2", hidden_size=36)).rms_norm_eps == pytest.approx(1e-2 * 36 / 48)
