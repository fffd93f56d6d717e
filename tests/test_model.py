"""The algebra of models against direct composition, gradients to the parts, and files."""

import json
import re

import pytest
import torch
from problems import randn, row_sums
from safetensors.torch import load_file, save_file

from implicitdl import ImplicitModel, NotWellPosedError, stack
from implicitdl.activations import Blocks, LeakyReLU, ReLU, SiLU, Softmax, Tanh
from implicitdl.implicit import Neumann
from implicitdl.solvers import Anderson, Auto, Newton
from implicitdl.wellposed import Certificate

TIGHT = Auto(rtol=1e-14, atol=1e-16)


def parts(n, p, q, seed=0, kappa=0.6):
    A = row_sums(randn(n, n, seed=seed), kappa)
    shapes = ((n, p), (q, n), (q, p), (n,), (q,))
    rest = [randn(*shape, seed=seed + i + 1) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in (A, *rest)]


def model(n=5, p=3, q=2, seed=0, phi="relu", kappa=0.6):
    return ImplicitModel(*parts(n, p, q, seed, kappa), phi=phi)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def tensors(m):
    return [m.A, m.B, m.C, m.D, m.b, m.d]


def check_gradients(combined, direct, models):
    """The same gradients reach the tensors that the models were made of."""
    weights = randn(*direct.shape, seed=99)
    leaves = [t for m in models for t in tensors(m)]
    got = torch.autograd.grad((combined * weights).sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad((direct * weights).sum(), leaves, allow_unused=True)
    for a, b, leaf in zip(got, expected, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-10
        )
    assert sum(g is not None and bool(g.any()) for g in got) >= len(leaves) - 1


def test_what_a_model_computes():
    m, u = model(phi=Tanh()), randn(4, 3, seed=20)
    x = m.solve(u, solver=TIGHT).value
    close(torch.tanh(x @ m.A.mT + u @ m.B.mT + m.b), x)
    close(m(u, solver=TIGHT), x @ m.C.mT + u @ m.D.mT + m.d)
    assert (m.states, m.inputs, m.outputs) == (5, 3, 2)
    assert repr(m) == "ImplicitModel(states=5, inputs=3, outputs=2, phi=Tanh(), float64)"


@pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3), (2, 4, 3), (2, 0, 3)])
def test_any_batch_shape(shape):
    m, u = model(), randn(*shape, seed=20)
    s = m.solve(u, record=True) if u.numel() else m.solve(u)
    batch = shape[:-1]
    assert s.value.shape == (*batch, 5) and m(u).shape == (*batch, 2)
    assert s.codes.shape == s.residual.shape == s.steps.shape == batch
    if u.numel():
        frames = s.stats["trajectory"]
        assert frames.shape[1:] == s.value.shape and torch.equal(frames[-1], s.value)
        close(m(u).reshape(-1, 2), m(u.reshape(-1, 3)))


def test_biases_and_the_direct_term_default_to_zero():
    A, B, C, D, b, d = (t.detach() for t in parts(5, 3, 2))
    m = ImplicitModel(A, B, C)
    assert not any(bool(t.any()) for t in (m.D, m.b, m.d))
    full = ImplicitModel(A, B, C, D=0 * D, b=0 * b, d=0 * d)
    u = randn(4, 3)
    close(m(u), full(u))


@pytest.mark.parametrize("phis", [("relu", "tanh"), (Blocks(parts=((Softmax(), 3), (ReLU(), 2))), "silu")])
def test_cascade_sum_and_stack(phis):
    f, g, u = model(5, 3, 2, 0, phis[0], 0.4), model(4, 2, 3, 10, phis[1], 0.4), randn(6, 3, seed=20)
    run = {"solver": TIGHT}
    y, direct = (g @ f)(u, **run), g(f(u, **run), **run)
    close(y, direct)
    check_gradients(y, direct, [f, g])
    x = (g @ f).solve(u, **run).value  # states of g, then of f
    close(x[:, 4:], f.solve(u, **run).value)
    close(x[:, :4], g.solve(f(u, **run), **run).value)
    h = model(3, 3, 2, 30, phis[1], 0.4)
    y, direct = (f + h)(u, **run), f(u, **run) + h(u, **run)
    close(y, direct)
    check_gradients(y, direct, [f, h])
    k = model(3, 3, 4, 40, phis[1], 0.4)
    y, direct = stack(f, k)(u, **run), torch.cat([f(u, **run), k(u, **run)], -1)
    close(y, direct)
    check_gradients(y, direct, [f, k])


def test_the_cascade_is_associative():
    f, g, h, u = model(5, 3, 2, 0), model(4, 2, 3, 10, "tanh"), model(3, 3, 2, 20), randn(4, 3)
    close(((h @ g) @ f)(u, solver=TIGHT), (h @ (g @ f))(u, solver=TIGHT))
    assert (h @ g @ f).phi.size == 12


def test_feedback_closes_the_loop():
    f, v = model(5, 3, 2, kappa=0.3), randn(4, 3, seed=20)
    K = 0.05 * randn(3, 2, seed=21)
    closed = f.feedback(K)
    y = closed(v, solver=TIGHT)
    u = v + y @ K.mT
    close(y, f(u, solver=TIGHT))
    z = torch.zeros(4, 2)
    for _ in range(200):  # the loop, as one would write it
        z = f(v + z @ K.mT, solver=TIGHT)
    close(y, z)
    check_gradients(y, z, [f])
    K = K.requires_grad_()
    (g,) = torch.autograd.grad(f.feedback(K)(v).sum(), K)
    step = 1e-6 * randn(3, 2, seed=5)
    with torch.no_grad():
        rise = f.feedback(K + step)(v).sum() - f.feedback(K - step)(v).sum()
    torch.testing.assert_close((g * step).sum(), rise / 2, rtol=1e-5, atol=1e-12)


def test_feedback_refuses_what_determines_nothing():
    f = ImplicitModel(torch.zeros(1, 1), torch.eye(1), torch.eye(1), D=torch.eye(1))
    with pytest.raises(ValueError, match="I - D K is singular"):
        f.feedback(torch.eye(1))
    with pytest.raises(ValueError, match=r"K has shape \(2, 1\), expected \(1, 1\)"):
        f.feedback(torch.ones(2, 1))


@pytest.mark.parametrize("phi", ["relu", LeakyReLU(negative_slope=0.2)])
def test_rescaling_keeps_the_map_and_shortens_the_rows(phi):
    A = row_sums(randn(6, 6).abs(), 0.7)
    s = torch.tensor([1.0, 30.0, 0.02, 5.0, 1.0, 0.3])
    f = model(6, 3, 2, phi=phi)
    f = ImplicitModel(A * s[:, None] / s, *tensors(f)[1:], phi=phi)
    u = randn(5, 3, seed=20)
    for kappa in (None, 0.75):
        g = f.rescale(kappa)
        assert float(g.A.abs().sum(1).max()) <= (kappa or 0.9) + 1e-9 < float(f.A.abs().sum(1).max())
        torch.testing.assert_close(g(u), f(u), rtol=1e-9, atol=1e-9)
        ratio = g.solve(u).value / f.solve(u).value
        assert bool((ratio.nan_to_num(0.0).amax(0) >= 0).all())
    with pytest.raises(NotWellPosedError):
        f.rescale(0.5)
    for other in ("tanh", SiLU()):
        with pytest.raises(ValueError, match="not positively homogeneous"):
            model(phi=other).rescale()


def test_permuting_the_states():
    phi = Blocks(parts=((ReLU(), 1), (Softmax(), 2), (Tanh(), 2)))
    f, u = model(5, phi=phi), randn(4, 3, seed=20)
    for order in ([4, 1, 2, 0, 3], [3, 4, 2, 1, 0], torch.tensor([0, 1, 2, 3, 4])):
        g = f.permute(order)
        close(g(u, solver=TIGHT), f(u, solver=TIGHT))
        index = torch.as_tensor(order)
        close(g.solve(u, solver=TIGHT).value, f.solve(u, solver=TIGHT).value[:, index])
        check_gradients(g(u, solver=TIGHT), f(u, solver=TIGHT), [f])
    for wrong in ([0, 1, 2, 3], [0, 1, 2, 3, 3], [0, 1, 2, 3, 5], [-1, 0, 1, 2, 3]):
        with pytest.raises(ValueError, match="permutation of 0..4"):
            f.permute(wrong)
    with pytest.raises(ValueError, match="must stay together"):
        f.permute([1, 0, 2, 3, 4])


def test_two_equal_softmax_blocks_are_not_merged():
    phi = Blocks(parts=((Softmax(), 2), (Softmax(), 3)))
    f, u = model(5, phi=phi), randn(4, 3, seed=20)
    close(f.permute([2, 3, 4, 0, 1])(u, solver=TIGHT), f(u, solver=TIGHT))
    x = f.solve(u).value
    torch.testing.assert_close(x[:, :2].sum(1), torch.ones(4))
    torch.testing.assert_close(x[:, 2:].sum(1), torch.ones(4))


def test_widths_that_do_not_fit():
    f, g = model(5, 3, 2), model(4, 3, 3)
    with pytest.raises(ValueError, match="f has 2 outputs, g takes 3 inputs"):
        g @ f
    with pytest.raises(ValueError, match="inputs and outputs must agree"):
        f + g
    with pytest.raises(ValueError, match="f takes 3 inputs, g 2"):
        stack(f, model(4, 2, 2))
    for op in (lambda: f @ 3, lambda: f + torch.ones(2)):
        with pytest.raises(TypeError):
            op()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": torch.zeros(5, 4)}, r"A has shape \(5, 4\), expected \(5, 5\)"),
        ({"A": torch.zeros(5)}, r"A is \(5,\), expected a matrix"),
        ({"B": 3}, "B is int, expected a matrix"),
        ({"C": torch.zeros(2, 4)}, r"C has shape \(2, 4\), expected \(2, 5\)"),
        ({"D": torch.zeros(3, 2)}, r"D has shape \(3, 2\), expected \(2, 3\)"),
        ({"b": torch.zeros(4)}, r"b has shape \(4,\), expected \(5,\)"),
        ({"d": torch.zeros(2, 1)}, r"d has shape \(2, 1\), expected \(2,\)"),
        ({"B": torch.zeros(5, 3, dtype=torch.float32)}, "B is torch.float32 on cpu, expected"),
        ({"C": torch.zeros(2, 5, device="meta")}, "C is torch.float64 on meta, expected"),
        ({"phi": "rellu"}, "Did you mean 'relu'"),
        ({"phi": Blocks(parts=((ReLU(), 4),))}, "phi is for 4 states, expected 5"),
    ],
)
def test_wrong_parts_are_named(change, message):
    A, B, C, D, b, d = parts(5, 3, 2)
    arguments = {"A": A, "B": B, "C": C, "D": D, "b": b, "d": d, "phi": "relu"} | change
    with pytest.raises(ValueError, match=message):
        ImplicitModel(**arguments)


def test_integer_weights_are_refused():
    ones = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="A is torch.int64, expected a floating dtype"):
        ImplicitModel(ones, ones, ones)


def test_wrong_inputs_are_named():
    m = model()
    for u, message in (
        (randn(4, 2), r"u: got shape \(4, 2\), expected \(\*batch, 3\)"),
        (torch.tensor(1.0), r"u: got shape \(\), expected"),
        (randn(4, 3).float(), "u: got torch.float32, expected torch.float64"),
        (torch.zeros(4, 3, device="meta"), "u: got a tensor on meta, expected cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            m(u)
    with pytest.raises(TypeError, match="u: got list, expected a tensor"):
        m([[1.0, 2.0, 3.0]])
    for x0, message in (
        (torch.zeros(4, 4), r"x0: got shape \(4, 4\), expected \(\*batch, 5\)"),
        (torch.zeros(3, 5), r"x0: got shape \(3, 5\), expected \(4, 5\)"),
        (torch.zeros(4, 5).float(), "x0: got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            m.solve(randn(4, 3), x0=x0)
    with pytest.raises(ValueError, match="on_failure"):
        m.solve(randn(4, 3), on_failure="x")


def test_options_of_a_solve_reach_the_engine():
    m, u = model(kappa=0.9), randn(4, 3, seed=20)
    s = m.solve(u, solver="anderson", record=True)
    assert s.stats["solver"] == "Anderson"
    close(s.stats["trajectory"][0], torch.relu(u @ m.B.mT + m.b))
    again = m.solve(u, x0=s.value.detach(), solver=Newton(), record=True)
    assert torch.equal(again.stats["trajectory"][0], s.value) and int(again.steps.max()) <= 2
    exact = torch.autograd.grad(m(u).sum(), m.A)[0]
    biased = torch.autograd.grad(m(u, adjoint=Neumann(terms=0)).sum(), m.A)[0]
    assert float((exact - biased).abs().max()) > 1e-3
    assert s.error_bound is None
    short = m.solve(u, solver=Anderson(max_steps=2), on_failure="return")
    assert not bool(short.converged.any())


def test_facts_are_true_and_choose_the_solver():
    u = randn(8, 3)
    assert "triangular" in ImplicitModel(
        randn(5, 5).triu(1), *[t.detach() for t in parts(5, 3, 2)[1:]]
    ).solve(u).stats["reason"]
    low = ImplicitModel(randn(5, 5).tril(-1) / 9, *[t.detach() for t in parts(5, 3, 2)[1:]])
    assert "triangular" not in low.solve(u).stats["reason"]
    assert "contraction" in model(kappa=0.5).solve(u).stats["reason"]
    assert model(kappa=0.99)._facts()["contraction"] == pytest.approx(0.99)
    assert model(kappa=0.95, phi=SiLU())._facts()["contraction"] is None  # 1.0998 * 0.95 > 1
    assert model(kappa=0.9, phi=Softmax())._facts()["contraction"] is None
    assert model(kappa=1.2)._facts()["contraction"] is None
    softmax_triangle = ImplicitModel(randn(5, 5).triu(1), randn(5, 3), randn(2, 5), phi=Softmax())
    assert not softmax_triangle._facts()["acyclic"]  # softmax couples the states


def test_certificates():
    c = model().certificate()
    assert isinstance(c, Certificate) and c.well_posed and c.contraction <= 0.6 + 1e-12
    f, g = model(5, 3, 2), model(4, 2, 3, 10)
    assert (g @ f).certificate().well_posed  # block-triangular, well-posed by its blocks
    bad = ImplicitModel(2 * torch.eye(1), torch.eye(1), torch.eye(1))
    assert not bad.certificate().well_posed


def test_models_under_transforms():
    m, u = model(phi="tanh"), randn(4, 3)
    A = m.A.detach()

    def y(A, u):
        return ImplicitModel(A, *[t.detach() for t in tensors(m)[1:]], phi="tanh")(u)

    for arg in (0, 1):
        expected = torch.autograd.functional.jacobian(y, (A, u))[arg]
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(lambda t, i=arg: y(t, u) if i == 0 else y(A, t),
                                               (A, u)[arg]),
            expected,
        )  # fmt: skip


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "phi", ["relu", LeakyReLU(negative_slope=0.3), Blocks(parts=((Softmax(), 2), (Tanh(), 3)))]
)
def test_save_and_load(tmp_path, phi, dtype):
    m = ImplicitModel(*[t.detach().to(dtype) for t in parts(5, 3, 2)], phi=phi)
    path = tmp_path / "model.safetensors"
    m.save(path)
    back = ImplicitModel.load(str(path))
    for a, b in zip(tensors(m), tensors(back), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert back.phi == m.phi and repr(back) == repr(m)
    u = randn(4, 3).to(dtype)
    assert torch.equal(m(u), back(u))


def test_saving_a_view_and_a_graph(tmp_path):
    m = model()
    m = ImplicitModel(m.A.mT, m.B, m.C[:, torch.arange(5)], phi="relu")
    m.save(tmp_path / "m")
    assert torch.equal(ImplicitModel.load(tmp_path / "m").A, m.A)


def test_files_that_are_not_models_are_refused(tmp_path):
    path, wrong = tmp_path / "m.safetensors", tmp_path / "wrong"
    model().save(path)
    data = path.read_bytes()
    for content in (b"", b"hello", data[:40], data[:-5], data[:8] + b"\xff" * 40 + data[48:],
                    b"\xff" * 8 + data[8:]):  # fmt: skip
        wrong.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(wrong))):
            ImplicitModel.load(wrong)
    state = load_file(path)
    header = {"version": 1, "phi": model().phi.to_config()}
    key = "implicitdl.ImplicitModel"

    def refused(tensors, head, message=None, metadata_key=key):
        save_file(tensors, wrong, metadata={metadata_key: head})
        with pytest.raises(ValueError, match=message):
            ImplicitModel.load(wrong)

    text = json.dumps(header)
    refused(state, text, "not a saved ImplicitModel", metadata_key="other")
    refused({"A": state["A"]}, text, "not a saved ImplicitModel")
    refused(state | {"E": state["A"].clone()}, text, "not a saved ImplicitModel")
    refused(state, "{")
    refused(state, "[1]", "not a saved ImplicitModel")
    refused(state, json.dumps(header | {"version": 2}), "version 2, expected 1")
    refused(state, json.dumps({"version": 1}))
    refused(state, json.dumps(header | {"phi": {"name": "ReLUU"}}), "Did you mean 'ReLU'")
    refused(state, json.dumps(header | {"phi": [1]}))
    refused(state, json.dumps(header | {"phi": {"name": "Blocks", "parts": [3]}}))
    refused(state, json.dumps(header | {"phi": {"name": "Blocks"}}))
    refused(state | {"A": torch.zeros(4, 4)}, text, "expected")
    refused(state | {"b": state["b"].float()}, text, "b is torch.float32")
    with pytest.raises(FileNotFoundError):
        ImplicitModel.load(tmp_path / "nothing")


# ---- torchidl -----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_from_torchidl(low_rank, size):
    """There A is scaled as a whole to ||A||_inf = kappa where it is longer."""
    L, R = randn(6, 2, seed=1) * size, randn(6, 2, seed=2)
    A = L @ R.mT
    B, C, D = randn(6, 3), randn(2, 6), randn(2, 3)
    state = {"B": B, "C": C, "D": D} | ({"L": L, "R": R} if low_rank else {"A": A})
    m = ImplicitModel.from_torchidl(state, kappa=0.8)
    norm = float(A.abs().sum(1).max())
    torch.testing.assert_close(m.A, A * min(1.0, 0.8 / norm))
    x = torch.zeros(4, 6)
    u = randn(4, 3)
    for _ in range(300):
        x = torch.relu(x @ m.A.mT + u @ B.mT)
    torch.testing.assert_close(m(u), x @ C.mT + u @ D.mT)
    del state["D"]
    assert not bool(ImplicitModel.from_torchidl(state, phi="tanh").D.any())
    assert ImplicitModel.from_torchidl(state, phi="tanh").activation == Tanh()
    for missing in ("B", "C", "L" if low_rank else "A"):
        with pytest.raises(ValueError, match="from_torchidl: no"):
            ImplicitModel.from_torchidl({k: v for k, v in state.items() if k != missing})
