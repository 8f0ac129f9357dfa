"""attnfast.nn.GlimpseSensor against its definition, a pixel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnfast.nn import GlimpseSensor

F64 = torch.float64


def definition(image: Tensor, location: Tensor, size: int, scales: int) -> Tensor:
    B, C, H, W = image.shape
    out = torch.zeros(B, scales, C, size, size, dtype=image.dtype)
    for b in range(B):
        x = round(0.5 * (location[b, 0].item() + 1) * W)
        y = round(0.5 * (location[b, 1].item() + 1) * H)
        for i in range(scales):
            step, wide = 2**i, size * 2**i
            for c in range(C):
                for row in range(wide):
                    for column in range(wide):
                        at_y, at_x = y - wide // 2 + row, x - wide // 2 + column
                        if 0 <= at_y < H and 0 <= at_x < W:
                            out[b, i, c, row // step, column // step] += image[b, c, at_y, at_x] / step**2
    return out


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("shape", [(1, 9, 12), (3, 16, 7)])
def test_is_its_definition(size: int, scales: int, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(4, *shape, generator=generator, dtype=F64)
    location = torch.rand(4, 2, generator=generator, dtype=F64) * 2.4 - 1.2
    torch.testing.assert_close(GlimpseSensor(size, scales)(image, location), definition(image, location, size, scales))


def test_corners_and_middle_of_an_image() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    sensor = GlimpseSensor(2)
    read = lambda x, y: sensor(image, torch.tensor([[x, y]])).flatten().tolist()  # noqa: E731
    assert read(0.0, 0.0) == [5, 6, 9, 10]
    assert read(-1.0, -1.0) == [0, 0, 0, 0.0] and image[0, 0, 0, 0] == 0
    assert read(1.0, -1.0) == [0, 0, 3, 0]  # x runs along the last axis
    assert read(0.5, 0.0) == [6, 7, 10, 11]
    assert read(-50.0, 0.0) == [0, 0, 0, 0]
    assert read(1e30, -1e30) == [0, 0, 0, 0]


def test_gradient_reaches_the_image_and_not_the_location() -> None:
    image = torch.rand(2, 2, 5, 6, dtype=F64, requires_grad=True)
    location = torch.tensor([[0.3, -0.9], [-1.0, 0.2]], dtype=F64, requires_grad=True)
    sensor = GlimpseSensor(2, 2)
    assert torch.autograd.gradcheck(lambda x: sensor(x, location), (image,))
    (found,) = torch.autograd.grad(sensor(image, location).sum(), [location], allow_unused=True)
    assert found is None


def test_a_nan_outside_of_the_glimpse_stays_there() -> None:
    image = torch.ones(1, 1, 6, 6)
    image[0, 0, 0, 0] = math.nan  # positions outside of the image are read from its edge
    glimpse = GlimpseSensor(2)(image, torch.tensor([[-3.0, -3.0]]))
    assert glimpse.tolist() == torch.zeros(1, 1, 1, 2, 2).tolist()


def test_a_nan_location_makes_its_glimpse_nan_and_no_other() -> None:
    got = GlimpseSensor(2, 2)(torch.ones(2, 1, 6, 6), torch.tensor([[0.0, math.nan], [0.0, 0.0]]))
    assert got[0].isnan().all() and got[1].tolist() == torch.ones(2, 1, 2, 2).tolist()
    assert GlimpseSensor(2)(torch.ones(1, 1, 6, 6), torch.tensor([[math.inf, 0.0]])).sum() == 0


def test_compiles_in_one_graph() -> None:
    sensor, image, location = GlimpseSensor(2, 2), torch.rand(3, 1, 8, 8), torch.rand(3, 2) - 0.5
    compiled = torch.compile(sensor, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, location), sensor(image, location))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    location = torch.tensor([[0.1, 0.2], [-0.7, 0.5]])
    got = GlimpseSensor(4, 2)(image, location)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), definition(image.double(), location, 4, 2), rtol=1e-2, atol=1e-3)


def test_no_images() -> None:
    assert GlimpseSensor(3, 2)(torch.zeros(0, 1, 4, 4), torch.zeros(0, 2)).shape == (0, 2, 1, 3, 3)
    assert (
        GlimpseSensor(3, 2)(torch.zeros(2, 1, 0, 4), torch.zeros(2, 2)).tolist() == torch.zeros(2, 2, 1, 3, 3).tolist()
    )


def test_samples_do_not_touch_one_another() -> None:
    sensor = GlimpseSensor(2, 2)
    image, location = torch.rand(3, 1, 8, 8), torch.rand(3, 2) - 0.5
    got = torch.stack([sensor(i.unsqueeze(0), p.unsqueeze(0)).squeeze(0) for i, p in zip(image, location)])
    assert torch.equal(sensor(image, location), got)


@pytest.mark.parametrize(
    ("image", "location", "message"),
    [
        (
            torch.zeros(2, 8, 8),
            torch.zeros(2, 2),
            r"image: expected a floating \[B, C, H, W\], got torch.float32 \[2, 8, 8\]",
        ),
        (torch.zeros(2, 1, 8, 8).long(), torch.zeros(2, 2), "image: expected a floating .* torch.int64"),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(3, 2),
            r"location: expected .*B = 2 \(image's\), got torch.float32 \[3, 2\]",
        ),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 2).long(), "location: expected a floating"),
    ],
)
def test_bad_arguments(image: Tensor, location: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlimpseSensor(2)(image, location)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="size: expected an integer > 0, got 0"):
        GlimpseSensor(0)
    with pytest.raises(ValueError, match="scales: expected an integer > 0, got -1"):
        GlimpseSensor(2, -1)
