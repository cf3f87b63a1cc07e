"""The layers of LLaMA and of SigLIP's vision tower, from their configurations; torch-free. Their files use the same names."""

from __future__ import annotations

from collections.abc import Iterator

from runner.families.parts.layers import Config, Layer


def llama_layers(config: Config) -> list[Layer]:
    """The layers of a LlamaModel."""
    return list(_llama(config))


def _llama(config: Config) -> Iterator[Layer]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads

    def linear(name: str, inputs: int, outputs: int) -> Layer:
        return Layer(name, name, "linear", inputs, outputs, bias=False)

    yield Layer("embed_tokens", "embed_tokens", "embedding", width, config["vocab_size"])
    for index in range(config["num_hidden_layers"]):
        block = f"layers.{index}"
        yield Layer(f"{block}.input_layernorm", f"{block}.input_layernorm", "norm", width, width, bias=False)
        yield linear(f"{block}.self_attn.q_proj", width, heads * head)
        yield linear(f"{block}.self_attn.k_proj", width, config["num_key_value_heads"] * head)
        yield linear(f"{block}.self_attn.v_proj", width, config["num_key_value_heads"] * head)
        yield linear(f"{block}.self_attn.o_proj", heads * head, width)
        yield Layer(
            f"{block}.post_attention_layernorm", f"{block}.post_attention_layernorm", "norm", width, width, bias=False
        )
        yield linear(f"{block}.mlp.gate_proj", width, inner)
        yield linear(f"{block}.mlp.up_proj", width, inner)
        yield linear(f"{block}.mlp.down_proj", inner, width)
    yield Layer("norm", "norm", "norm", width, width, bias=False)


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
    return Layer(name, name, kind, inputs, outputs, kernel)  # type: ignore[arg-type]
