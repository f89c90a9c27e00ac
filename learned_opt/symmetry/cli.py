"""The command line: ``python -m learned_opt symmetry module:callable``.

Heavy imports are inside the command, so that ``--help`` is quick.
"""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from torch import Tensor, nn

PROG = "python -m learned_opt"
EXTRAS = ("tyro", "matplotlib")  # what the extra [meta] installs and this command uses
PICTURES = (".svg", ".png", ".pdf")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Dtype = Literal["float32", "float64", "int64"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a missing optional package is one line that says what to install."""
    try:
        _main(list(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        _fail(f"{error.name} is not installed. Run: pip install 'learned-opt[meta]'")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _main(argv: list[str]) -> None:
    import tyro

    tyro.extras.subcommand_cli_from_dict(
        {"symmetry": symmetry},
        prog=PROG,
        description="What may be permuted and rescaled in a network without changing its function.",
        args=argv,
        config=(tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff),
    )


def symmetry(
    target: str,
    /,
    input: tuple[str, ...] = (),
    dtype: Dtype = "float32",
    vocab: int = 2,
    train: bool = False,
    eval: bool = False,
    verify: bool = False,
    no_verify: bool = False,
    json: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Infer the symmetry of a model's weights and print it.

    Args:
        target: module:callable, such as torchvision.models:resnet18. Called without arguments it returns the model,
            (model, inputs) or (model, args, kwargs). A model by itself will do too.
        input: shape of an example input, such as 2,3,64,64; once per input. With a batch of at least 2.
        dtype: of the example inputs.
        vocab: example inputs of dtype int64 are token ids below this number.
        train: put the model in training mode (neither: the mode in which it comes).
        eval: put the model in evaluation mode.
        verify: confirm the result numerically in float64, however long it takes (neither: if it is cheap).
        no_verify: do not confirm the result numerically.
        json: also write the symmetry to this file, for Symmetry.from_dict.
        picture: also draw the symmetry to this file: .svg, .png or .pdf.
    """
    if train and eval:
        _fail("--train and --eval contradict each other: give one of them, or neither.")
    if verify and no_verify:
        _fail("--verify and --no-verify contradict each other: give one of them, or neither.")
    _writable(json, (".json",), "--json")
    _writable(picture, PICTURES, "--picture")
    model, arguments = model_of(target)
    if train or eval:
        model.train(train)
    if input:
        arguments = tuple(example(shape, dtype, vocab) for shape in input), {}
    _show(model, arguments, True if verify else False if no_verify else "auto", json, picture)


def _fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


def _writable(path: Path | None, suffixes: tuple[str, ...], option: str) -> None:
    """Fail before the work and not after it."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        _fail(f"{option} {path}: the name must end in {' or '.join(suffixes)}.")
    if not path.absolute().parent.is_dir():
        _fail(f"{option} {path}: there is no folder {path.parent}.")
    if path.is_dir():
        _fail(f"{option} {path}: it is a folder. Name a file.")


# ------------------------------------------------------------------------------------- the user's model
def model_of(target: str) -> "tuple[nn.Module, Arguments | None]":
    """The model that ``module:callable`` names, and its example inputs if it brings them along."""
    from torch import nn

    found = _found(target)
    result = found if isinstance(found, nn.Module) else _called(target, found)
    model, *rest = result if isinstance(result, tuple) else (result,)
    if not isinstance(model, nn.Module) or len(rest) > 2:
        _fail(
            f"{target}() returned {_kind(result)}: it must return a model (torch.nn.Module), (model, inputs) or"
            " (model, args, kwargs)."
        )
    return model, _arguments(target, *rest) if rest else None


def _found(target: str) -> Any:
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        _fail(f"{target!r} is not of the form module:callable, such as torchvision.models:resnet18.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            _fail(f"importing {module} failed: {error}.")
        _fail(f"there is no module {error.name!r}, neither installed nor in {here} (give it without '.py').")
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            known = f" It has: {', '.join(public[:12])}{' ...' if public[12:] else ''}." if public else ""
            _fail(f"{module} has no {attribute!r}.{known}")
        found = getattr(found, name)
    return found


def _called(target: str, function: Any) -> Any:
    if not callable(function):
        _fail(f"{target} is {_kind(function)}: it must be a model, or callable without arguments.")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        _fail(f"{target} needs arguments ({error}). Name a function without any that returns the model.")
    except ValueError:  # a builtin without a signature: try it
        pass
    return function()


def _arguments(target: str, inputs: Any, kwargs: Any = None) -> Arguments:
    if kwargs is None and isinstance(inputs, Mapping):
        inputs, kwargs = (), inputs
    if not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        _fail(f"{target}() returned kwargs of {_kind(kwargs)}: they must be a dict.")
    return tuple(inputs), dict(kwargs or {})


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def example(shape: str, dtype: Dtype, vocab: int) -> "Tensor":
    """A random input of a shape such as ``2,3,64,64``: normal, or token ids below ``vocab``."""
    import torch

    try:
        sizes = [int(n) for n in shape.split(",")] if shape else []
        if min(sizes, default=1) < 1:
            raise ValueError
    except ValueError:
        _fail(f"--input {shape}: a shape is positive numbers separated by commas, such as 2,3,64,64.")
    if vocab < 1:
        _fail(f"--vocab {vocab}: it must be at least 1.")
    generator = torch.Generator().manual_seed(0)
    if dtype == "int64":
        return torch.randint(vocab, sizes, generator=generator)
    return torch.randn(sizes, generator=generator, dtype=getattr(torch, dtype))


# ------------------------------------------------------------------------------------------- the result
def _show(
    model: "nn.Module",
    arguments: Arguments | None,
    verify: bool | Literal["auto"],
    json_file: Path | None,
    picture: Path | None,
) -> None:
    if arguments is None:
        _fail(
            "no example input. Give its shape, as in --input 2,3,64,64 (token ids: --input 2,16 --dtype int64"
            " --vocab 1000), or name a function that returns (model, inputs)."
        )
    args, kwargs = arguments
    _try(model, args, kwargs)
    from learned_opt.checkpoint import write_atomically
    from learned_opt.symmetry.infer import infer_symmetry
    from learned_opt.symmetry.labels import SymmetryError

    try:
        symmetry = infer_symmetry(model, *args, verify=verify, keywords=kwargs)
    except SymmetryError as error:
        _fail(str(error))
    print(symmetry)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(symmetry.to_dict(), indent=1) + "\n").encode())
    if picture is not None:
        symmetry.draw(picture)
    for path in filter(None, (json_file, picture)):
        print(f"written: {path}")


def _try(model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model once, so that what its input should be is its own error and no tracer's."""
    import torch

    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        inputs = [*args, *(f"{n}={_input(v)}" for n, v in kwargs.items())]
        _fail(
            f"{type(model).__name__} cannot be run with ({', '.join(map(_input, inputs))}):\n"
            f"  {type(error).__name__}: {error}\n"
            "Give one --input per input of the model, with a batch of at least 2; token ids need --dtype int64 (and"
            " --vocab); for anything else name a function that returns (model, args, kwargs)."
        )


def _input(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return value if isinstance(value, str) else type(value).__name__
