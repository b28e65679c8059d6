"""The finding of a layer that normkit.freeze holds still and something wrote to: of the examination and of `watch`."""

from .findings import Finding

__all__ = ["thawed_finding"]


def thawed_finding(layer: str, names: tuple[str, ...]) -> Finding:
    """Say which tensors of a frozen layer are not what they were when it was frozen, or when a state was loaded."""
    return Finding(
        check="freeze-leak",
        layer=layer,
        severity="error",
        summary=f"frozen by normkit.freeze, and {', '.join(names)} changed since",
        evidence={"changed": list(names)},
        causes=(
            "something wrote into the tensors: an initialisation of all layers, weights copied by hand, an average",
            "requires_grad_(True) of the whole model let weight and bias learn again",
            "DistributedDataParallel broadcast the buffers of another process",
        ),
        remedy=f"normkit.freeze(model, where={layer!r})  # after loading what it should hold; takes it as it is now",
        proof=f'not normkit.diagnose(model).of("freeze-leak", {layer!r})',
    )
