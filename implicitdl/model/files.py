"""A model as a file: safetensors, with the activation in the JSON header."""

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import activations
from . import blockfiles

if TYPE_CHECKING:
    from . import ImplicitModel

_FORMAT = "implicitdl.ImplicitModel"
_VERSION = 1
_NAMES = ("A", "B", "C", "D", "b", "d")


def save(model: "ImplicitModel", path: "str | os.PathLike[str]") -> None:
    """See `ImplicitModel.save`."""
    from safetensors.torch import save_file

    name = os.fspath(path)
    _refuse_folder(name)
    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{name}: there is no folder {folder}.")
    text = ""
    try:
        header: dict[str, Any] = {"version": _VERSION, "phi": model.phi.to_config()}
        tensors: dict[str, Tensor] = {}
        if model.structure is not None:
            header["structure"], tensors = blockfiles.described(model.structure)
        text = json.dumps(header)
        known = activations.from_config(json.loads(text)["phi"]) == model.phi
    except (TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"{name}: {model.activation} cannot be written to a file: make it a registered "
            "dataclass of plain numbers."
        )
    if model.structure is None:
        tensors = {n: getattr(model, n).detach().clone().contiguous() for n in _NAMES}
    save_file(tensors, name, metadata={_FORMAT: text})


def _refuse_folder(name: str) -> None:
    if os.path.isdir(name):
        raise IsADirectoryError(f"{name}: it is a folder, expected the path of a file.")


def checked_device(device: "str | torch.device") -> torch.device:
    """The device, if a tensor can be made there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # by backend
        raise ValueError(
            f"device: got {device!r}, expected a device of this machine ({_first(error)})."
        ) from error


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def load(path: "str | os.PathLike[str]", device: torch.device) -> dict[str, Any]:
    """The arguments of the model that the file holds; see `ImplicitModel.load`."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    _refuse_folder(name)
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_FORMAT)
            names = sorted(file.keys())
            header = {} if text is None else json.loads(text)
            blocks = isinstance(header, dict) and "structure" in header
            if text is None or not (blocks or names == sorted(_NAMES)):
                raise ValueError(
                    f"not a saved ImplicitModel: it holds {names[:8]} and "
                    f"{'a' if text is not None else 'no'} header {_FORMAT!r}, expected "
                    f"{sorted(_NAMES)} and one."
                )
            version = header.get("version") if isinstance(header, dict) else header
            if type(version) is not int or version != _VERSION or not isinstance(header, dict):
                raise ValueError(f"version {version!r}, expected {_VERSION}.")
            if blocks:
                structure = header["structure"]
                made = blockfiles.restored(structure, lambda n: file.get_tensor(n).to(device))
                return {"structure": made}
            phi = activations.from_config(header.get("phi"))
            tensors = {name: file.get_tensor(name).to(device) for name in _NAMES}
        return {**tensors, "phi": phi}
    except SafetensorError as error:
        raise ValueError(f"{name}: not a safetensors file ({error}).") from error
    except (
        ValueError, TypeError, KeyError, OverflowError, RecursionError, RuntimeError, IndexError,
        AttributeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{name}: {error}") from error


def from_torchidl(
    state_dict: dict[str, Tensor], kappa: float | None, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(A, B, C, D, b, d) that torchidl computes with; see `ImplicitModel.from_torchidl`."""
    state = dict(state_dict)

    def scaled(M: Tensor) -> Tensor:
        return M if kappa is None else M * (kappa / M.abs().sum(1).amax()).clamp(max=1.0)

    try:
        A = state["A"] if "A" in state else scaled(state["L"]) @ scaled(state["R"].mT)
        B, C, D = state["B"], state["C"], state.get("D")
    except KeyError as error:
        raise ValueError(
            f"from_torchidl: no {error} among {sorted(state)}; expected A (or L, R), B, C, D."
        ) from None
    A = A.triu(1) if kappa is None else scaled(A)
    b = d = None
    if bias:
        B, b = B[:, :-1], B[:, -1]
        if D is not None:
            D, d = D[:, :-1], D[:, -1]
    return A, B, C, D, b, d
