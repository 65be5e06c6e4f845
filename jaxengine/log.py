"""The one logger of the package; installs no handlers.

`JAXENGINE_LOG` (debug, info, warning, error) sets its level and leaves other loggers alone.
"""

import logging
import os

logger = logging.getLogger("jaxengine")

_level = os.environ.get("JAXENGINE_LOG", "").upper()
if _level in logging.getLevelNamesMapping():
    logger.setLevel(_level)
