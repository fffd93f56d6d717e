"""The algebra of implicit models: every operator against the composition of functions it stands for."""

import json
import re
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from problems import monotone_matrix, randn, row_sums
from safetensors.torch import save_file

from implicitdl import ConvergenceError, ImplicitModel, NotWellPosedError, stack
from implicitdl.activations import (
    Activation,
    Blocks,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Softmax,
    SoftShrink,
    Tanh,
)
from implicitdl.solvers import Auto, Picard

TIGHT = Auto(rtol=1e-14, atol=1e-15)


def model(n=5, p=3, q=2, phi="relu", seed=0, kappa=0.6, requires_grad=False):
    t = [row_sums(randn(n, n, seed=seed), kappa), randn(n, p, seed=seed + 1),
         randn(q, n, seed=seed + 2), randn(q, p, seed=seed + 3),
         randn(n, seed=seed + 4), randn(q, seed=seed + 5)]  # fmt: skip
    if requires_grad:
        for x in t:
            x.requires_grad_()
    return ImplicitModel(*t, phi)


def tensors(*models):
    return [getattr(m, name) for m in models for name in "ABCDbd"]


def run(m, u, steps=200):
    """y by a plain loop: nothing of the library but phi."""
    x = torch.zeros(*u.shape[:-1], m.states)
    for _ in range(steps):
        x = m.phi(x @ m.A.mT + u @ m.B.mT + m.b)
    return x @ m.C.mT + u @ m.D.mT + m.d


def agree(combined, function, originals, p=3):
    """Values to 1e-12, and gradients to every original tensor."""
    u = randn(4, p, seed=77).requires_grad_()
    got, expected = combined(u, solver=TIGHT), function(u)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))
    w = randn(*got.shape, seed=78)
    at = [u, *tensors(*originals)]
    g = torch.autograd.grad((w * got).sum(), at)
    h = torch.autograd.grad((w * expected).sum(), at)
    for a, b in zip(g, h, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-10 * float(b.abs().max() + 1))


# --- what it computes


@pytest.mark.parametrize(
    "phi", ["relu", "tanh", "softmax", Blocks(parts=((Softmax(), 2), (Sigmoid(), 3)))]
)
def test_the_model_is_its_equation(phi):
    m = model(phi=phi, requires_grad=True)
    agree(m, lambda u: run(m, u), [m])


def test_any_batch_shape():
    m = model()
    u = randn(2, 3, 4, 3)
    y = m(u)
    assert y.shape == (2, 3, 4, 2) and torch.allclose(y, run(m, u), atol=1e-11)
    assert torch.allclose(m(u[0, 0, 0]), y[0, 0, 0], atol=1e-11)
    assert m(u[:0]).shape == (0, 3, 4, 2)
    s = m.solve(u, record=True)
    assert s.value.shape == (2, 3, 4, 5) and s.residual.shape == s.steps.shape == (2, 3, 4)
    assert s.stats["trajectory"].shape == (s.stats["evaluations"] + 1, 2, 3, 4, 5)
    assert torch.equal(s.stats["trajectory"][-1], s.value)


def test_defaults_are_zeros():
    m = ImplicitModel(torch.zeros(2, 2), torch.eye(2), torch.eye(2))
    assert m.D.shape == (2, 2) and m.b.shape == (2,) and m.d.shape == (2,)
    assert not any(bool(t.any()) for t in (m.D, m.b, m.d))
    assert torch.equal(m(torch.tensor([[-1.0, 2.0]])), torch.tensor([[0.0, 2.0]]))
    assert (m.states, m.inputs, m.outputs) == (2, 2, 2) and m.activation == ReLU()
    assert repr(m) == "ImplicitModel(states=2, inputs=2, outputs=2, phi=ReLU(), float64)"


def test_warm_start():
    m = model(kappa=0.95)
    u = randn(4, 3)
    cold = m.solve(u, solver=Picard())
    warm = m.solve(u, x0=cold.value, solver=Picard())
    assert int(warm.steps.max()) <= 4 and int(cold.steps.min()) > 16  # Picard looks at 1, 3 or 4
    with pytest.raises(ValueError, match=re.escape("x0: got shape (4, 3), expected (*batch, 5)")):
        m.solve(u, x0=u)
    with pytest.raises(ValueError, match=re.escape("x0: got shape (3, 5), expected (4, 5)")):
        m.solve(u, x0=cold.value[:3])


def test_the_facts_it_gives_to_the_solver():
    assert model(kappa=0.55).solve(randn(50, 3)).stats["solver"] == "Picard"
    upper = model(n=40, kappa=4.0)
    upper = ImplicitModel(torch.triu(upper.A, 1), *tensors(upper)[1:])
    s = upper.solve(randn(50, 3))
    assert "triangular" in s.stats["reason"] and int(s.steps.max()) <= 41
    facts = model(phi=LeakyReLU(negative_slope=-2.0), kappa=0.6)._facts()
    assert facts["contraction"] is None  # 0.6 times a slope of 2
    assert model(phi="softmax")._facts()["acyclic"] is False
    # A softmax couples the states: zeros on and below the diagonal do not make it one pass.
    m = model(phi="softmax", kappa=0.5)
    m = ImplicitModel(torch.triu(m.A, 1), *tensors(m)[1:], phi="softmax")
    assert not m._facts()["acyclic"]
    assert torch.allclose(m(randn(4, 3)), run(m, randn(4, 3)), atol=1e-10)


def test_failures_say_which_sample():
    m = ImplicitModel(3 * torch.eye(2), torch.eye(2), torch.eye(2), phi="identity")
    u = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ConvergenceError, match="index 1"):
        m(u, solver=Picard())
    s = m.solve(u, solver=Picard(), on_failure="return")
    assert s.converged.tolist() == [True, False]


# --- what does not fit


@pytest.mark.parametrize(
    "change, words",
    [
        ({"A": torch.zeros(5, 4)}, "A has shape (5, 4), expected (5, 5)"),
        ({"A": torch.zeros(5)}, "A is (5,), expected a matrix"),
        ({"A": [[1.0]]}, "A is list, expected a matrix"),
        ({"B": torch.zeros(4, 3)}, "B has shape (4, 3), expected (5, 3)"),
        ({"C": torch.zeros(2, 4)}, "C has shape (2, 4), expected (2, 5)"),
        ({"D": torch.zeros(3, 2)}, "D has shape (3, 2), expected (2, 3)"),
        ({"b": torch.zeros(5, 1)}, "b has shape (5, 1), expected (5,)"),
        ({"d": torch.zeros(5)}, "d has shape (5,), expected (2,)"),
        ({"B": torch.zeros(5, 3).float()}, "B is torch.float32 on cpu, expected torch.float64"),
        ({"d": torch.zeros(2, device="meta")}, "d is torch.float64 on meta, expected torch.float64 on cpu"),
        ({"phi": Blocks.of(ReLU(), 4)}, "phi is for 4 states, expected 5"),
        ({"phi": "rellu"}, "Did you mean 'relu'"),
    ],
    ids=str,
)  # fmt: skip
def test_construction(change, words):
    m = model()
    parts = {name: getattr(m, name) for name in "ABCDbd"} | {"phi": "relu"} | change
    with pytest.raises((ValueError, TypeError)) as error:
        ImplicitModel(**parts)
    assert words in str(error.value)


def test_integers_are_no_weights():
    with pytest.raises(ValueError, match="torch.int64, expected a floating"):
        ImplicitModel(*[torch.eye(2, dtype=torch.long)] * 3)


@pytest.mark.parametrize(
    "u, kind, words",
    [
        (torch.zeros(4, 5), ValueError, "u: got shape (4, 5), expected (*batch, 3)"),
        (torch.zeros(()), ValueError, "u: got shape (), expected (*batch, 3)"),
        (torch.zeros(4, 3).float(), ValueError, "u: got torch.float32, expected torch.float64"),
        (torch.zeros(4, 3, dtype=torch.long), ValueError, "u: got torch.int64, expected torch.float64"),
        (torch.zeros(4, 3, device="meta"), ValueError, "u: got a tensor on meta, expected cpu"),
        ([[0.0, 0.0, 0.0]], TypeError, "u: got list, expected a tensor (*batch, 3)"),
    ],
    ids=str,
)  # fmt: skip
def test_inputs(u, kind, words):
    with pytest.raises(kind) as error:
        model()(u)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_operators_name_what_does_not_fit():
    f, g = model(p=3, q=2), model(p=4, q=2)
    for act, words in (
        (lambda: g @ f, "g @ f: f has 2 outputs, g takes 4 inputs"),
        (lambda: f + g, "f + g: f maps 3 -> 2, g maps 4 -> 2"),
        (lambda: stack(f, g), "stack: f takes 3 inputs, g 4"),
        (lambda: f.feedback(torch.zeros(2, 3)), "feedback: K has shape (2, 3), expected (3, 2)"),
        (lambda: f.permute([0, 1, 2, 3]), "got [0, 1, 2, 3], expected a permutation of 0..4"),
        (lambda: f.permute([0, 1, 2, 3, 3]), "got [0, 1, 2, 3, 3], expected a permutation of 0..4"),
        (
            lambda: f.permute(torch.tensor([1.0, 0, 2, 3, 4])),
            "got [1.0, 0.0, 2.0, 3.0, 4.0], expected",
        ),
        (lambda: f.permute([True, False, 2, 3, 4]), "got [True, False, 2, 3, 4], expected"),
        (lambda: f.permute("abcde"), "got ['a', 'b', 'c', 'd', 'e'], expected"),
        (lambda: f.permute(3), "got [3], expected a permutation"),
        (lambda: f.permute(range(9)), "got [0, 1, 2, 3, 4, 5, 6, 7, ...], expected a permutation"),
    ):
        with pytest.raises(ValueError) as error:
            act()
        assert words in str(error.value)
    for act in (lambda: f @ 3, lambda: f + 3):
        with pytest.raises(TypeError):
            act()


# --- the algebra


def test_cascade():
    f = model(n=5, p=3, q=4, phi="tanh", requires_grad=True)
    g = model(n=6, p=4, q=2, phi="relu", seed=20, requires_grad=True)
    agree(g @ f, lambda u: run(g, run(f, u)), [f, g])
    assert (g @ f).phi == Blocks(parts=((ReLU(), 6), (Tanh(), 5)))
    assert torch.equal((g @ f).A[6:, :6], torch.zeros(5, 6))
    h = model(n=2, p=2, q=3, seed=40)
    left, right = (h @ g) @ f, h @ (g @ f)
    for a, b in zip(tensors(left), tensors(right), strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def test_the_cascade_is_associative_and_keeps_the_order_of_states():
    f, g, h = model(5, 3, 2), model(4, 2, 3, "tanh", 10), model(3, 3, 2, "relu", 20)
    u = randn(4, 3, seed=77)
    left, right = ((h @ g) @ f)(u, solver=TIGHT), (h @ (g @ f))(u, solver=TIGHT)
    assert torch.allclose(left, right, rtol=0, atol=1e-12) and (h @ g @ f).phi.size == 12
    x = (g @ f).solve(u, solver=TIGHT).value  # the states of g, then those of f
    assert torch.allclose(x[:, 4:], f.solve(u, solver=TIGHT).value, atol=1e-12)
    assert torch.allclose(x[:, :4], g.solve(f(u, solver=TIGHT), solver=TIGHT).value, atol=1e-12)


def test_sum():
    f = model(n=5, phi="tanh", requires_grad=True)
    g = model(n=4, phi="softmax", seed=20, requires_grad=True)
    agree(f + g, lambda u: run(f, u) + run(g, u), [f, g])


def test_stack():
    f = model(n=5, q=2, phi="tanh", requires_grad=True)
    g = model(n=4, q=3, seed=20, requires_grad=True)
    agree(stack(f, g), lambda u: torch.cat([run(f, u), run(g, u)], dim=-1), [f, g])


def test_feedback():
    f = model(kappa=0.3, phi="tanh", requires_grad=True)
    K = (0.05 * randn(3, 2, seed=50)).requires_grad_()

    def loop(v):
        y = torch.zeros(4, 2)
        for _ in range(150):
            y = run(f, v + y @ K.mT, steps=40)
        return y

    agree(f.feedback(K), loop, [f])
    u, w = randn(4, 3, seed=77), randn(4, 2, seed=78)
    (got,) = torch.autograd.grad((w * f.feedback(K)(u, solver=TIGHT)).sum(), K)
    (expected,) = torch.autograd.grad((w * loop(u)).sum(), K)
    assert torch.allclose(got, expected, atol=1e-10)


def test_a_loop_without_an_answer_is_refused():
    m = ImplicitModel(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="I - D K is singular"):
        m.feedback(torch.ones(1, 1))


@pytest.mark.parametrize("kappa", [None, 0.8, 0.95])
def test_rescale(kappa):
    A = row_sums(randn(6, 6, seed=1), 1.0)
    S = torch.diag(torch.tensor([1.0, 5.0, 0.2, 3.0, 0.1, 1.0]))
    A = 0.6 * S @ A @ torch.linalg.inv(S)  # Perron root of |A| is 0.6, the norm is far larger
    assert float(A.abs().sum(1).max()) > 2
    parts = [A, randn(6, 3), randn(2, 6), randn(2, 3), randn(6), randn(2)]
    m = ImplicitModel(*[t.requires_grad_() for t in parts], phi=LeakyReLU())
    agree(m.rescale(kappa), lambda u: run(m, u), [m])
    norm = float(m.rescale(kappa).A.detach().abs().sum(1).max())
    assert norm <= (kappa or 0.8) + 1e-12 and norm < 1


def test_rescale_refuses():
    with pytest.raises(ValueError, match="rescale: Tanh.* not positively homogeneous"):
        model(phi="tanh").rescale()
    m = ImplicitModel(1.2 * torch.eye(2), torch.eye(2), torch.eye(2))
    with pytest.raises(NotWellPosedError) as error:
        m.rescale()
    assert error.value.margin == pytest.approx(-0.2)
    with pytest.raises(NotWellPosedError):
        ImplicitModel(0.9 * torch.eye(2), torch.eye(2), torch.eye(2)).rescale(0.8)


def test_permute():
    phi = Blocks(parts=((Tanh(), 2), (ReLU(), 1), (Softmax(), 2)))
    m = model(phi=phi, requires_grad=True)
    order = torch.tensor([2, 4, 3, 1, 0])
    permuted = m.permute(order)
    agree(permuted, lambda u: run(m, u), [m])
    u = randn(4, 3)
    assert torch.allclose(permuted.solve(u).value, m.solve(u).value[:, order], atol=1e-11)
    assert permuted.phi == Blocks(parts=((ReLU(), 1), (Softmax(), 2), (Tanh(), 2)))
    back = permuted.permute(order.argsort())
    assert all(torch.equal(a, b) for a, b in zip(tensors(back), tensors(m), strict=True))
    with pytest.raises(ValueError, match="2 states of a Softmax.* must stay together"):
        m.permute([3, 0, 1, 2, 4])


def test_permute_keeps_two_softmax_blocks_apart():
    """Two neighbours of the same kind are still two."""
    m = model(n=4, phi=Blocks(parts=((Softmax(), 2), (Softmax(), 2))))
    order = [2, 3, 0, 1]
    u = randn(4, 3)
    assert torch.allclose(m.permute(order)(u), run(m, u), atol=1e-11)


def test_certificate():
    assert model(kappa=0.6).certificate().status == "well-posed"
    assert model(kappa=0.6).certificate().contraction <= 0.6 + 1e-9
    bad = ImplicitModel(2 * torch.eye(1), torch.eye(1), torch.eye(1))
    assert bad.certificate().status == "ill-posed"
    m = ImplicitModel(monotone_matrix(5), *tensors(model())[1:])
    assert m.certificate().well_posed


# --- files


PHIS = ["relu", LeakyReLU(negative_slope=0.3), Blocks(parts=((Softmax(), 2), (Identity(), 3)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_save_and_load(tmp_path, phi, dtype):
    path = tmp_path / "model.safetensors"
    m = ImplicitModel(*[t.to(dtype) for t in tensors(model())], phi=phi)
    m.save(path)
    again = ImplicitModel.load(str(path))
    assert again.phi == m.phi and again.A.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(tensors(m), tensors(again), strict=True))


def test_save_takes_views_and_parameters(tmp_path):
    path = tmp_path / "model.safetensors"
    base = randn(5, 5).requires_grad_()
    m = ImplicitModel(base.mT * 0.1, base[:, :3], base[:2], base[:2, :3], base[0], base[:2, 0])
    m.save(path)
    again = ImplicitModel.load(path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(m), tensors(again), strict=True))
    assert not again.A.requires_grad


def test_shared_tensors_are_saved(tmp_path):
    A = 0.3 * torch.eye(3)
    m = ImplicitModel(A, A, A)
    m.save(tmp_path / "m")
    assert torch.equal(ImplicitModel.load(tmp_path / "m").C, A)


def header(**changes):
    config = {"version": 1, "phi": {"name": "ReLU"}} | changes
    return {"implicitdl.ImplicitModel": json.dumps(config)}


def parts(**changes):
    return {k: t.contiguous() for k, t in zip("ABCDbd", tensors(model()), strict=True)} | changes


FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 300),
    "a pickle": lambda path: torch.save({"A": torch.zeros(2)}, path),
    "foreign": lambda path: save_file({"weight": torch.zeros(2)}, path),
    "foreign names": lambda path: save_file({"weight": torch.zeros(2)}, path, metadata=header()),
    "no header": lambda path: save_file(parts(), path),
    "bad header": lambda path: save_file(parts(), path, metadata={"implicitdl.ImplicitModel": "{"}),
    "list header": lambda path: save_file(
        parts(), path, metadata={"implicitdl.ImplicitModel": "[]"}
    ),
    "later version": lambda path: save_file(parts(), path, metadata=header(version=2)),
    "true version": lambda path: save_file(parts(), path, metadata=header(version=True)),
    "integers": lambda path: save_file(
        {k: t.long() for k, t in parts().items()}, path, metadata=header()
    ),
    "scalars": lambda path: save_file(
        {k: torch.ones(()) for k in "ABCDbd"}, path, metadata=header()
    ),
    "unknown phi": lambda path: save_file(parts(), path, metadata=header(phi={"name": "Relu6"})),
    "no phi": lambda path: save_file(parts(), path, metadata=header(phi=None)),
    "phi without a name": lambda path: save_file(parts(), path, metadata=header(phi={})),
    "phi with another option": lambda path: save_file(
        parts(), path, metadata=header(phi={"name": "ReLU", "slope": 3})
    ),
    "no parts": lambda path: save_file(parts(), path, metadata=header(phi={"name": "Blocks"})),
    "bad parts": lambda path: save_file(
        parts(), path, metadata=header(phi={"name": "Blocks", "parts": [3]})
    ),
    "shapes": lambda path: save_file(parts(B=torch.zeros(4, 3)), path, metadata=header()),
    "dtypes": lambda path: save_file(parts(B=torch.zeros(5, 3).float()), path, metadata=header()),
    "one lacks": lambda path: save_file(
        {k: t for k, t in parts().items() if k != "D"}, path, metadata=header()
    ),
    "one too many": lambda path: save_file(parts(E=torch.zeros(1)), path, metadata=header()),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_and_foreign_files_are_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    model().save(path)
    FILES[kind](path)
    with pytest.raises(ValueError) as error:
        ImplicitModel.load(path)
    assert str(path) in str(error.value) and len(str(error.value)) > len(str(path)) + 10


def test_what_a_refusal_says(tmp_path):
    path = tmp_path / "m"
    FILES["later version"](path)
    with pytest.raises(ValueError, match="version 2, expected 1"):
        ImplicitModel.load(path)
    FILES["foreign"](path)
    with pytest.raises(ValueError, match=r"not a saved ImplicitModel: it holds \['weight'\]"):
        ImplicitModel.load(path)
    with pytest.raises(FileNotFoundError):
        ImplicitModel.load(tmp_path / "absent")


# --- models of others


def test_from_torchidl():
    """There A is scaled as a whole by kappa / ||A||_inf where its norm exceeds kappa."""
    A, B, C, D = 2 * randn(5, 5), randn(5, 3), randn(2, 5), randn(2, 3)
    state = {"A": A, "B": B, "C": C, "D": D}
    m = ImplicitModel.from_torchidl(state, kappa=0.9)
    assert torch.allclose(m.A, A * 0.9 / A.abs().sum(1).max())
    assert float(m.A.abs().sum(1).max()) == pytest.approx(0.9)
    u = randn(4, 3)
    x = torch.zeros(4, 5)
    for _ in range(500):
        x = (x @ m.A.mT + u @ B.mT).relu()
    assert torch.allclose(m(u), x @ C.mT + u @ D.mT, atol=1e-10)
    small = ImplicitModel.from_torchidl({"A": A / 100, "B": B, "C": C}, phi="tanh")
    assert torch.equal(small.A, A / 100) and not small.D.any() and small.activation == Tanh()
    L, R = randn(5, 2, seed=1), randn(5, 2, seed=2)
    low = ImplicitModel.from_torchidl({"L": L, "R": R, "B": B, "C": C}, kappa=0.5)
    # First each factor, then the product: what is below the bound is left alone.
    L, R = 0.5 * L / L.abs().sum(1).max(), 0.5 * R / R.mT.abs().sum(1).max()
    W = L @ R.mT
    assert torch.allclose(low.A, W * min(1.0, 0.5 / float(W.abs().sum(1).max())))
    upper = ImplicitModel.from_torchidl(state, kappa=None)
    assert torch.equal(upper.A, A.triu(1))
    biased = ImplicitModel.from_torchidl(state, kappa=0.9, bias=True)
    assert torch.equal(biased.b, B[:, -1]) and torch.equal(biased.d, D[:, -1])
    close = biased(u[:, :2]) - m(torch.cat([u[:, :2], torch.ones(4, 1)], 1))
    assert float(close.abs().max()) < 1e-10
    with pytest.raises(ValueError, match=r"no 'B' among \['A', 'C'\]"):
        ImplicitModel.from_torchidl({"A": A, "C": C})


def test_a_softmax_triangle_is_not_acyclic():
    """Softmax couples its states: they depend on each other through more than A."""
    A = 0.5 * randn(5, 5).triu(1)
    for phi, acyclic in (("softmax", False), ("tanh", True)):
        m = ImplicitModel(A, randn(5, 3), randn(2, 5), phi=phi)
        assert m._facts()["acyclic"] is acyclic
        assert ("triangular" in m.solve(randn(4, 3)).stats["reason"]) is acyclic


# --- what a fresh reader broke


def exact_solution(M, c):
    """x with M x = c, in rational arithmetic."""
    n = len(c)
    rows = [[*row, right] for row, right in zip(M, c, strict=True)]
    for i in range(n):
        pivot = next(k for k in range(i, n) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [a / rows[i][i] for a in rows[i]]
        for k in range(n):
            if k != i:
                rows[k] = [a - rows[k][i] * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def exact_state(A, v, on):
    """The x of x_i = (A x + v)_i where `on`, else 0; and A x + v, both in rational arithmetic."""
    A, v, n = [[Fraction(a) for a in row] for row in A], [Fraction(a) for a in v], len(v)
    M = [[Fraction(i == j) - (A[i][j] if on[i] else 0) for j in range(n)] for i in range(n)]
    x = exact_solution(M, [v[i] if on[i] else Fraction(0) for i in range(n)])
    return x, [
        sum((a * b for a, b in zip(row, x, strict=True)), w) for row, w in zip(A, v, strict=True)
    ]


@pytest.mark.parametrize("phi", ["identity", "relu"])
@pytest.mark.parametrize("seed", range(60))
def test_the_error_bound_covers_rounding(seed, phi):
    """x* is a rational number, piece by piece of phi, and so is its distance from what was found."""
    n = 1 + seed % 6
    A = row_sums(randn(n, n, seed=seed), 0.3 + 0.1 * (seed % 7))
    m = ImplicitModel(A, torch.eye(n), torch.eye(n), phi=phi)
    u = randn(4, n, seed=seed + 100)
    solution = m.solve(u, solver="newton" if seed % 2 else "picard")
    weights = m.certificate(refute=False).weights.tolist()
    assert solution.error_bound.shape == (4,) and float(solution.error_bound.max()) < 1e-9
    for x, v, bound in zip(solution.value.tolist(), u.tolist(), solution.error_bound, strict=True):
        on = [phi == "identity" or xi > 0 for xi in x]
        exact, s = exact_state(A.tolist(), v, on)
        if phi == "relu":  # the pieces were right: this is the one equilibrium
            assert all((si > 0) == o for si, o in zip(s, on, strict=True))
        pairs = zip(x, exact, weights, strict=True)
        distance = max(abs(Fraction(a) - b) / Fraction(w) for a, b, w in pairs)
        assert distance <= Fraction(float(bound))


@pytest.mark.parametrize("seed", range(20))
def test_the_error_bound_covers_rounding_before_phi(seed):
    """x = (a x + v) - t where that is positive: x is of order 1, what is rounded of order t."""
    a, t = 0.9 * float(torch.rand((), generator=torch.Generator().manual_seed(seed))), 1e6
    m = ImplicitModel(*(torch.tensor([[c]]) for c in (a, 1.0, 1.0)), phi=SoftShrink(threshold=t))
    v = t + 1 + randn(30, 1, seed=seed).abs()
    solution = m.solve(v, solver=Picard(rtol=1e-15))
    for x, vi, bound in zip(solution.value, v, solution.error_bound, strict=True):
        exact = (Fraction(float(vi)) - Fraction(t)) / (1 - Fraction(a))
        assert abs(Fraction(float(x)) - exact) <= Fraction(float(bound)) < 1e-6


def test_the_allowance_for_rounding_is_of_the_size_of_rounding():
    """A bound that is true because it is huge would be of no use."""
    m = model(n=30, kappa=0.6)
    solution = m.solve(randn(8, 3), solver=TIGHT)
    assert float(solution.error_bound.max()) < 1e-12 * float(solution.value.detach().abs().max())


def test_the_error_bound_of_a_sample_without_a_solution_is_infinite():
    u = randn(3, 3)
    u[1, 0] = torch.nan
    bound = model().solve(u, on_failure="return").error_bound
    assert bound.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("phi", ["softmax", "tanh"])
def test_the_error_bound_of_float32_is_that_of_its_solve(phi):
    """Against the same equation solved in float64."""
    A = row_sums(randn(12, 12), 0.7).float()
    B, C = randn(12, 3, seed=1).float(), torch.eye(12).float()
    u = randn(20, 3, seed=2).float()
    m = ImplicitModel(A, B, C, phi=phi)
    solution = m.solve(u)
    v = torch.nn.functional.linear(u, B, m.b).double()
    x = torch.zeros(20, 12)
    for _ in range(200):
        x = m.phi(x @ A.double().mT + v)
    distance = m.certificate(refute=False).measure(solution.value.double() - x)
    assert bool((distance <= solution.error_bound).all())
    assert float(solution.error_bound.max()) < 1e-4


def test_no_bound_without_a_certificate():
    m = ImplicitModel(4 * torch.eye(2), torch.eye(2), torch.eye(2), phi="tanh")
    assert m.solve(torch.ones(3, 2), on_failure="return").error_bound is None
    upper = ImplicitModel(torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.eye(2), torch.eye(2))
    assert float(upper.solve(torch.ones(3, 2)).error_bound.max()) < 1e-13


class Coupled(Activation, register=False):
    """phi(z)_i = c sum_j z_j: of 2-norm c n, of infinity norm c n, or not declared."""

    slope = (0.0, 0.3)
    entrywise = False

    def __call__(self, z):
        return 0.1 * z.sum(-1, keepdim=True).expand_as(z)


class Declared(Coupled, register=False):
    infinity_lipschitz = 0.8


def test_a_block_activation_contracts_by_its_constant_in_the_infinity_norm():
    """`slope` bounds the 2-norm of its Jacobian alone, and is no constant of the infinity norm."""
    A = row_sums(randn(3, 3), 1.1)
    facts = [
        ImplicitModel(A, torch.eye(3), torch.eye(3), phi=phi)._facts()
        for phi in (Coupled(), Declared(), Softmax(), Blocks(parts=((Declared(), 2), (ReLU(), 1))))
    ]
    expected = [None, 0.88, 0.55, None]
    assert [f["contraction"] for f in facts] == pytest.approx(expected)
    assert not any(f["acyclic"] for f in facts)


def test_bounds_cost_nothing_where_nobody_reads_them(monkeypatch):
    m, u = model(), randn(2, 3)
    monkeypatch.setattr(
        "implicitdl.wellposed.certificate", lambda *_, **__: pytest.fail("certified")
    )
    assert m(u).shape == (2, 2)
    with pytest.raises(pytest.fail.Exception, match="certified"):
        m.solve(u)


def test_models_of_different_kinds_are_not_mixed():
    m, other = model(), model()
    small = ImplicitModel(*(getattr(other, k).float() for k in "ABCDbd"), phi="relu")
    for mix in (lambda: m + small, lambda: stack(m, small), lambda: m @ small):
        with pytest.raises(ValueError, match="torch.float32.*expected one dtype"):
            mix()
    with pytest.raises(TypeError, match="stack: got int"):
        stack(m, 3)
    with pytest.raises(TypeError, match="K is list"):
        m.feedback([[0.0]])
    for K in (torch.zeros(3, 2).float(), torch.zeros(3, 2, device="meta")):
        with pytest.raises(
            ValueError, match=r"feedback: K is .*expected torch.float64 on cpu as A"
        ):
            m.feedback(K)
    with pytest.raises(TypeError, match="b is float"):
        ImplicitModel(m.A, m.B, m.C, b=0.0)
    with pytest.raises(ValueError, match="at least one state"):
        ImplicitModel(torch.zeros(0, 0), torch.zeros(0, 2), torch.zeros(2, 0))


def test_a_model_in_half_precision_and_under_autocast_is_solved_in_full():
    m = model()
    half = ImplicitModel(*(getattr(m, k).to(torch.bfloat16) for k in "ABCDbd"), phi="relu")
    u = torch.randn(4, m.inputs)
    assert half.solve(u.bfloat16()).value.dtype is torch.float32
    assert half(u.bfloat16()).dtype is torch.bfloat16
    single = ImplicitModel(*(getattr(m, k).float() for k in "ABCDbd"), phi="relu")
    expected = single.solve(u.float()).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(single.solve(u.float()).value, expected, atol=1e-5)
        assert single(u.float()).shape == (4, m.outputs)
        for other in (m, single, half):  # an input of a layer before, in autocast's dtype
            assert other(u.bfloat16()).shape == (4, m.outputs)
        A = single.A.clone().requires_grad_()
        ImplicitModel(A, *tensors(single)[1:])(u.float()).float().square().sum().backward()
    inside, A.grad = A.grad, None
    ImplicitModel(A, *tensors(single)[1:])(u.float()).square().sum().backward()
    assert torch.allclose(inside, A.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("phi", [
    {"name": ["a"]}, {"name": "HardTanh", "low": "a"}, {"name": "ReLU", "x": 1}, 3, None,
    {"name": "Blocks", "parts": "ab"}, {"name": "Blocks", "parts": [[{"name": "ReLU"}, True]]},
    {"name": "Blocks", "parts": [[{"name": "ReLU"}, 5, 6]]}, {"name": "LeakyReLU", "negative_slope": None},
    {"name": "ELU", "alpha": 10**400}, {"name": "LeakyReLU", "negative_slope": float("nan")},
], ids=str)  # fmt: skip
def test_a_malicious_header_is_refused_by_name(phi, tmp_path):
    from safetensors.torch import save_file

    m, path = model(), tmp_path / "model.safetensors"
    header = json.dumps({"version": 1, "phi": phi})
    tensors = {name: getattr(m, name).clone() for name in ("A", "B", "C", "D", "b", "d")}
    save_file(tensors, path, metadata={"implicitdl.ImplicitModel": header})
    with pytest.raises(ValueError, match="model.safetensors"):
        ImplicitModel.load(path)
    deep = "[" * 100000
    save_file(tensors, path, metadata={"implicitdl.ImplicitModel": deep})
    with pytest.raises(ValueError, match="model.safetensors"):
        ImplicitModel.load(path)


def test_save_refuses_what_load_could_not_read(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Private(Activation, register=False):
        slope = (0.0, 1.0)

        def __call__(self, z):
            return z.tanh()

    m = model()
    own = ImplicitModel(m.A, m.B, m.C, phi=Private())
    with pytest.raises(ValueError, match="cannot be written to a file"):
        own.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no folder"):
        m.save(tmp_path / "missing" / "a.safetensors")
    m.save(tmp_path / "a.safetensors")
    for device in ("cpuu", "cuda:99", ["cpu"]):
        with pytest.raises(ValueError, match="device: got .*expected a device of this machine"):
            ImplicitModel.load(tmp_path / "a.safetensors", device=device)
    for act in (m.save, ImplicitModel.load):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            act(tmp_path)
    with pytest.raises(FileNotFoundError):
        ImplicitModel.load(tmp_path / "b.safetensors")


def test_autocast_leaves_the_algebra_alone():
    m = model()
    f = ImplicitModel(*(getattr(m, k).float() for k in "ABCDbd"), phi="relu")
    K = 0.01 * torch.randn(f.inputs, f.outputs).float()
    g = ImplicitModel(f.A, torch.randn(f.states, f.outputs).float(), f.C)
    expected = [g @ f, f.feedback(K)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [g @ f, f.feedback(K)]
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in "ABCDbd")
    half = ImplicitModel(*(getattr(m, k).to(torch.bfloat16) for k in "ABCDbd"), phi="relu")
    assert half.feedback(K.to(torch.bfloat16)).A.dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_func_sees_into_a_model():
    m = model(phi="tanh")
    u, w = randn(4, 3), randn(4, 3, seed=5)

    def loss(u, A=m.A):
        return ImplicitModel(A, *tensors(m)[1:], phi="tanh")(u).square().sum()

    leaf, weight = u.clone().requires_grad_(), m.A.clone().requires_grad_()
    g, h = torch.autograd.grad(loss(leaf, weight), (leaf, weight), create_graph=True)
    (hw,) = torch.autograd.grad((g * w).sum(), leaf)
    assert torch.allclose(torch.func.grad(loss)(u), g, atol=1e-9)
    assert torch.allclose(torch.func.grad(loss, argnums=1)(u, m.A), h, atol=1e-9)
    assert torch.allclose(torch.func.vmap(m)(u), m(u), atol=1e-9)
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(u, m.A)
    assert torch.allclose(each.sum(0), h, atol=1e-9)
    assert torch.allclose(torch.func.jvp(torch.func.grad(loss), (u,), (w,))[1], hw, atol=1e-8)
    jacobian = torch.func.jacfwd(m)(u[0])
    assert torch.allclose(jacobian, torch.func.jacrev(m)(u[0]), atol=1e-9)
