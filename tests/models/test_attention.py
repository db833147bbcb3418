"""Packed attention: its gradients, the arguments that it refuses, and the call of the flash kernel."""

from typing import Any

import pytest
import torch

from lib.models import attention
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.support.reference import TEXTS


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen2-window"])
def test_gradients_of_packed_attention_equal_those_of_texts_alone(kind: str, build: Any) -> None:
    """The gradients of a packed batch, which training uses, equal those of its texts one by one."""
    from lib.models.forward import flatten, run_equal_length, run_packed
    from lib.models.load import load_network, position_start

    spec = read_spec(str(build(kind)))
    tokens = Tokenizer(spec)(TEXTS[:5])
    gradients = []
    for packed in (True, False):
        network = load_network(spec, torch.float32, torch.device("cpu"))
        batch = flatten(tokens.ids, tokens.offsets, position_start(network), torch.device("cpu"))
        if packed:
            attention.register()
            network.set_attn_implementation(attention.NAME)
            run_packed(network, batch).pow(2).sum().backward()
        else:
            for i in range(5):
                run_equal_length(network, batch.part(i, i + 1)).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6
        )


@pytest.mark.parametrize("argument", [{"softcap": 30.0}, {"s_aux": torch.ones(1)}, {"position_bias": torch.ones(1)}])
def test_arguments_that_change_the_result_are_refused(argument: dict[str, Any]) -> None:
    """Soft caps, attention sinks and position biases raise CannotPack, which names the argument."""
    layout = attention.Layout(torch.tensor([0, 2], dtype=torch.int32), 2, ())
    states = torch.ones(1, 1, 2, 4)
    with pytest.raises(attention.CannotPack, match=next(iter(argument))):
        attention.packed_attention(torch.nn.Module(), states, states, states, None, packed=layout, **argument)


def test_flash_kernel_accepts_the_arguments() -> None:
    """Torch's operator accepts our arguments. Tensors without data show it on a machine without a GPU."""
    query, key = (torch.empty(1, heads, 10, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    layout = attention.Layout(torch.tensor([0, 4, 10], dtype=torch.int32, device="meta"), 6, ())
    rules = attention.Rules(reach=3, is_causal=True, scaling=None, dropout=0.1)
    output = attention._flash_attention(query, key, key, layout, rules)

    assert output.shape == (10, 4, 64)
