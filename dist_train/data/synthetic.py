"""Generated pictures to learn from when there are no others: same bits on every machine.

Each class owns a few mirror-symmetric shapes and a tint. A picture shows one of the shapes,
anywhere, tinted, among specks and noise. The tint alone, all that a linear model sees, tells less
than half of the pictures; the shape tells nearly all. Flips, shifts and small crops keep both.
"""

import numpy as np

from dist_train.config.importing import nearest
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source

CLASS_SEED = 2  # of shapes and tints; the splits use the two that follow
CELLS = 6  # a shape is CELLS x CELLS cells, symmetric: 2^18 of them
SHAPES = 4  # per class
SPECKS = 48  # of 256 pixels swap shape and background: what makes it hard
CHUNK = 2048  # pictures made at once: temporary arrays stay in the CPU's cache

SIZES = {
    "num_train": 50_000,
    "num_test": 10_000,
    "num_classes": 10,
    "image_size": 32,
    "channels": 3,
}
SMALLEST = {"num_train": 1, "num_test": 1, "num_classes": 2, "image_size": 12, "channels": 1}


def load_synthetic(config: DataConfig, *, notice: str | None = None) -> Source:
    """Generate both splits; data.args may set num_train, num_test and the others of SIZES.

    Raises:
        ConfigError: data.args has another key, or a value that is too small or no whole number.
    """
    if config.root is not None:
        raise ConfigError(
            f"data.root={config.root} would be ignored, as data.name={config.name} generates "
            "images: remove data.root, or name its data (data=image_folder, data.name=cifar10)"
        )
    for key, value in config.args.items():
        if key not in SIZES:
            raise ConfigError(
                f"data.args.{key} is unknown to data.name=synthetic, which takes "
                f"{', '.join(SIZES)}{nearest(key, SIZES)}"
            )
        if not isinstance(value, int) or value < SMALLEST[key]:
            raise ConfigError(
                f"data.args.{key}={value!r} must be a whole number of {SMALLEST[key]} or more"
            )
    sizes = SIZES | config.args
    shape = (sizes["image_size"], sizes["image_size"], sizes["channels"])
    generator = np.random.PCG64(CLASS_SEED)
    half = _random_bytes(generator, sizes["num_classes"], SHAPES, CELLS, CELLS // 2) & 1
    cells = np.concatenate([half, half[..., ::-1]], axis=-1)
    cells = np.pad(cells, [(0, 0), (0, 0), (0, 1), (0, 1)])  # cell CELLS: outside the shape
    tints = _random_bytes(generator, sizes["num_classes"], 1, sizes["channels"]) >> 2
    train, test = (
        _split(sizes[key], cells, tints, shape=shape, seed=seed)
        for seed, key in enumerate(("num_train", "num_test"), start=CLASS_SEED + 1)
    )
    return Source(
        name="synthetic",
        classes=tuple(f"shape {label}" for label in range(sizes["num_classes"])),
        train=train,
        test=test,
        notice=notice,
    )


def _random_bytes(generator: np.random.PCG64, *shape: int) -> np.ndarray:
    """Raw bits of PCG64, which NumPy keeps for ever; its distributions may change."""
    num = int(np.prod(shape))
    raw = generator.random_raw(-(-num // 8)).astype("<u8", copy=False)
    return raw.view(np.uint8)[:num].reshape(shape)


def _split(
    num: int, cells: np.ndarray, tints: np.ndarray, *, shape: tuple[int, int, int], seed: int
) -> Pictures:
    generator = np.random.PCG64(seed)
    images = np.empty((num, *shape), np.uint8)
    labels = np.arange(num, dtype=np.int64) % len(cells)
    for first in range(0, num, CHUNK):
        chunk = labels[first : first + CHUNK]
        mask = _draw_masks(generator, cells[chunk], shape[0])
        images[first : first + CHUNK] = _paint(generator, mask, tints[chunk])
    return Pictures(images=images, labels=labels)


def _draw_masks(generator: np.random.PCG64, cells: np.ndarray, image_size: int) -> np.ndarray:
    """Place one shape of each picture's class: (num, height, width), 0 or 1.

    Args:
        generator: of the split.
        cells: (num, SHAPES, CELLS + 1, CELLS + 1), the last row and column 0.
        image_size: height and width.
    """
    side = image_size * 9 // 16
    room = image_size - side + 1
    choice = generator.random_raw(len(cells))
    position = (choice >> 8) % room**2
    cell_of = np.full(2 * image_size, CELLS)  # by pixels from the shape's edge, from image_size on
    cell_of[image_size : image_size + side] = np.arange(side) * CELLS // side
    pixel = np.arange(image_size, 2 * image_size)
    rows = cell_of[pixel - (position // room)[:, None].astype(np.int64)]
    columns = cell_of[pixel - (position % room)[:, None].astype(np.int64)]
    picture = np.arange(len(cells))
    shapes = cells[picture, choice % SHAPES]
    return shapes[picture[:, None, None], rows[:, :, None], columns[:, None, :]]


def _paint(generator: np.random.PCG64, mask: np.ndarray, tints: np.ndarray) -> np.ndarray:
    """Return (num, height, width, channels): background 0..63, shape to 126, noise of 0..63."""
    mask = mask ^ (_random_bytes(generator, *mask.shape) < SPECKS)
    num, height, width = mask.shape
    channels = tints.shape[-1]
    colours = _random_bytes(generator, num, 2, 1, channels) >> 2
    back, front = colours[:, 0], colours[:, 1] + tints
    # Over whole rows, all their channels at once: NumPy is slow over three values at a time.
    back, front = (np.tile(colour, (1, 1, width)) for colour in (back, front))
    pixels = np.repeat(mask, channels, axis=-1)
    pixels *= front - back  # modulo 256: where 1, adding back gives front
    pixels += back
    noise = _random_bytes(generator, *pixels.shape)
    noise >>= 2
    pixels += noise
    return pixels.reshape(num, height, width, channels)
