"""The layers of LLaMA and of SigLIP's vision tower, from their configurations; torch-free. Their files use the same names."""

from __future__ import annotations

from collections.abc import Iterator

from runner.model.layers import Config, Layer


def llama_layers(config: Config) -> list[Layer]:
    """The layers of a LlamaModel."""
    return list(_llama(config))


def _llama(config: Config) -> Iterator[Layer]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads

    def linear(name: str, inputs: int, outputs: int) -> Layer:
        return Layer(name=name, original=name, kind="linear", inputs=inputs, outputs=outputs, bias=False)

    yield Layer(
        name="embed_tokens", original="embed_tokens", kind="embedding", inputs=width, outputs=config["vocab_size"]
    )
    for index in range(config["num_hidden_layers"]):
        block = f"layers.{index}"
        yield Layer(
            name=f"{block}.input_layernorm",
            original=f"{block}.input_layernorm",
            kind="norm",
            inputs=width,
            outputs=width,
            bias=False,
        )
        yield linear(f"{block}.self_attn.q_proj", width, heads * head)
        yield linear(f"{block}.self_attn.k_proj", width, config["num_key_value_heads"] * head)
        yield linear(f"{block}.self_attn.v_proj", width, config["num_key_value_heads"] * head)
        yield linear(f"{block}.self_attn.o_proj", heads * head, width)
        yield Layer(
            name=f"{block}.post_attention_layernorm",
            original=f"{block}.post_attention_layernorm",
            kind="norm",
            inputs=width,
            outputs=width,
            bias=False,
        )
        yield linear(f"{block}.mlp.gate_proj", width, inner)
        yield linear(f"{block}.mlp.up_proj", width, inner)
        yield linear(f"{block}.mlp.down_proj", inner, width)
    yield Layer(name="norm", original="norm", kind="norm", inputs=width, outputs=width, bias=False)


def siglip_layers(config: Config) -> list[Layer]:
    """The layers of a SiglipVisionModel without its pooling head, which nothing here uses."""
    return list(_siglip(config))


def _siglip(config: Config) -> Iterator[Layer]:
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    yield _plain("embeddings.patch_embedding", "conv", config.get("num_channels", 3), width, patch)
    yield _plain("embeddings.position_embedding", "embedding", width, (config["image_size"] // patch) ** 2)
    for index in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{index}"
        yield _plain(f"{block}.layer_norm1", "norm", width, width)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield _plain(f"{block}.self_attn.{part}", "linear", width, width)
        yield _plain(f"{block}.layer_norm2", "norm", width, width)
        yield _plain(f"{block}.mlp.fc1", "linear", width, inner)
        yield _plain(f"{block}.mlp.fc2", "linear", inner, width)
    yield _plain("post_layernorm", "norm", width, width)


def _plain(name: str, kind: str, inputs: int, outputs: int, kernel: int = 1) -> Layer:
    return Layer(name=name, original=name, kind=kind, inputs=inputs, outputs=outputs, kernel=kernel)  # type: ignore[arg-type]
