"""ImplicitRNN: the loop over time that it stands for, and what it refuses."""

import pytest
import torch
from problems import randn

from implicitdl import ImplicitRNN
from implicitdl.solvers import Anderson
from implicitdl.wellposed import InfNormBall


def by_hand(rnn, input, h):
    """The hidden states of (time, batch, features), by plain iterations of the cell's equation."""
    m, outputs = rnn.model(), []
    for u in input:
        joint = torch.cat([u, h], -1)
        x = torch.zeros(len(u), m.states)
        for _ in range(600):
            x = m.phi(x @ m.A.mT + joint @ m.B.mT + m.b)
        h = x @ m.C.mT + joint @ m.D.mT + m.d
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_states_are_those_of_a_loop(batch_first):
    rnn = ImplicitRNN(3, 4, 6, batch_first=batch_first, activation="tanh", solver=Anderson())
    u, h0 = randn(5, 2, 3), randn(1, 2, 4)
    for start in (None, h0):
        expected = by_hand(rnn, u, torch.zeros(2, 4) if start is None else start[0])
        output, last = rnn(u.transpose(0, 1) if batch_first else u, start)
        output = output.transpose(0, 1) if batch_first else output
        assert torch.allclose(output, expected, atol=1e-9)
        assert last.shape == (1, 2, 4) and torch.equal(last[0], output[-1])
    one, last = rnn(u[:, 0], h0[:, 0])  # one sequence (time, features), whatever batch_first says
    assert one.shape == (5, 4) and last.shape == (1, 4)
    assert torch.allclose(one, expected[:, 0], atol=1e-9)


def test_gradients_are_those_of_the_loop():
    rnn = ImplicitRNN(3, 4, 6, activation="tanh")
    u, h0 = randn(4, 2, 3).requires_grad_(), randn(1, 2, 4).requires_grad_()
    at = [u, h0, *rnn.parameters()]
    got = torch.autograd.grad(rnn(u, h0)[0].square().sum(), at)
    expected = torch.autograd.grad(by_hand(rnn, u, h0[0]).square().sum(), at)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_its_cell_as_a_model_and_what_is_proved_of_it():
    rnn = ImplicitRNN(3, 4, 6, well_posed=InfNormBall(kappa=0.7))
    model = rnn.model()
    assert (model.inputs, model.states, model.outputs) == (7, 6, 4)
    u, h = randn(2, 3), randn(2, 4)
    assert torch.allclose(model(torch.cat([u, h], 1)), rnn(u[None], h[None])[1][0], atol=1e-9)
    model(torch.zeros(1, 7)).sum().backward()
    assert rnn.cell.C.grad is not None
    assert rnn.certificate().well_posed
    assert rnn.certificate(refute=False).contraction <= 0.7 + 1e-9


ZEROS = torch.zeros


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (([1.0],), TypeError, "input: got list, expected a tensor"),
        ((ZEROS(2, 1, 5),), ValueError, "input: got shape (2, 1, 5), expected (*batch, 3)"),
        ((ZEROS(3),), ValueError, "input: got shape (3,), expected (time, batch, 3) or"),
        ((ZEROS(2, 2, 1, 3),), ValueError, "input: got shape (2, 2, 1, 3), expected (time, batch, 3)"),
        ((ZEROS(0, 2, 3),), ValueError, "input: got shape (0, 2, 3), expected at least one time step"),
        ((ZEROS(0, 3),), ValueError, "input: got shape (0, 3), expected at least one time step"),
        ((ZEROS(2, 1, 3).float(),), ValueError, "input: got torch.float32, expected torch.float64"),
        ((ZEROS(2, 1, 3, device="meta"),), ValueError, "input: got a tensor on meta, expected cpu"),
        ((ZEROS(2, 1, 3), [0.0]), TypeError, "h0: got list, expected a tensor"),
        ((ZEROS(2, 1, 3), ZEROS(1, 4)), ValueError, "h0: got shape (1, 4), expected (1, 1, 4)"),
        ((ZEROS(2, 1, 3), ZEROS(1, 1, 3)), ValueError, "h0: got shape (1, 1, 3), expected"),
        ((ZEROS(2, 1, 3), ZEROS(1, 1, 4).float()), ValueError, "h0: got torch.float32, expected"),
    ],
    ids=str,
)  # fmt: skip
def test_inputs(arguments, kind, words):
    with pytest.raises(kind) as error:
        ImplicitRNN(3, 4, 5)(*arguments)
    assert str(error.value).startswith(words)


def test_no_time_steps_where_the_batch_comes_first():
    rnn = ImplicitRNN(3, 4, 5, batch_first=True)
    with pytest.raises(ValueError, match=r"got shape \(2, 0, 3\), expected at least one time step"):
        rnn(torch.zeros(2, 0, 3))
    with pytest.raises(ValueError, match=r"expected \(batch, time, 3\)"):
        rnn(torch.zeros(3))
    output, last = rnn(torch.zeros(0, 2, 3))  # no sequences are fine
    assert output.shape == (0, 2, 4) and last.shape == (1, 0, 4)


def test_construction():
    for sizes, name in (((0, 4, 5), "input_size"), (("a", 4, 5), "input_size"),
                        ((3, True, 5), "hidden_size"), ((3, 4, 0), "state_features")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got"):
            ImplicitRNN(*sizes)
    with pytest.raises(TypeError, match="batch_first: got 'no'"):
        ImplicitRNN(3, 4, 5, batch_first="no")


def test_autocast(float32):
    rnn = ImplicitRNN(3, 4, 5)
    u = torch.randn(3, 2, 3)
    expected = rnn(u)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for input in (u, u.bfloat16()):
            output, last = rnn(input, torch.zeros(1, 2, 4))
            assert torch.allclose(output.float(), expected, atol=0.1)
            rnn(input, last)  # the state goes on in the dtype that it has
            assert last.dtype is torch.bfloat16
