"""Deep support vectors: the DeepKKT conditions of a trained classifier, and samples that meet them.

`__init__.pyi` lists the public names. Each is loaded on first use, so that the command line answers
before torch is imported.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
