"""The training script's logger."""

import logging

logger = logging.getLogger("degu.training")
