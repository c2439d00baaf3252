"""Models built on the ops."""

from .checkpoint import CheckpointError
from .hrm import Hrm
from .hrm_config import HrmConfig
from .hrm_text import HrmText, HrmTextOutput
from .hrm_text_config import HrmTextConfig

__all__ = ["CheckpointError", "Hrm", "HrmConfig", "HrmText", "HrmTextConfig", "HrmTextOutput"]
