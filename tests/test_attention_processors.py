"""Finding the layers, wrapping their processors, reading their attention."""

from __future__ import annotations

import pytest
import torch
from conftest import DIM, noise, tiny_stock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from reference import RecordingAttention

from degu.attention_processors import AttentionMaps, LayerwiseStream, cross_attention_layers

TEXTS = torch.randn(3, 32, DIM, generator=torch.Generator().manual_seed(0))


def contexts(layers, tokens: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {layer.name: torch.randn(1, tokens, DIM, generator=generator) for layer in layers}


def test_layers_stand_in_the_order_they_are_evaluated_in(stock):
    layers, seen = cross_attention_layers(stock.unet), []
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda module, args, name=layer.name: seen.append(name))
    stock.unet(noise(), 10, TEXTS[:1])
    assert seen == [layer.name for layer in layers] and len(seen) == 16
    assert all(stock.unet.get_submodule(layer.name) is layer.module for layer in layers)


@pytest.mark.parametrize("height, width", [(16, 16), (24, 16), (18, 11), (13, 7)])
def test_map_sizes_are_what_the_layers_see(height, width):
    unet = tiny_stock().unet
    layers, seen = cross_attention_layers(unet), {}
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda module, args, name=layer.name: seen.update({name: args[0].shape[1]}))
    unet(torch.randn(1, 4, height, width), 10, TEXTS[:1])
    for layer in layers:
        h, w = layer.map_size((height, width))
        assert seen[layer.name] == h * w


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
@pytest.mark.parametrize("tokens", [32, 20])
def test_only_the_fidelity_rows_change_and_as_they_should(stock, processor, tokens):
    """Each layer's own context, also where it is shorter than the prompts'; the maps are textbook softmax columns."""
    unet, layers = stock.unet, cross_attention_layers(stock.unet)
    own, sample = contexts(layers, tokens), noise(3)
    unet.set_attn_processor(processor())
    plain = unet(sample, 10, TEXTS).sample
    captured = frozenset(layer.name for layer in layers if layer.decoder)
    maps = AttentionMaps(slice(2, 4))
    with LayerwiseStream(slice(1, 2), own, maps, captured).attached(layers):
        made = unet(sample, 10, TEXTS).sample
    torch.testing.assert_close(made[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
    recorders = {layer.name: RecordingAttention(own[layer.name]) for layer in layers}
    for layer in layers:
        layer.module.processor = recorders[layer.name]
    expected = unet(sample[1:2], 10, TEXTS[:1]).sample
    torch.testing.assert_close(made[1:2], expected, rtol=1e-4, atol=1e-5)
    for level in {layer.level for layer in layers if layer.decoder}:
        columns = [recorders[layer.name].probabilities[:, :, 2:4].mean(2) for layer in layers if layer.decoder and layer.level == level]
        torch.testing.assert_close(maps.mean(level), torch.stack(columns).mean(0), rtol=1e-4, atol=1e-6)


def test_keyword_arguments_reach_the_wrapped_processor(stock):
    """`cross_attention_kwargs` are filtered by the processor's own signature."""
    heard = []

    class Custom(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, loudness=0.0):
            heard.append(loudness)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    stock.unet.set_attn_processor(Custom())
    layers = cross_attention_layers(stock.unet)
    with LayerwiseStream(slice(0, 1), contexts(layers)).attached(layers):
        stock.unet(noise(), 10, TEXTS[:1], cross_attention_kwargs={"loudness": 0.5})
    assert heard == [0.5] * 32
    assert all(type(p) is Custom for p in stock.unet.attn_processors.values())


def test_maps_are_running_means():
    maps, columns = AttentionMaps(slice(0, 1)), torch.rand(5, 2, 64)
    for column in columns:
        maps.add(1, column)
    torch.testing.assert_close(maps.mean(1), columns.mean(0))
    assert len(maps._sums) == 1, "one map a resolution is kept, however many layers there are"
