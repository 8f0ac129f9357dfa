"""k-means by faiss or scikit-learn, whichever is installed: the library has none of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from attnfast import _validate as check


def kmeans(vectors: Tensor, clusters: int, *, backend: str | None = None, seed: int = 0) -> Tensor:
    """Centroids ``[clusters, D]`` float32 of vectors ``[n, D]``, by faiss or scikit-learn.

    Raises
    ------
    ValueError
        Fewer vectors than clusters.
    ImportError
        Neither is installed, or not the `backend` asked for.
    """
    if vectors.dim() != 2 or vectors.shape[0] < clusters:
        raise ValueError(
            f"vectors: expected [n, D] of n >= clusters = {clusters}, got {check.shape_text(vectors.shape)}"
        )
    rows = vectors.detach().float().cpu().contiguous().numpy()
    if backend in (None, "faiss"):
        try:
            import faiss
        except ImportError as error:
            if backend is not None:
                raise ImportError("k-means by faiss: pip install faiss-cpu") from error
        else:
            machine = faiss.Kmeans(
                rows.shape[1], clusters, niter=20, seed=seed, verbose=False, min_points_per_centroid=1
            )
            machine.train(rows)
            assert machine.centroids is not None
            return torch.from_numpy(machine.centroids.copy())
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("k-means needs faiss or scikit-learn: pip install 'attnfast[memory]'") from error
    return torch.from_numpy(KMeans(clusters, n_init=1, random_state=seed).fit(rows).cluster_centers_).float()
