"""Names of tensors with and without what wrappers of modules put in."""

from collections.abc import Iterable

WRAPPERS = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # lightning.fabric
)


def plain_name(name: str) -> str:
    """A name without wrappers: those of :data:`WRAPPERS` anywhere, ``module`` (DataParallel and others) in front."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def known_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For every name the one among ``known`` that is the same up to wrappers; without one, the plain name.

    A name that is known as it is stays. Wrappers may be in either.
    """
    exact = dict.fromkeys(known)
    plain: dict[str, str] = {}
    for n in exact:
        plain.setdefault(plain_name(n), n)
    return {n: n if n in exact else plain.get(plain_name(n), plain_name(n)) for n in names}
