"""Converters of modules that are more than the functions they call, and reasons against some."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import activations
from .builder import Refused, Trace, Value, live
from .registry import register

_PRODUCTS = "it multiplies states by each other, which is not of the form x = phi(A x + B u + b)"


@register(nn.RNN)
def _rnn(trace: Trace, module: nn.RNN, input: Value, hx: Any = None) -> tuple[Value, Any]:
    """h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), a block of states for each t and layer.

    A is strictly block-triangular with W_hh on the off-diagonal.
    """
    if not module.batch_first:
        raise Refused("nn.RNN with batch_first=False has the samples second; set batch_first=True")
    if hx is not None:
        raise Refused("nn.RNN with an initial state of its own")
    phi = activations.Tanh() if module.nonlinearity == "tanh" else activations.ReLU()
    x = input if len(input.shape) == 2 else None
    if x is None:
        raise Refused(f"nn.RNN of a sample of shape {input.shape}, expected (steps, features)")
    count = x.shape[0]
    steps = [trace.reshape(trace.gather(x, "index", t), (x.shape[1],)) for t in range(count)]
    last: list[Value] = []
    base = trace.path
    for layer in range(module.num_layers):
        ways = []
        for way in ("", "_reverse") if module.bidirectional else ("",):
            states: list[Value | None] = [None] * count
            before: Value | None = None
            for t in range(count) if not way else reversed(range(count)):
                name = f"{base}.l{layer}{way}[{t}]".lstrip(".")
                before = _step(trace, module, f"l{layer}{way}", steps[t], before, phi, name)
                states[t] = before
            ways.append(states)
            last.append(before)  # type: ignore[arg-type]
        pairs = list(zip(*ways, strict=True))
        joined = [trace.join(list(pair), 0) for pair in pairs]
        if layer + 1 < module.num_layers:
            steps = [trace.state(v, f"{base}.l{layer}[{t}]") for t, v in enumerate(joined)]
        else:
            wide = [
                trace.join([trace.reshape(v, (1, *v.shape)) for v in pair], 1) for pair in pairs
            ]
    return trace.join(wide, 0), tuple(last)


def _step(
    trace: Trace, module: nn.RNN, suffix: str, x: Value, before: Value | None,
    phi: activations.Activation, name: str,
) -> Value:  # fmt: skip
    bias = module.bias
    z = trace.linear(x, live(module, f"weight_ih_{suffix}"),
                     live(module, f"bias_ih_{suffix}") if bias else None)  # fmt: skip
    if before is not None:
        z = trace.add(z, trace.linear(before, live(module, f"weight_hh_{suffix}")))
    if bias:
        z = trace.shift(z, live(module, f"bias_hh_{suffix}"))
    return trace.activate(z, phi, name)


def implicit_layer(trace: Trace, layer: Any, input: Value) -> Value:
    """y = C x + D u + d at x = phi(A x + B u + b), a block of states that loops."""
    if not layer.adjoint.exact:
        raise Refused(f"its gradients are those of {layer.adjoint}, the model's would be exact")
    u = trace.state(input)
    x = trace.equilibrium(layer, u)
    y = trace.linear(x, live(layer, "C"), None if layer.d is None else live(layer, "d"))
    return y if layer.D is None else trace.add(y, trace.linear(u, live(layer, "D")))


def implicit_rnn(
    trace: Trace, rnn: Any, input: Value, h0: Any = None
) -> tuple[Value, tuple[Value]]:
    """h_t = layer([u_t, h_{t-1}]) with h_0 = 0: a looping block of states for each step."""
    if not rnn.batch_first:
        raise Refused("ImplicitRNN with batch_first=False has the samples second; set it to True")
    if h0 is not None or len(input.shape) != 2:
        raise Refused(f"ImplicitRNN with an initial state, or of a sample of shape {input.shape}")
    outputs: list[Value] = []
    for t in range(input.shape[0]):
        step = trace.gather(input, "index", t)
        if not outputs:  # beside a state of zeros
            joint = trace.gather(step, "pad", (0, rnn.hidden_size), "constant")
        else:
            joint = trace.join([step, outputs[-1]], 0)
        outputs.append(trace.state(implicit_layer(trace, rnn.cell, joint), f"{trace.path}[{t}]"))
    rows = [trace.reshape(h, (1, *h.shape)) for h in outputs]
    return trace.join(rows, 0), (outputs[-1],)


def refuse(reason: str, *targets: Any) -> None:
    """Register the reason why some modules, functions or methods cannot be converted."""

    def convert(trace: Trace, *_: Any, **__: Any) -> Value:
        raise Refused(reason)

    register(*targets)(convert)


refuse(f"{_PRODUCTS} (gates)", nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
refuse(
    f"{_PRODUCTS} (attention)", nn.MultiheadAttention, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer, F.scaled_dot_product_attention,
)  # fmt: skip
refuse(f"{_PRODUCTS} (bilinear)", F.bilinear)
refuse(
    "it normalises by statistics of the input, a product of states, which is not of the form "
    "x = phi(A x + B u + b); batch normalisation in eval mode is",
    F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm, F.normalize, F.rms_norm,
)  # fmt: skip
refuse("it stops gradients, which the states of a model do not", "detach", "detach_", torch.detach)
