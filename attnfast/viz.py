"""Pictures of attention weights; needs matplotlib (``pip install 'attnfast[viz]'``), which is imported on use only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["load_alignment", "plot_alignment", "save_alignment"]


def plot_alignment(
    weights: Any, source: Sequence[str], target: Sequence[str], *, ax: Axes | None = None, title: str | None = None,
    values: bool = False, cmap: str = "gray",
) -> Axes:  # fmt: skip
    """Draw an alignment as Bahdanau et al. 2015 do (figure 3): a row for each target word, a column for each source
    word, white for a weight of 1 and black for 0.

    Parameters
    ----------
    weights : Tensor or array
        ``[T_q, T_k]``, finite: one sample and one head, without padding.
    source, target : sequence of str
        The T_k words attended to, and the T_q words that attend.
    ax : matplotlib Axes, optional
        Where to draw. Default: a new figure, sized to the words.
    title : str, optional
        Title of the axes.
    values : bool
        Also write each weight into its cell.
    cmap : str
        matplotlib's name of the colours.

    Returns
    -------
    matplotlib.axes.Axes
        Its figure is ``ax.figure``; ``ax.figure.savefig(path)`` saves it.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        `weights` is not a finite matrix of these sizes.

    Examples
    --------
    >>> import torch
    >>> from attnfast.viz import plot_alignment
    >>> ax = plot_alignment(torch.eye(2), ["la", "maison"], ["the", "house"])
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['the', 'house']
    """
    matrix = _checked(weights, source, target)
    pyplot = _pyplot()
    if ax is None:
        size = (1.6 + 0.34 * len(source), 1.6 + 0.34 * len(target))
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    largest = float(matrix.max()) if matrix.numel() else 1.0
    least = float(matrix.min()) if matrix.numel() else 0.0
    low, high = min(0.0, least), max(1.0, largest)
    ax.imshow(matrix.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest", aspect="equal")
    ax.set_xticks(range(len(source)), labels=list(source), rotation=90)
    ax.set_yticks(range(len(target)), labels=list(target))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    if title is not None:
        ax.set_title(title)
    if values:
        for row in range(len(target)):
            for column in range(len(source)):
                weight = float(matrix[row, column])
                shade = ax.images[-1].cmap((weight - low) / (high - low))
                dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
                color = "white" if dark else "black"
                ax.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=7, color=color)
    return ax


def save_alignment(path: str | Path, weights: Any, source: Sequence[str], target: Sequence[str]) -> None:
    """Save an alignment for ``python -m attnfast plot``: an .npz file with `weights`, `source` and `target`.

    Parameters are those of :func:`plot_alignment`; the file is written at exactly `path`.
    """
    import numpy

    matrix = _checked(weights, source, target)
    with open(path, "wb") as file:
        numpy.savez(file, weights=matrix.numpy(), source=_words(source), target=_words(target))


def load_alignment(path: str | Path) -> tuple[Tensor, list[str], list[str]]:
    """Read what :func:`save_alignment` (or ``numpy.savez`` with the same names) has written.

    Returns
    -------
    tuple
        weights ``[T_q, T_k]``, source words, target words.

    Raises
    ------
    ValueError
        The file is not such an alignment.
    """
    import zipfile

    import numpy

    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a saved alignment: not an .npz file")
        file.seek(0)
        with numpy.load(file, allow_pickle=False) as arrays:
            missing = [name for name in ("weights", "source", "target") if name not in arrays.files]
            if missing:
                raise ValueError(f"{path} is not a saved alignment: it has no {', '.join(missing)}")
            try:
                weights, source, target = arrays["weights"], arrays["source"], arrays["target"]
            except ValueError:
                raise ValueError(f"{path} is not a saved alignment: it holds Python objects") from None
    source, target = ([str(word) for word in words.reshape(-1)] for words in (source, target))
    return _checked(weights, source, target), source, target


def _words(words: Sequence[str]) -> Any:
    import numpy

    return numpy.array(list(words), dtype=numpy.str_)


def _checked(weights: Any, source: Sequence[str], target: Sequence[str]) -> Tensor:
    """The weights as a float matrix on the CPU, without a graph."""
    matrix = (weights.detach() if isinstance(weights, Tensor) else torch.as_tensor(weights)).to("cpu", torch.float32)
    wanted = [len(target), len(source)]
    if matrix.dim() != 2:
        raise ValueError(f"weights: expected one sample and one head [T_q, T_k] = {wanted}, got {list(matrix.shape)}")
    if list(matrix.shape) != wanted:
        raise ValueError(
            f"weights: expected [T_q, T_k] = {wanted} (words of target and source), got {list(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("weights: expected finite numbers, got NaN or infinity")
    return matrix


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("attnfast.viz needs matplotlib; run: pip install 'attnfast[viz]'") from None
    return pyplot
