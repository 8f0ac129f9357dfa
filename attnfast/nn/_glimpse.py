"""The retina of the recurrent attention model (Mnih et al. 2014): patches of several widths around a point, as one
gather."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnfast.nn._base import positive


class GlimpseSensor(nn.Module):
    r"""Glimpse sensor :math:`\rho(x, l)` of Mnih, Heess, Graves and Kavukcuoglu (NeurIPS 2014, section 3.1).

    Patch i of ``scales`` is a square of :math:`w_i = g\,2^i` pixels around l, reduced to g x g by averaging
    :math:`2^i \times 2^i` pixels; what lies outside of the image is 0. Along an axis of W pixels the patch begins at

    .. math:: \mathrm{round}\bigl(\tfrac{1}{2} (l + 1) W\bigr) - w_i / 2

    so that -1 and 1 are the edges of the image and 0 its middle.

    Parameters
    ----------
    size : int
        g, in pixels.
    scales : int
        How many patches; each is twice as wide as the one before.

    Notes
    -----
    The pixels of all samples and patches are read by one gather. There is a gradient with respect to the image, and
    none with respect to l, where the paper has none either: places are learnt by REINFORCE.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import GlimpseSensor
    >>> sensor = GlimpseSensor(size=8, scales=3)
    >>> sensor(torch.rand(2, 1, 60, 60), torch.zeros(2, 2)).shape
    torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(self, size: int, scales: int = 1) -> None:
        super().__init__()
        positive(size=size, scales=scales)
        self.size, self.scales = size, scales

    def forward(self, image: Tensor, location: Tensor) -> Tensor:
        """Read one glimpse of each image.

        Parameters
        ----------
        image : Tensor
            ``[B, C, H, W]``, floating.
        location : Tensor
            ``[B, 2]``, floating: x (along W) and y (along H) of the centre, -1 to 1; beyond, the glimpse leaves the
            image. Where a coordinate is NaN, so is the glimpse.

        Returns
        -------
        Tensor
            ``[B, scales, C, g, g]``, finest patch first.

        Raises
        ------
        ValueError
            A shape or dtype is not as above.
        """
        if image.dim() != 4 or not image.is_floating_point():
            raise ValueError(f"image: expected a floating [B, C, H, W], got {image.dtype} {list(image.shape)}")
        if location.shape != (image.shape[0], 2) or not location.is_floating_point():
            expected = f"a floating [B, 2] with B = {image.shape[0]} (image's)"
            raise ValueError(f"location: expected {expected}, got {location.dtype} {list(location.shape)}")
        B, C, H, W = image.shape
        columns, inside_x = self._pixels(location[:, 0], W)
        rows, inside_y = self._pixels(location[:, 1], H)
        # [B, n, n] for each patch, one behind the other: all pixels there are to read.
        places = torch.cat([(r.unsqueeze(2) * W + c.unsqueeze(1)).flatten(1) for r, c in zip(rows, columns)], 1)
        inside = torch.cat([(r.unsqueeze(2) & c.unsqueeze(1)).flatten(1) for r, c in zip(inside_y, inside_x)], 1)
        if H * W == 0:
            return image.new_zeros(B, self.scales, C, self.size, self.size)
        pixels = image.flatten(2).gather(2, places.unsqueeze(1).expand(-1, C, -1))
        outside = torch.where(location.isnan().any(1), torch.nan, 0.0).to(image.dtype).view(B, 1, 1)
        inside = inside & ~location.isnan().any(1, keepdim=True)
        pixels = torch.where(inside.unsqueeze(1), pixels, outside)  # a NaN at the edge stays where it is
        patches = []
        for scale, patch in enumerate(pixels.split([(self.size << i) ** 2 for i in range(self.scales)], dim=2)):
            wide = self.size << scale
            patches.append(nn.functional.avg_pool2d(patch.unflatten(2, (wide, wide)), 1 << scale))
        return torch.stack(patches, dim=1)

    def _pixels(self, centre: Tensor, pixels: int) -> tuple[list[Tensor], list[Tensor]]:
        """For each patch the positions ``[B, n]`` along an axis, moved into the image, and whether they were inside."""
        # Far outside is outside: the bound keeps the integer within its type.
        middle = (0.5 * (centre.detach().double() + 1) * pixels).round().nan_to_num(0.0).clamp(-(2**31), 2**31).long()
        middle = middle.unsqueeze(1)
        places, inside = [], []
        for scale in range(self.scales):
            wide = self.size << scale
            place = middle - wide // 2 + torch.arange(wide, device=centre.device)
            places.append(place.clamp(0, max(pixels - 1, 0)))
            inside.append((place >= 0) & (place < pixels))
        return places, inside

    def extra_repr(self) -> str:
        return f"size={self.size}, scales={self.scales}"
