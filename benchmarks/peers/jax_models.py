"""The networks of `benchmarks.problems` in JAX: images NHWC, weights by torch's names; no torch in here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]


def from_torch(params: Params, images: Params) -> tuple[Params, Params]:
    """Convolution weights OIHW -> HWIO, images NCHW -> NHWC."""
    weights = {k: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v for k, v in params.items()}
    moved = {k: v.transpose(0, 1, 3, 4, 2) if v.ndim == 5 else v for k, v in images.items()}
    return weights, moved


def to_torch(params: Params) -> Params:
    """Convolution weights HWIO -> OIHW."""
    return {k: v.transpose(3, 2, 0, 1) if v.ndim == 4 else v for k, v in params.items()}


def linear(params: Params, name: str, x: Any) -> Any:
    """``x @ weight.T + bias``."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def conv(x: Any, w: Any, stride: int = 1, padding: int = 0) -> Any:
    """A convolution, NHWC."""
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def norm(params: Params, name: str, x: Any, axes: tuple[int, ...]) -> Any:
    """Batch norm with the statistics of the batch, or layer norm: by the axes."""
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]


def batch_norm(params: Params, name: str, x: Any) -> Any:
    """Batch norm of images."""
    return norm(params, name, x, (0, 1, 2))


def max_pool(x: Any) -> Any:
    """The maximum of each 2x2 window; a last odd row or column is left out.

    Not ``reshape(...).max(...)``: its gradient came out as NaN in float64 (it divides by how many entries equal
    the maximum, which is none where the compiled code computes them again and rounds otherwise).
    """
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def mlp(params: Params, x: Any) -> Any:
    """Two hidden layers."""
    x = jax.nn.relu(linear(params, "layers.0", x))
    return linear(params, "head", jax.nn.relu(linear(params, "layers.1", x)))


def conv4(params: Params, x: Any) -> Any:
    """Four strided blocks, mean, head."""
    for i in range(4):
        x = conv(x, params[f"blocks.{i}.conv.weight"], 2, 1)
        x = jax.nn.relu(batch_norm(params, f"blocks.{i}.norm", x))
    return linear(params, "head", x.mean((1, 2)))


def resnet12(params: Params, x: Any) -> Any:
    """Four residual blocks, mean, head."""
    relu = lambda x: jax.nn.leaky_relu(x, 0.1)  # noqa: E731
    for i in range(4):
        y, block = x, f"blocks.{i}"
        for j in range(3):
            y = batch_norm(params, f"{block}.norms.{j}", conv(y, params[f"{block}.convs.{j}.weight"], 1, 1))
            y = relu(y) if j < 2 else y
        short = batch_norm(params, f"{block}.shortcut.1", conv(x, params[f"{block}.shortcut.0.weight"]))
        x = max_pool(relu(y + short))
    return linear(params, "head", x.mean((1, 2)))


def transformer(params: Params, tokens: Any, heads: int = 4) -> Any:
    """Two pre-norm encoder layers, mean over tokens, head."""
    x = params["embedding.weight"][tokens] + params["positions"]
    n, count, width = x.shape
    for i in range(2):
        at = f"layers.{i}"
        qkv = linear(params, f"{at}.qkv", norm(params, f"{at}.norm1", x, (-1,)))
        split = lambda t: t.reshape(n, count, heads, width // heads).swapaxes(1, 2)  # noqa: E731
        q, k, v = map(split, jnp.split(qkv, 3, -1))
        scores = jax.nn.softmax(q @ k.swapaxes(-1, -2) / (width // heads) ** 0.5, -1)
        x = x + linear(params, f"{at}.out", (scores @ v).swapaxes(1, 2).reshape(n, count, width))
        hidden = linear(params, f"{at}.up", norm(params, f"{at}.norm2", x, (-1,)))
        x = x + linear(params, f"{at}.down", jax.nn.gelu(hidden, approximate=False))
    return linear(params, "head", norm(params, "norm", x, (-1,)).mean(-2))


def torchbench(params: Params, x: Any) -> Any:
    """Three unpadded blocks with max-pool, head; ``4 * i`` and its successor are convolution and norm."""
    for i in range(3):
        x = conv(x, params[f"{4 * i}.weight"]) + params[f"{4 * i}.bias"]
        x = max_pool(jax.nn.relu(batch_norm(params, str(4 * i + 1), x)))
    return linear(params, "13", x.reshape(len(x), -1))


def mse(outputs: Any, y: Any) -> Any:
    """Mean squared error."""
    return ((outputs - y) ** 2).mean()


def cross_entropy(outputs: Any, y: Any) -> Any:
    """Mean negative log-likelihood of labels."""
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()


NETS = {
    "mlp": mlp,
    "conv4": conv4,
    "resnet12": resnet12,
    "transformer": transformer,
    "torchbench": torchbench,
}
