"""Builds ddpo._C, the CPU kernels, where a C++ compiler is at hand; installs without them where none is.

DDPO_BUILD_CPP = auto (default: try, warn on failure) | 1 (must build; CI) | 0 (skip)
Install with --no-build-isolation: the extension must be built against the torch it will run with.
Everything else about the package stands in pyproject.toml.
"""

import os
import sys
import warnings
from glob import glob

from setuptools import setup

MODE = os.environ.get("DDPO_BUILD_CPP", "auto")
VECTOR_FLAGS = {  # by torch's name of this machine's vector unit: the flags that torch builds its own kernels with
    "AVX512": "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
}


def extension():
    """(ext_modules, cmdclass): BuildExtension raises even for optional extensions, so the mode is kept here."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as err:
                if MODE == "1":
                    raise
                warnings.warn(f"ddpo._C was not built ({err}); ops run in PyTorch on the CPU", stacklevel=1)

        def copy_extensions_to_source(self):  # editable installs: nothing to copy where nothing was built
            if os.path.exists(self.get_ext_fullpath("ddpo._C")) or glob(f"{self.build_lib}/ddpo/_C*"):
                super().copy_extensions_to_source()

    flags = VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), "").split()
    sources, headers = sorted(glob("csrc/*.cpp")), sorted(glob("csrc/*.h"))
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs on one core
    options = {"extra_compile_args": ["-O3", "-fno-math-errno", *threads, *flags], "extra_link_args": threads}
    module = CppExtension("ddpo._C", sources, depends=headers, **options)
    return [module], {"build_ext": Build}


if MODE == "0":
    ext_modules, cmdclass = [], {}
else:
    try:
        ext_modules, cmdclass = extension()
    except ImportError as err:
        if MODE == "1":
            raise
        warnings.warn(f"ddpo._C is not built: {err}; install torch first, then --no-build-isolation", stacklevel=1)
        ext_modules, cmdclass = [], {}

setup(ext_modules=ext_modules, cmdclass=cmdclass)
