"""Variational autoencoders of digits. Validation: photographs in black and white."""

from tasks.data import digits, photos
from tasks.generative import image_vae
from tasks.task import choice


def make(source, hidden, code, activation, name):
    """An autoencoder of black and white pictures."""
    return image_vae(
        f"vae-{name}-{hidden}-{code}",
        source,
        hidden=hidden,
        code=code,
        activation=activation,
        batch_size=64,
        steps=500,
    )


families = {
    "vae": lambda generator: make(
        digits(),
        choice(generator, (32, 48, 64)),
        choice(generator, (4, 8)),
        choice(generator, ("relu", "tanh")),
        "digits",
    )
}
validation = {
    f"vae-photos-{h}-{c}": (lambda h=h, c=c, a=a: make(photos(8, (1, 5)), h, c, a, "photos"))
    for h, c, a in ((40, 6, "relu"), (56, 6, "tanh"), (72, 4, "relu"))
}
