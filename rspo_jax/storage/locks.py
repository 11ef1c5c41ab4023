"""The one way in which processes keep one another from a file or folder.

A lock is the system's (`flock`): it goes with the last descriptor that has it,
however the process ends, and a child keeps what it inherits.
"""

import fcntl
from typing import Any


def take(file: Any) -> bool:
  """Locks an open file or descriptor; False where another one has it.

  Disks that know no locks do without: True.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    pass
  return True
