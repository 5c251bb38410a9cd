"""The workshop: it runs the notebooks, records what they say, keeps the ledger and builds the site.

Nothing of the method lies here; `dsvlib` knows nothing of it.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
