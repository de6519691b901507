"""Lets a torchvision that was built for CUDA be imported next to a CPU build of torch.

Package indexes other than torch's own have only that build. Its extension library cannot load then, and its Python part
stops at the first operator that is not declared. This declares them, just before torchvision is imported: everything
but the operators works. A torchvision whose extension loads is left alone, and any next to a CUDA build of torch.

``torchvision_cpu.pth`` runs :func:`install` when Python starts, so nothing may be imported here at the top.
"""

import sys

OPERATORS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "_roi_align_backward",
    "_roi_pool_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward", "_deform_conv2d_backward",
)  # fmt: skip


class BeforeTorchvision:
    """A finder that finds nothing, but is asked first when torchvision is looked for."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find torchvision as the other finders do, and have it declare the operators before it runs."""
        if name != "torchvision":
            return None
        import importlib.util
        from pathlib import Path

        sys.meta_path.remove(cls)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        if spec is None or spec.origin is None:
            return spec
        run = spec.loader.exec_module

        def declare_then_run(module):
            declare_operators(Path(spec.origin).parent)
            run(module)

        spec.loader.exec_module = declare_then_run
        return spec


def install():
    """Watch for torchvision's import."""
    if BeforeTorchvision not in sys.meta_path:
        sys.meta_path.insert(0, BeforeTorchvision)


def declare_operators(folder):
    """Declare the operators of the torchvision in a folder unless its own extension library does."""
    import torch

    if torch.version.cuda is not None:
        return
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        global _library  # what it declares ends with it
        _library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            _library.define(f"{name}(Tensor input) -> Tensor")
