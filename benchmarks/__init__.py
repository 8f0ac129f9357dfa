"""Benchmarks of attnfast against PyTorch, run by ``python -m attnfast bench``.

The folder is installed as the package ``attnfast.benchmarks``; from a checkout it is loaded under that same name,
so every import in here is relative. ``registry`` holds the vocabulary (case, peer, workload), ``cases_*`` say what is
measured, ``peers`` against what, ``measure`` and ``memory`` how, ``runner`` drives a run and ``report``, ``chart`` and
``compare`` show it. The method is described in docs/benchmarks.md.
"""
