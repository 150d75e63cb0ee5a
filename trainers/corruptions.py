"""The fifteen corruptions of ImageNet-C, made on the fly: noise, blur, weather and digital artefacts.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations",
https://arxiv.org/abs/1903.12261. Parameters are those of the published ImageNet-C (224 pixels) and CIFAR-10-C (32
pixels); an image takes those of the nearer size by their ratio, and lengths among them grow with its shorter side.

Figures come near those on the published images and do not equal them: other random numbers, frost that is drawn instead
of photographed, warps that are sampled once instead of twice, images that are not stored as JPEGs in between.
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from PIL.Image import Resampling
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.signal import fftconvolve
from scipy.spatial import cKDTree


SEVERITIES = (1, 2, 3, 4, 5)
IMAGENET_SIDE, CIFAR_SIDE = 224, 32
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601-2


@dataclass(frozen=True)
class Scene:
    """What a corruption may need besides the image.

    Attributes:
        scale: Shorter side of the image over that of the images which the parameters were chosen for.
        generator: Of the image's own random numbers.
    """

    scale: float
    generator: np.random.Generator


@dataclass(frozen=True)
class Corruption:
    """How an image is corrupted: images (H, W, 3) from 0 to 1 in single precision, parameters -> the same, unclipped.

    Attributes:
        group: noise, blur, weather or digital.
        imagenet: Parameters by severity, for images of 224 pixels.
        cifar: The same for 32 pixels.
    """

    group: str
    apply: Callable
    imagenet: Sequence[Sequence[float]]
    cifar: Sequence[Sequence[float]]


def corrupt(pixels: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """An 8-bit image (H, W, 3) -> the same, corrupted.

    Random numbers depend on the seed, the corruption and the image itself: not on its place among others, nor on the
    process that works on it, and at each severity they are the same.

    Raises:
        ValueError: if there is no such corruption or severity, or the image is of another kind.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}: give one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} must be one of {', '.join(map(str, SEVERITIES))}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image of {pixels.dtype} and shape {pixels.shape} must be of uint8 and shape (H, W, 3)")
    corruption, pixels = CORRUPTIONS[name], np.ascontiguousarray(pixels)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(pixels)])
    side = min(pixels.shape[:2])
    reference = nearest_reference(side)
    parameters = (corruption.cifar if reference == CIFAR_SIDE else corruption.imagenet)[severity - 1]
    changed = corruption.apply(pixels.astype(np.float32) / 255, Scene(side / reference, generator), *parameters)
    return (255 * changed).round().clip(0, 255).astype(np.uint8)


def nearest_reference(side: int) -> int:
    """Side of the published images that are nearer by their ratio to those of this side."""
    return CIFAR_SIDE if side < math.sqrt(CIFAR_SIDE * IMAGENET_SIDE) else IMAGENET_SIDE


def name_parameters(side: int) -> str:
    """Where the parameters for images of a side come from."""
    reference = nearest_reference(side)
    name = "CIFAR-10-C" if reference == CIFAR_SIDE else "ImageNet-C"
    return f"{name} ({reference} pixels" + (")" if side == reference else f"; lengths times {side / reference:.3g})")


# ------------------------------------------------------------------------------------------------------------- noise


def gaussian_noise(image: np.ndarray, scene: Scene, deviation: float) -> np.ndarray:
    return image + deviation * scene.generator.standard_normal(image.shape, dtype=np.float32)


def shot_noise(image: np.ndarray, scene: Scene, photons: float) -> np.ndarray:
    """Each channel of each pixel counts photons, of which white sends that many on average."""
    return scene.generator.poisson(photons * image).astype(np.float32) / photons


def impulse_noise(image: np.ndarray, scene: Scene, share: float) -> np.ndarray:
    """That share of the values becomes 0 or 1."""
    chance = scene.generator.random(image.shape, dtype=np.float32)
    extreme = scene.generator.integers(2, size=image.shape).astype(np.float32)
    return np.where(chance < share, extreme, image)


# -------------------------------------------------------------------------------------------------------------- blur


def defocus_blur(image: np.ndarray, scene: Scene, radius: float, smoothing: float) -> np.ndarray:
    """Every point becomes a disc, whose edge is smoothed."""
    reach = 1 if radius <= 8 else 2  # of the smoothing, in pixels of the published images
    radius, smoothing, reach = (scene.scale * length for length in (radius, smoothing, reach))
    margin = math.ceil(radius) + math.ceil(reach)
    offsets = np.arange(-margin, margin + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    return _filter(image, gaussian_filter(disc, smoothing, radius=math.ceil(reach)), "reflect")


def glass_blur(image: np.ndarray, scene: Scene, deviation: float, distance: float, rounds: int) -> np.ndarray:
    """Blur, let pixels take the place of their neighbours, one after the other, and blur again.

    The paper swaps them. Its code, on views of the same array, copies one over the other, and so the published images
    were made.
    """
    height, width = image.shape[:2]
    distance = max(1, round(scene.scale * distance))
    blurred = _blur(image, scene.scale * deviation)
    rows = range(height - distance - 1, distance - 1, -1)
    columns = range(width - distance - 1, distance - 1, -1)
    origin = list(range(height * width))
    for _ in range(rounds):
        # The published code draws from -distance to distance - 1.
        down, right = scene.generator.integers(-distance, distance, size=(2, len(rows) * len(columns)))
        steps = iter((down * width + right).tolist())
        for row in rows:
            for place in range(row * width + columns.start, row * width + columns.stop, -1):
                origin[place] = origin[place + next(steps)]
    moved = blurred.reshape(-1, 3)[origin].reshape(image.shape)
    return _blur(moved, scene.scale * deviation)


def motion_blur(image: np.ndarray, scene: Scene, radius: float, deviation: float) -> np.ndarray:
    """Every point leaves a tail in a direction up to 45 degrees from the horizontal."""
    degrees = scene.generator.uniform(-45, 45)
    return _filter(image, _tail(scene.scale * radius, scene.scale * deviation, degrees), "edge")


def zoom_blur(image: np.ndarray, scene: Scene, largest: float, step: float) -> np.ndarray:
    """The mean of the image and of its enlargements up to that factor."""
    pixels = PIL.Image.fromarray((255 * image).round().astype(np.uint8))
    factors = np.arange(1, largest, step)
    total = sum(np.asarray(_enlarge(pixels, factor), dtype=np.float32) for factor in factors) / 255
    return (image + total) / (len(factors) + 1)


# ----------------------------------------------------------------------------------------------------------- weather


def snow(
    image: np.ndarray,
    scene: Scene,
    mean: float,
    deviation: float,
    size: float,
    threshold: float,
    radius: float,
    blur: float,
    clearness: float,
) -> np.ndarray:
    """White flakes with tails before a paler image."""
    flakes = mean + deviation * scene.generator.standard_normal(image.shape[:2], dtype=np.float32)
    flakes = np.asarray(_enlarge(PIL.Image.fromarray(flakes), max(1.0, scene.scale * size)))
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    tail = _tail(scene.scale * radius, scene.scale * blur, scene.generator.uniform(-135, -45))
    flakes = _filter(flakes[..., None], tail, "edge")
    pale = np.maximum(image, (image @ LUMA)[..., None] * 1.5 + 0.5)
    return clearness * image + (1 - clearness) * pale + flakes + np.rot90(flakes, 2)


def frost(image: np.ndarray, scene: Scene, clearness: float, thickness: float) -> np.ndarray:
    """Ice crystals on a pane before the image.

    The published images have photographs of frost there; these crystals are drawn, with about their brightness, colour
    and contrast.
    """
    return clearness * image + thickness * _draw_frost(*image.shape[:2], scene.generator)


def fog(image: np.ndarray, scene: Scene, thickness: float, decay: float) -> np.ndarray:
    """Clouds of a fractal that is the smoother the larger `decay` is."""
    height, width = image.shape[:2]
    clouds = _draw_clouds(2 ** math.ceil(math.log2(max(height, width, 2))), decay, scene.generator)
    brightest = image.max()
    return (image + thickness * clouds[:height, :width, None]) * brightest / (brightest + thickness)


def brightness(image: np.ndarray, scene: Scene, amount: float) -> np.ndarray:
    """Add to the value of hue, saturation and value, which are else kept."""
    value = image.max(axis=2, keepdims=True)
    brighter = (value + amount).clip(max=1)
    return np.where(value > 0, image * brighter / np.maximum(value, 1e-6), brighter)


# ----------------------------------------------------------------------------------------------------------- digital


def contrast(image: np.ndarray, scene: Scene, factor: float) -> np.ndarray:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (image - mean)


def elastic_transform(image: np.ndarray, scene: Scene, strength: float, smoothness: float, shift: float) -> np.ndarray:
    """Move three points, with all between them, by up to `shift` pixels, and each pixel by a smooth random field."""
    height, width = image.shape[:2]
    strength, smoothness, shift = (scene.scale * length for length in (strength, smoothness, shift))
    centre, reach = np.array([height, width]) // 2, min(height, width) // 3
    corners = centre + reach * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + scene.generator.uniform(-shift, shift, size=(3, 2))
    field = scene.generator.uniform(-1, 1, size=(2, height, width))
    field = np.stack([strength * gaussian_filter(each, smoothness, mode="reflect", truncate=3) for each in field])
    places = np.indices((height, width)) + field
    # Where a moved point lies, its old place is looked up: a map (3, 2) of (row, column, 1) that three points decide.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    places = np.einsum("ihw,ij->jhw", places, back[:2]) + back[2][:, None, None]
    channels = [map_coordinates(channel, places, order=1, mode="mirror") for channel in image.transpose(2, 0, 1)]
    return np.stack(channels, axis=2)


def pixelate(image: np.ndarray, scene: Scene, share: float) -> np.ndarray:
    """Keep that share of the pixels of each side."""
    height, width = image.shape[:2]
    pixels = PIL.Image.fromarray((255 * image).round().astype(np.uint8))
    few = pixels.resize((max(1, int(width * share)), max(1, int(height * share))), Resampling.BOX)
    return np.asarray(few.resize((width, height), Resampling.BOX), dtype=np.float32) / 255


def jpeg_compression(image: np.ndarray, scene: Scene, quality: int) -> np.ndarray:
    file = io.BytesIO()
    PIL.Image.fromarray((255 * image).round().astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file), dtype=np.float32) / 255


# ------------------------------------------------------------------------------------------------------------ pieces


def _blur(image: np.ndarray, deviation: float) -> np.ndarray:
    return gaussian_filter(image, (deviation, deviation, 0), mode="nearest")


def _filter(image: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """Each pixel becomes the weighted mean of those around it: (H, W, C), (odd K, odd K) -> (H, W, C)."""
    margin = kernel.shape[0] // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode=border)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    return fftconvolve(padded, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))


def _tail(radius: float, deviation: float, degrees: float) -> np.ndarray:
    """Weights (K, K) of the pixels on a line that starts in the middle, as half of a normal distribution.

    As ImageMagick's motion blur, which the published images were made with.
    """
    places = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(places**2) / (2 * deviation**2))
    margin = len(places)
    down, right = (
        margin + places * turn for turn in (math.sin(math.radians(degrees)), math.cos(math.radians(degrees)))
    )
    kernel = np.zeros((2 * margin + 1, 2 * margin + 1))
    np.add.at(kernel, (down.round().astype(int), right.round().astype(int)), weights)
    return kernel


def _enlarge(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    """The middle of an image at its size."""
    width, height = image.size
    left, top = (width - width / factor) / 2, (height - height / factor) / 2
    return image.resize((width, height), Resampling.BILINEAR, box=(left, top, width - left, height - top))


def _draw_clouds(side: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """A fractal from 0 to 1 that goes on over its edges, (side, side), by the diamond-square algorithm.

    What is added at each halving falls by the square of `decay`: so do the published images.
    """
    clouds, step, amplitude = np.zeros((side, side), dtype=np.float32), side, 1.0

    def displace(total: np.ndarray) -> np.ndarray:
        return total / 4 + generator.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = clouds[::step, ::step]
        beside, below = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        centres = displace(corners + beside + below + np.roll(below, -1, 1))
        clouds[half::step, half::step] = centres
        clouds[::step, half::step] = displace(corners + beside + centres + np.roll(centres, 1, 0))
        clouds[half::step, ::step] = displace(corners + below + centres + np.roll(centres, 1, 1))
        step, amplitude = half, amplitude / decay**2
    clouds -= clouds.min()
    return clouds / clouds.max()


def _draw_frost(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Crystals of ice, (H, W, 3) from 0 to 1: patches of parallel needles, each patch in a direction of its own."""
    spacing = min(height, width) / 4
    count = [math.ceil(side / spacing) + 4 for side in (height, width)]
    seeds = (
        np.indices(count).reshape(2, -1).T - 1.5 + generator.uniform(-0.7, 0.7, (count[0] * count[1], 2))
    ) * spacing
    places = np.indices((height, width)).reshape(2, -1).T.astype(np.float64)
    # The borders between patches are ragged, as where crystals have grown into one another.
    ragged = np.stack([gaussian_filter(each, spacing / 12) for each in generator.standard_normal((2, height, width))])
    ragged *= 0.25 * spacing / np.maximum(ragged.std(), 1e-6)
    distances, nearest = cKDTree(seeds).query(places + ragged.reshape(2, -1).T, k=2)
    angle = generator.uniform(0, math.pi, len(seeds))[nearest[:, 0]]
    along = places[:, 0] * np.sin(angle) + places[:, 1] * np.cos(angle)
    across = places[:, 1] * np.sin(angle) - places[:, 0] * np.cos(angle)
    # Needles lean to both sides of the direction in which a crystal grows, as feathers do.
    position = (np.abs(across) * 0.8 + along) / spacing
    needles = generator.random(4096)
    # In small images no needle is finer than the pixels can show: it would be noise.
    counts = (min(24, spacing / 2), min(7, spacing / 4))
    fine, coarse = (needles[(count * position).astype(int) % 4096] for count in counts)
    border = np.exp(-((distances[:, 1] - distances[:, 0]) / (0.08 * spacing)))
    grey = (0.45 * fine + 0.35 * coarse + 0.35 * border).reshape(height, width)
    grey = gaussian_filter(grey, max(0.5, spacing / 90))
    thick = gaussian_filter(generator.standard_normal((height, width)), spacing / 2, mode="wrap")
    grey = (grey - grey.mean()) / grey.std() + 0.7 * thick / np.maximum(thick.std(), 1e-6)
    # Mean and deviation of the photographs of frost that the published images were made with.
    return np.array([0.57, 0.65, 0.70]) + 0.11 * grey[..., None] * np.array([1.0, 0.9, 0.85])


def _single(*values: float) -> tuple[tuple[float], ...]:
    return tuple((value,) for value in values)


# Times 244 in the published code, a slip for 224 that it names: so the images were made.
_ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
_ELASTIC_CIFAR = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))

CORRUPTIONS = {
    "gaussian_noise": Corruption(
        "noise", gaussian_noise, _single(0.08, 0.12, 0.18, 0.26, 0.38), _single(0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot_noise": Corruption("noise", shot_noise, _single(60, 25, 12, 5, 3), _single(500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(
        "noise", impulse_noise, _single(0.03, 0.06, 0.09, 0.17, 0.27), _single(0.01, 0.02, 0.03, 0.05, 0.07)
    ),
    "defocus_blur": Corruption(
        "blur",
        defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Corruption(
        "blur",
        glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Corruption(
        "blur",
        motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Corruption(
        "blur",
        zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": Corruption(
        "weather",
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(
        "weather",
        frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": Corruption(
        "weather",
        fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Corruption(
        "weather", brightness, _single(0.1, 0.2, 0.3, 0.4, 0.5), _single(0.05, 0.1, 0.15, 0.2, 0.3)
    ),
    "contrast": Corruption("digital", contrast, _single(0.4, 0.3, 0.2, 0.1, 0.05), _single(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        "digital",
        elastic_transform,
        tuple(tuple(244 * share for share in shares) for shares in _ELASTIC),
        tuple(tuple(CIFAR_SIDE * share for share in shares) for shares in _ELASTIC_CIFAR),
    ),
    "pixelate": Corruption(
        "digital", pixelate, _single(0.6, 0.5, 0.4, 0.3, 0.25), _single(0.95, 0.9, 0.85, 0.75, 0.65)
    ),
    "jpeg_compression": Corruption(
        "digital", jpeg_compression, _single(25, 18, 15, 10, 7), _single(80, 65, 58, 50, 40)
    ),
}
